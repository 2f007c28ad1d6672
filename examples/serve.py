"""Serves a causal language model of Hugging Face: continuous batching, a paged key-value cache, chunked prefill.

    python examples/serve.py
    python examples/serve.py --model Qwen/Qwen2.5-0.5B --requests 32 --longest 20000 --new-tokens 128 --float8

Requests of mixed lengths wait, are read in pieces while others generate, and leave when they have their tokens. Every
attention of it, prefill or decoding, is one call of chunkattn.dca_with_kvcache. The same requests are served with Dual
Chunk Attention and with plain attention, which is the same call with one chunk as long as the longest sequence; printed
are the time to the first token and the tokens per second of both. It is a loop to learn from, not an engine: it has no
sampling, no preemption and no CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

try:
    import torch
    from byte_model import CHECKPOINT
    from corpus import HELD_OUT_MODULES, standard_library
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import chunkattn
except ImportError as error:
    sys.exit(f"serve.py: {error}; `pip install 'chunkattn[demo]'` installs what it needs")

ATTENTION = "chunkattn_paged"
BYTE_VOCABULARY = 256  # a model with this many tokens reads bytes

console = Console(soft_wrap=True)


@dataclass
class Request:
    prompt: list[int]
    new_tokens: int
    tokens: list[int] = field(default_factory=list)  # generated
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt, then generated ones, in the cache
    seconds_to_first: float = 0.0

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.new_tokens


@dataclass
class Step:
    """What the attention layers need to know about one forward of the model."""

    cache: PagedCache
    block_table: Tensor  # int32 [B, pages of the longest request]
    cache_seqlens: Tensor  # int32 [B]


class PagedCache:
    """Keys and values of all layers in pages, and the attention over them."""

    def __init__(
        self, model, pages: int, page_size: int, chunk_size: int, local_size: int, dtype: torch.dtype, scale: float
    ):
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (pages, page_size, config.num_key_value_heads, head_dim)
        layers = config.num_hidden_layers
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=model.device) for _ in range(layers)] for _ in "kv"
        )
        self.page_size = page_size
        self.free = list(range(pages))
        frequencies = model.base_model.rotary_emb.inv_freq.float()
        cos, sin = chunkattn.rope_table(chunk_size, 2 * frequencies.numel(), inv_freq=frequencies, device=model.device)
        self.options = {"cos": cos, "sin": sin, "chunk_size": chunk_size, "local_size": local_size}
        if dtype == torch.float8_e4m3fn:
            factors = torch.full((shape[2],), scale, device=model.device)
            self.options |= {"k_scale": factors, "v_scale": factors}

    def reserve(self, request: Request) -> bool:
        """Takes the pages that a request needs to its end; False while there are too few."""
        needed = -(-request.longest // self.page_size)
        if needed > len(self.free):
            return False
        request.pages = [self.free.pop() for _ in range(needed)]
        return True

    def release(self, request: Request) -> None:
        self.free += request.pages
        request.pages = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, step: Step) -> Tensor:
        """q, k, v [B, S, heads, D], raw; appends k and v to the layer's pages and returns [B, S, Hq, D]."""
        return chunkattn.dca_with_kvcache(
            q,
            self.keys[layer],
            self.values[layer],
            **self.options,
            cache_seqlens=step.cache_seqlens,
            block_table=step.block_table,
            k=k,
            v=v,
            scale=scale,
        )


