"""What the fine-tuning examples share: options, text, training, and the score of held-out text by length."""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from byte_model import CHECKPOINT, SCORED_BYTES, bits_per_byte
from corpus import HELD_OUT_MODULES, SEPARATOR, standard_library, training_text
from next_token_loss import next_token_loss
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor, nn
from train_byte_llama import Schedule
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

TRAINING_BYTES = 20_000_000  # of the default text
HELD_OUT_SHARE = 0.1  # of a --text, its end
BYTE_VOCABULARY = 256  # a model with this many tokens reads bytes
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SCORED = SCORED_BYTES  # tokens at the end of each window

console = Console(soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser, plot: str, steps: int = 100, batch: int = 4) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or Hub name (default: examples/byte_llama)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to train on; its last tenth is held out")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=batch, help="windows of a step, one after the other (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak of the cosine (default: %(default)s)")
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="train adapters of this rank, by peft, not the weights"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute layers again in the backward")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--samples", type=int, default=64 if on_gpu else 16, help="held-out windows (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path(plot), help="PNG file (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="save the model, or its adapters, as safetensors")
    parser.add_argument("--json", type=Path, help="write the figures here")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with one sentence where an argument is wrong; fills in the dtype."""
    for name in ("steps", "batch", "samples", "lora"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.length <= SCORED:
        parser.error(f"--length must be above {SCORED}, the tokens that are scored; got {args.length}")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be positive, got {args.learning_rate}")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text must name a file, got {args.text}")
    for path in filter(None, (args.plot, args.json)):
        if not path.parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.parent}")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must name a folder, got the file {args.output}")
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch sees no GPU")
    if on_gpu and args.dtype == "float32":
        parser.error("--dtype must be bfloat16 on a GPU, whose kernels take no float32; got float32")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")


def load_model(args: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The model, and its tokenizer, None where it reads bytes.

    What is trained is float32, and --dtype is that of autocast; weights that adapters leave alone are of --dtype.
    """
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype) if args.lora else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        reads_bytes = model.config.vocab_size == BYTE_VOCABULARY
        tokenizer = None if reads_bytes else AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--model must name a causal language model of Hugging Face, got {args.model}: {reason}"
        ) from None
    return model.to(args.device), tokenizer


def add_adapters(model: nn.Module, rank: int) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"--lora needs peft ({error}); `pip install peft` installs it") from None
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@dataclass(frozen=True)
class Method:
    """What an example adds to the others' training.

    Attributes:
        script: its file name.
        enable: makes a model compute attention by the method, given the arguments.
        model_inputs: more keyword arguments of a training forward, given the model, the step, counted from 0, and the
            arguments.
        load: as :func:`load_model`.
    """

    script: str
    enable: Callable[[nn.Module, argparse.Namespace], None]
    model_inputs: Callable[[nn.Module, int, argparse.Namespace], dict[str, Any]] = lambda model, step, args: {}
    load: Callable[[argparse.Namespace], tuple[nn.Module, PreTrainedTokenizerBase | None]] = load_model


def read_text(path: Path | None) -> tuple[list[bytes], list[bytes]]:
    """Documents to train on, and held-out ones."""
    if path is not None:
        text = path.read_bytes()
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        return [text[:cut]], [text[cut:]]
    modules = [standard_library() / f"{name}.py" for name in HELD_OUT_MODULES]
    training = training_text(TRAINING_BYTES).data.tobytes().split(SEPARATOR)
    return training, [module.read_bytes() for module in modules if module.is_file()]


def to_tokens(documents: list[bytes], tokenizer: PreTrainedTokenizerBase | None, shortest: int) -> list[Tensor]:
    """The tokens of the documents that have at least `shortest`, each 1D: uint8 where a token is a byte."""
    long_enough = [document for document in documents if len(document) >= shortest]  # no token is less than a byte
    if tokenizer is None:
        return [torch.frombuffer(bytearray(document), dtype=torch.uint8) for document in long_enough]
    tokenize = partial(tokenizer, add_special_tokens=False, verbose=False)
    tokens = [torch.tensor(tokenize(text.decode("utf-8", "replace"))["input_ids"]) for text in long_enough]
    return [document for document in tokens if len(document) >= shortest]


