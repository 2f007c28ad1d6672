"""Times a step of fine-tuning a Llama-2-7B-shaped model with Dual Chunk Attention and with select-and-merge attention,
beside dense attention.

    python benchmarks/benchmark_finetune.py --json benchmarks/results/h100/finetune.json

A step is the forward, the backward and AdamW on LoRA adapters of q, k, v and o, with gradient checkpointing, on one
sequence. There is one model in the process, of random weights in bfloat16; implementations of its attention take turns,
in another order each round. Times are those of the host's clock, until the device is done; peak memory is that of
torch's allocator, weights included. Rows have ``model``, ``tokens``, ``peak_gib`` and the ``loss`` of the warm-up step.
"""

import argparse
import contextlib
import math
import random
import sys
import time
from dataclasses import dataclass

import common
import torch
from common import DcaSetting, Timing, console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(common.ROOT / "examples"))
try:
    import peft
    import transformers
    from next_token_loss import next_token_loss
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from chunkattn.integrations.transformers import (
        crd_ntk,
        disable_dca,
        disable_select_merge,
        enable_dca,
        enable_select_merge,
    )
except ImportError as error:
    raise SystemExit(f"benchmark_finetune.py needs transformers and peft: {error}") from error

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LEARNING_RATE = 1e-4

# Under a name without a mask function: the model makes no mask, whose size would be the square of the tokens.
DENSE = "sdpa_causal"
AttentionInterface.register(DENSE, sdpa_attention_forward)

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
OURS = ("chunkattn", "select-merge")
IMPLS = (*OURS, *BACKENDS, "sdpa")  # sdpa: what torch takes by itself


@dataclass(frozen=True)
class SelectMergeSetting:
    """Tokens of a region, regions selected, regions of a group."""

    region_size: int
    top_k: int
    merge: int

    @classmethod
    def parse(cls, text):
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
            raise ValueError(f"--select-merge must be REGION:TOP_K:MERGE, three positive integers, got {text!r}")
        return cls(*map(int, parts))

    def __str__(self):
        return f"{self.region_size}:{self.top_k}:{self.merge}"


@dataclass(frozen=True)
class Model:
    """A model's shape, and what is measured of it by default."""

    config: dict
    setting: str
    select_merge: str
    tokens: tuple[int, ...]


MODELS = {
    "llama-2-7b": Model(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "3072:512",
        "16:384:128",
        (16384, 32768),
    ),
    "tiny": Model(
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 96,
        },
        "64:16",
        "4:6:4",
        (150,),
    ),
}


def make_model(shape, device, rank):
    """Random weights, made on the device in bfloat16, with adapters of the same dtype."""
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[shape].config)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=DENSE)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(r=rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=False).train()