def paged_attention(module, query, key, value, attention_mask, scaling=None, step: Step | None = None, **kwargs):
    """The attention function of transformers: query, key and value are [B, heads, S, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return step.cache.attend(module.layer_idx, q, k, v, scaling, step), None


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


class Engine:
    """One step reads a piece of the oldest waiting prompt, then generates a token for every request that was read."""

    def __init__(self, model, cache: PagedCache, max_batch: int, prefill_chunk: int):
        self.model, self.cache = model, cache
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @torch.inference_mode()
    def serve(self, requests: list[Request]) -> float:
        """Runs until every request has its tokens; returns the seconds it took."""
        self.waiting.extend(requests)
        begin = time.perf_counter()
        while self.waiting or self.running:
            if self.waiting and len(self.running) < self.max_batch:
                self.prefill(self.waiting[0], begin)
            if self.running:
                self.decode()
        return time.perf_counter() - begin

    def prefill(self, request: Request, begin: float) -> None:
        if not request.pages and not self.cache.reserve(request):
            return  # until others leave
        piece = request.prompt[request.cached : request.cached + self.prefill_chunk]
        (token,) = self.forward([request], [piece])
        if request.cached == len(request.prompt):
            self.waiting.popleft()
            self.running.append(request)
            self.take(request, token)
            request.seconds_to_first = time.perf_counter() - begin

    def decode(self) -> None:
        batch = list(self.running)
        tokens = self.forward(batch, [request.tokens[-1:] for request in batch])
        for request, token in zip(batch, tokens, strict=True):
            self.take(request, token)

    def take(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        if len(request.tokens) >= request.new_tokens:
            self.running.remove(request)
            self.cache.release(request)

    def forward(self, batch: list[Request], pieces: list[list[int]]) -> list[int]:
        """The likeliest next token of each request after its piece, all of one length."""
        device = self.model.device
        tokens = torch.tensor(pieces, device=device)
        table = torch.zeros(len(batch), max(len(request.pages) for request in batch), dtype=torch.int32)
        for row, request in enumerate(batch):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
        seqlens = torch.tensor([request.cached for request in batch], dtype=torch.int32)
        # At position 0 transformers' own rotation changes nothing: the cache gets raw keys and rotates them itself.
        output = self.model(
            input_ids=tokens,
            position_ids=torch.zeros_like(tokens),
            use_cache=False,
            logits_to_keep=1,
            step=Step(self.cache, table.to(device), seqlens.to(device)),
        )
        for request, piece in zip(batch, pieces, strict=True):
            request.cached += len(piece)
        return output.logits[:, -1].argmax(-1).tolist()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=str(CHECKPOINT), help="name or folder (default: the demo's byte-level Llama)"
    )
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--longest", type=int, default=1500, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated for each request")
    parser.add_argument("--max-batch", type=int, default=4, help="requests that generate at once")
    parser.add_argument("--prefill-chunk", type=int, default=256, help="tokens of a prompt read in one step")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page of the cache")
    parser.add_argument("--pages", type=int, help="of the cache (default: enough for --max-batch of the longest)")
    parser.add_argument("--chunk-size", type=int, help="of Dual Chunk Attention (default: 3/4 of the trained length)")
    parser.add_argument("--local-size", type=int, help="of Dual Chunk Attention (default: 1/8 of the trained length)")
    parser.add_argument("--float8", action="store_true", help="keep keys and values in float8_e4m3fn")
    parser.add_argument("--float8-scale", type=float, default=1 / 16, help="what an element of 1 stands for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--json", type=Path, help="also write the figures and the generated tokens to this file")
    arguments = parser.parse_args(argv)
    for name in ("requests", "shortest", "new_tokens", "max_batch", "prefill_chunk", "page_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.longest < arguments.shortest:
        parser.error(f"--longest must be --shortest, {arguments.shortest}, or more, got {arguments.longest}")
    if arguments.page_size < 16:
        parser.error(f"--page-size must be at least 16, got {arguments.page_size}")
    return arguments


def load_model(arguments: argparse.Namespace):
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation=ATTENTION
        )
    except (OSError, ValueError) as error:
        sys.exit(f"--model must name a causal language model of Hugging Face, got {arguments.model}: {error}")
    return model.to(arguments.device).eval()


def make_requests(arguments: argparse.Namespace, vocabulary: int) -> list[Request]:
    """Beginnings of standard library modules, cut to lengths drawn at random."""
    draw = random.Random(arguments.seed)
    tokenizer = None if vocabulary == BYTE_VOCABULARY else AutoTokenizer.from_pretrained(arguments.model)
    requests = []
    for number in range(arguments.requests):
        length = draw.randint(arguments.shortest, arguments.longest)
        tokens: list[int] = []
        module = number
        while len(tokens) < length:
            name = HELD_OUT_MODULES[module % len(HELD_OUT_MODULES)]
            source = (standard_library() / f"{name}.py").read_bytes()
            tokens += list(source) if tokenizer is None else tokenizer.encode(source.decode(errors="replace"))
            module += 1
        requests.append(Request(tokens[:length], arguments.new_tokens))
    return requests


def serve(arguments: argparse.Namespace, model, chunk_size: int, local_size: int) -> dict:
    """Serves the requests with one pair of sizes; returns the figures and the generated tokens."""
    requests = make_requests(arguments, model.config.vocab_size)
    needed = [-(-request.longest // arguments.page_size) for request in requests]
    pages = arguments.pages or arguments.max_batch * max(needed)
    if pages < max(needed):
        sys.exit(f"--pages must be at least {max(needed)} for the longest request, got {pages}")
    dtype = torch.float8_e4m3fn if arguments.float8 else model.dtype
    cache = PagedCache(model, pages, arguments.page_size, chunk_size, local_size, dtype, arguments.float8_scale)
    engine = Engine(model, cache, arguments.max_batch, arguments.prefill_chunk)
    seconds = engine.serve(requests)
    waits = sorted(request.seconds_to_first for request in requests)
    generated = sum(len(request.tokens) for request in requests)
    return {
        "chunk_size": chunk_size,
        "local_size": local_size,
        "seconds": seconds,
        "seconds_to_first_token": {"median": waits[len(waits) // 2], "longest": waits[-1]},
        "tokens_per_second": {
            "generated": generated / seconds,
            "all": (generated + sum(len(request.prompt) for request in requests)) / seconds,
        },
        "tokens": [request.tokens for request in requests],
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    model = load_model(arguments)
    trained = model.config.max_position_embeddings
    longest = arguments.longest + arguments.new_tokens
    sizes = {
        "DCA": (arguments.chunk_size or trained * 3 // 4, arguments.local_size or trained // 8),
        # One chunk holds everything: its stride is the longest sequence.
        "plain": (longest + 1, 1),
    }
    table = Table(title=f"{arguments.requests} requests of {arguments.shortest} to {arguments.longest} tokens")
    for heading in ("attention", "first token, median s", "longest s", "generated tokens/s", "all tokens/s"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    make_warm = argparse.Namespace(**{**vars(arguments), "requests": 1, "longest": arguments.shortest, "new_tokens": 2})
    results = {}
    for name, (chunk_size, local_size) in sizes.items():
        try:
            serve(make_warm, model, chunk_size, local_size)
            results[name] = serve(arguments, model, chunk_size, local_size)
        except (ValueError, NotImplementedError) as error:
            sys.exit(str(error))
        waits, rates = results[name]["seconds_to_first_token"], results[name]["tokens_per_second"]
        label = f"{name} s={chunk_size} w={local_size}" if name == "DCA" else name
        table.add_row(
            label,
            f"{waits['median']:.2f}",
            f"{waits['longest']:.2f}",
            f"{rates['generated']:.0f}",
            f"{rates['all']:.0f}",
        )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