class Windows:
    """Windows of length + 1 tokens at random places of documents, each document as likely as the others."""

    def __init__(self, documents: list[Tensor], length: int, seed: int):
        self.documents, self.length = documents, length
        self.random = random.Random(seed)

    def draw(self, device: str) -> Tensor:
        document = self.random.choice(self.documents)
        start = self.random.randint(0, len(document) - self.length - 1)
        return document[start : start + self.length + 1].to(device, torch.long).unsqueeze(0)


@dataclass(frozen=True)
class HeldOut:
    """Windows [samples, tokens], what scored tokens stand for in bytes [samples], and how much of a window to read."""

    windows: Tensor
    scored_bytes: Tensor
    lengths: list[int]


def hold_out(
    documents: list[Tensor], tokenizer: PreTrainedTokenizerBase | None, lengths: list[int], count: int
) -> HeldOut:
    """At most `count` windows, evenly spaced, whose scored ends do not overlap."""
    longest = lengths[-1]
    ends = [(document, end) for document in documents for end in range(longest, len(document) + 1, SCORED)]
    count = min(count, len(ends))
    chosen = [ends[index * len(ends) // count] for index in range(count)]
    windows = torch.stack([document[end - longest : end] for document, end in chosen])
    if tokenizer is None:
        scored_bytes = [SCORED] * count
    else:
        scored_bytes = [len(tokenizer.decode(window[-SCORED:]).encode()) for window in windows]
    return HeldOut(windows, torch.tensor(scored_bytes, dtype=torch.float64), lengths)


def evaluation_lengths(trained_length: int, length: int, longest: int) -> list[int]:
    """From the trained length to twice the window's, by factors of two, as far as held-out text of `longest` goes."""
    lengths = {length, 2 * length}
    while trained_length < length:
        lengths.add(trained_length)
        trained_length *= 2
    return sorted(value for value in lengths if SCORED < value <= longest)


def prepare_text(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None, trained_length: int
) -> tuple[Windows, HeldOut]:
    training, held_out = (
        to_tokens(documents, tokenizer, shortest)
        for documents, shortest in zip(read_text(args.text), (args.length + 1, args.length), strict=True)
    )
    for documents, name in ((training, "to train on"), (held_out, "to hold out")):
        if not documents:
            raise ValueError(
                f"--length must be below the length of a document, got {args.length}: none {name} is longer"
            )
    lengths = evaluation_lengths(trained_length, args.length, max(map(len, held_out)))
    console.print(f"{sum(map(len, training)) / 1e6:.1f}M tokens in {len(training)} documents longer than a window")
    return Windows(training, args.length, args.seed), hold_out(held_out, tokenizer, lengths, args.samples)


def make_progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def evaluate(
    model: nn.Module, text: HeldOut, precision: Callable[[], AbstractContextManager], when: str
) -> list[float]:
    """Bits per byte of the scored tokens, for each length."""
    model.eval()
    scores = []
    with make_progress() as progress, precision():
        bar = progress.add_task(f"reading, {when}", total=len(text.lengths) * len(text.windows), state="windows")
        for length in text.lengths:
            bits = []
            for window in text.windows[:, -length:].split(1):
                bits.append(bits_per_byte(model, window))
                progress.advance(bar)
            scores.append((torch.cat(bits) * SCORED / text.scored_bytes).mean().item())
    return scores


def train(
    model: nn.Module,
    windows: Windows,
    method: Method,
    args: argparse.Namespace,
    precision: Callable[[], AbstractContextManager],
) -> list[float]:
    """Returns the loss of each step, in bits per token."""
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = Schedule(args.steps, args.learning_rate)
    losses: list[float] = []
    started = time.monotonic()
    with make_progress() as progress:
        bar = progress.add_task("training", total=args.steps, state="")
        while schedule.remaining:
            model_inputs = method.model_inputs(model, schedule.done, args)
            rate = schedule.next_rate()
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for _ in range(args.batch):
                with precision():
                    loss = next_token_loss(model, windows.draw(args.device), **model_inputs) / args.batch
                loss.backward()
                total += loss.item() / math.log(2)
            if not math.isfinite(total):
                raise ValueError(f"training diverged at step {schedule.done}: try a lower --learning-rate")
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            seconds = (time.monotonic() - started) / schedule.done
            state = f"steps  {total:.3f} bits per token, {seconds:.2f} s a step"
            progress.update(bar, completed=schedule.done, state=state)
            if not console.is_terminal and schedule.done * 10 // args.steps > (schedule.done - 1) * 10 // args.steps:
                console.print(f"step {schedule.done} of {args.steps}: {state}")
    return losses


def print_table(lengths: list[int], scores: dict[str, list[float]], args: argparse.Namespace, samples: int) -> None:
    title = f"Bits per byte of the last {SCORED} tokens of {samples} held-out windows, by tokens read"
    table = Table(title=title, title_justify="left")
    table.add_column(f"trained on {args.length} tokens")
    for length in lengths:
        table.add_column(f"[bold]{length}[/bold]" if length == args.length else str(length), justify="right")
    for name, row in scores.items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - width) : end]
        means.append(sum(part) / len(part))
    return means