class Finetune:
    """One model, and steps of its training with any of the implementations."""

    def __init__(self, options):
        self.options = options
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.setting = DcaSetting.parse(options.dca or MODELS[options.shape].setting, 0)
        self.select_merge = SelectMergeSetting.parse(options.select_merge or MODELS[options.shape].select_merge)
        names = [*OURS, *BACKENDS] if self.cuda else [*OURS, "sdpa"]
        self.names = options.impls or names
        self.absent = {name: "not selected" for name in names if name not in self.names}
        if not self.cuda:
            self.absent |= dict.fromkeys(BACKENDS, "runs on CUDA only")
            self.names = [name for name in self.names if name not in BACKENDS]
        self.rows, self.failed = [], []
        begin = time.monotonic()
        self.model = make_model(options.shape, self.device, options.lora)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
        self.synchronize()
        self.header = common.make_header(
            "finetune",
            self.device,
            rounds=options.rounds,
            model=options.shape,
            parameters=self.model.num_parameters(),
            trained_parameters=sum(weight.numel() for weight in weights),
            lora_rank=options.lora,
            transformers=transformers.__version__,
            peft=peft.__version__,
        )
        common.print_absent(self.absent)
        console.print(self.header)
        console.print(f"the model was made in {time.monotonic() - begin:.1f} s")

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def attention(self, impl, length):
        """While it lasts, the model computes attention by an implementation, in the backward's recomputation too.

        Gives what its forwards are told besides the tokens: with select-and-merge the positions of CRD NTK.
        """
        if impl == "chunkattn":
            enable_dca(self.model, self.setting.chunk_size, self.setting.local_size)
            try:
                yield {}
            finally:
                disable_dca(self.model)
        elif impl == "select-merge":
            enable_select_merge(self.model, **vars(self.select_merge))
            try:
                yield {"rotary": crd_ntk(self.model).draw(0, length, torch.Generator().manual_seed(0))}
            finally:
                disable_select_merge(self.model)
        else:
            with sdpa_kernel(BACKENDS[impl]) if impl in BACKENDS else contextlib.nullcontext():
                yield {}

    def step(self, impl, tokens):
        """One step. Returns (milliseconds, peak GiB or None, loss)."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.attention(impl, tokens.shape[1] - 1) as model_inputs:
            self.synchronize()
            begin = time.perf_counter()
            loss = next_token_loss(self.model, tokens, **model_inputs)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.synchronize()
            seconds = time.perf_counter() - begin
        peak = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2) if self.cuda else None
        return 1e3 * seconds, peak, loss.item()

    def warm_up(self, impl, tokens):
        """(peak GiB, loss) of a first step, or None where an implementation fails."""
        try:
            _, peak, loss = self.step(impl, tokens)
            problem = None if math.isfinite(loss) else f"the loss is {loss}"
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if problem is None:
            return peak, loss
        self.optimizer.zero_grad(set_to_none=True)
        self.synchronize()
        self.failed.append({"impl": impl, "tokens": tokens.shape[1] - 1, "error": problem})
        console.print(f"failed: {impl} at {tokens.shape[1] - 1} tokens: {problem}", markup=False, highlight=False)
        return None

    def run_length(self, length):
        """Times every implementation that works at one length."""
        generator = torch.Generator(self.device).manual_seed(0)
        vocabulary = self.model.config.vocab_size
        tokens = torch.randint(vocabulary, (1, length + 1), generator=generator, device=self.device)
        first = {name: self.warm_up(name, tokens) for name in self.names}
        working = [name for name in self.names if first[name] is not None]
        samples = {name: [] for name in working}
        peaks = {name: [] for name in working}
        for turn in range(self.options.rounds):
            for name in random.Random(turn).sample(working, len(working)):
                milliseconds, peak, _ = self.step(name, tokens)
                samples[name].append(milliseconds)
                peaks[name].append(peak)
        rows = [self.make_row(name, length, samples[name], peaks[name], first[name][1]) for name in working]
        self.print_rows(rows, length)
        self.rows += rows

    def make_row(self, impl, length, samples, peaks, loss):
        timing = Timing(tuple(samples))
        dual_chunk, select_merge = impl == "chunkattn", impl == "select-merge"
        return {
            "impl": impl,
            "pass": "finetune",
            "model": self.options.shape,
            "batch": 1,
            "tokens": length,
            "dtype": "bfloat16",
            "chunk_size": self.setting.chunk_size if dual_chunk else None,
            "local_size": self.setting.local_size if dual_chunk else None,
            **{name: value if select_merge else None for name, value in vars(self.select_merge).items()},
            "ms": round(timing.ms, 2),
            "ms_spread": round(timing.spread, 2),
            "steps": len(samples),
            "peak_gib": max(peaks) if self.cuda else None,
            "loss": round(loss, 4),
        }

    def print_rows(self, rows, length):
        table = Table(title=f"a step of {self.options.shape} at {length} tokens, bfloat16", title_justify="left")
        table.add_column("impl")
        for name in ("setting", "s per step", "spread", "tokens/s", "peak GiB", "loss"):
            table.add_column(name, justify="right")
        for row in rows:
            setting = {"chunkattn": str(self.setting), "select-merge": str(self.select_merge)}.get(row["impl"], "dense")
            seconds, spread = row["ms"] / 1e3, row["ms_spread"] / 1e3
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            cells = (f"{seconds:.3f}", f"{spread:.3f}", f"{length / seconds:.0f}", peak, f"{row['loss']:.3f}")
            table.add_row(row["impl"], setting, *cells)
        console.print(table)

    def run(self, lengths):
        """Runs every length that fits the time limit. The result file is complete after each."""
        start = time.monotonic()
        for length in lengths:
            if self.options.time_limit and time.monotonic() - start > self.options.time_limit:
                error = "not run: the time limit was reached"
                self.failed.append({"impl": "all", "tokens": length, "error": error})
                console.print(f"{length} tokens: {error}", markup=False, highlight=False)
            else:
                self.run_length(length)
            if self.options.json:
                common.write_results(self.options.json, self.header, self.rows, self.absent, self.failed)
            if self.cuda:
                torch.cuda.empty_cache()
        console.print(f"{len(self.rows)} rows, {len(self.failed)} failures, {time.monotonic() - start:.0f} s")
        return all(failure["impl"] not in (*OURS, "all") for failure in self.failed)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=MODELS, help="default: llama-2-7b on a GPU, tiny on a CPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths; default: 16384 and 32768, or 150 of tiny")
    parser.add_argument("--dca", metavar="CHUNK:LOCAL", help="default: 3/4 and 1/8 of the model's trained length")
    parser.add_argument(
        "--select-merge", metavar="REGION:TOP_K:MERGE", help="default: 16:384:128, the paper's, or 4:6:4 of tiny"
    )
    parser.add_argument("--impls", nargs="+", choices=IMPLS, help="default: all there are")
    parser.add_argument("--lora", type=int, default=8, metavar="RANK", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="steps timed of each implementation after one of warm-up")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further length is begun")
    parser.add_argument("--json", metavar="PATH", help="result file")
    options = parser.parse_args(argv)
    options.shape = options.shape or ("llama-2-7b" if torch.device(options.device).type == "cuda" else "tiny")
    for name, values in (("tokens", options.tokens or []), ("lora", [options.lora]), ("rounds", [options.rounds])):
        if any(value < 1 for value in values):
            parser.error(f"--{name} must be at least 1, got {min(values)}")
    try:
        SelectMergeSetting.parse(options.select_merge or MODELS[options.shape].select_merge)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv=None):
    options = parse_arguments(argv)
    return 0 if Finetune(options).run(options.tokens or MODELS[options.shape].tokens) else 1


if __name__ == "__main__":
    sys.exit(main())