def draw(losses: list[float], lengths: list[int], scores: dict[str, list[float]], path: Path) -> None:
    """The loss by step, and the held-out score by length."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = range(1, len(losses) + 1)
    width = max(1, len(losses) // 20)
    left.plot(steps, losses, color="tab:blue", alpha=0.3, lw=1)
    left.plot(steps, running_mean(losses, width), color="tab:blue", label=f"mean of {width} steps")
    left.set_xlabel("step")
    left.set_ylabel("training loss in bits per token")
    left.legend(frameon=False)
    for (name, row), color in zip(scores.items(), ("tab:gray", "tab:blue"), strict=True):
        right.plot(lengths, row, marker="o", ms=4, color=color, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(lengths, map(str, lengths))
    right.set_xlabel("tokens read")
    right.set_ylabel("held-out bits per byte")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def finetune(method: Method, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model, tokenizer = method.load(args)
    method.enable(model, args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.lora:
        model = add_adapters(model, args.lora)
    windows, held_out = prepare_text(args, tokenizer, model.config.max_position_embeddings)
    enabled = args.dtype == "bfloat16"
    precision = partial(torch.autocast, args.device.partition(":")[0], torch.bfloat16, enabled=enabled)

    scores = {"before": evaluate(model, held_out, precision, "before")}
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    started = time.monotonic()
    losses = train(model, windows, method, args, precision)
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated(args.device) / 2**30 if on_gpu else None
    scores["after"] = evaluate(model, held_out, precision, "after")

    print_table(held_out.lengths, scores, args, len(held_out.windows))
    draw(losses, held_out.lengths, scores, args.plot)
    memory = "" if peak is None else f", at most {peak:.1f} GiB of memory"
    console.print(
        f"{args.steps} steps of {args.batch} windows in {seconds:.0f} s{memory}; the curves are in {args.plot}."
    )
    if args.output:
        model.save_pretrained(args.output)
        if tokenizer is not None:
            tokenizer.save_pretrained(args.output)
        console.print(f"Saved to {args.output}; after loading it, enable the attention with the same settings.")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "output", "plot")}
        report = settings | {
            "model": Path(args.model).name if Path(args.model).is_dir() else args.model,
            "text": args.text.name if args.text else None,
            "device": torch.cuda.get_device_name(args.device) if on_gpu else "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trained_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "held_out_windows": len(held_out.windows),
            "seconds": round(seconds, 1),
            "peak_gib": None if peak is None else round(peak, 2),
            "lengths": held_out.lengths,
            "bits_per_byte": scores,
            "loss_bits_per_token": [round(loss, 4) for loss in losses],
        }
        args.json.write_text(json.dumps(report) + "\n")


def run(method: Method, args: argparse.Namespace) -> None:
    try:
        finetune(method, args)
    except (OSError, ValueError) as error:
        sys.exit(f"{method.script}: {error}")
