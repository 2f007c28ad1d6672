"""Trains the byte-level Llama that extend_context.py reads with: 512 bytes of context, nothing longer.

The text is the Python sources of the packages installed beside this interpreter; the standard library is held out.
One command, about three minutes on an H100: `python examples/train_byte_llama.py --output examples/byte_llama`.
It writes model.safetensors (bfloat16), config.json and training.json (loss curve, data, held-out score, versions).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from byte_model import SCORED_BYTES, TRAINED_LENGTH, bits_per_byte, byte_llama_config, load, save
from corpus import TrainingText, held_out_text, training_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

WARMUP_STEPS = 500
FINAL_RATE = 0.01  # of the peak learning rate
UNTIMED_STEPS = 10  # they allocate and tune
REPORT_EVERY = 100  # steps
REPORT_SECONDS = 10.0
HELD_OUT_BYTES = 16384  # of each module

console = Console(soft_wrap=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and training.json")
    parser.add_argument("--steps", type=int, default=42000)
    parser.add_argument("--batch", type=int, default=64, help="windows of 512 bytes per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine")
    parser.add_argument("--max-minutes", type=float, help="fit start-up and training into this time")
    parser.add_argument("--max-megabytes", type=int, default=200, help="of training text")
    parser.add_argument("--eval-windows", type=int, default=4096 if has_gpu else 64, help="held-out windows scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=has_gpu, help="use torch.compile")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=has_gpu, help="use autocast")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "max_megabytes", "eval_windows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch sees no GPU")
    return args


class Schedule:
    """How many steps are left, and the learning rate: a linear warm-up times a cosine from `peak` to FINAL_RATE of it.

    The cosine follows `progress`, of which every step takes an equal share of what is left. When a deadline makes the
    remaining steps fewer (or more again), the rate stays continuous and the last step still ends the cosine.
    """

    def __init__(self, steps: int, peak: float, deadline: float | None = None):
        self.requested = steps
        self.peak = peak
        self.deadline = deadline  # time.monotonic()
        self.warmup = min(WARMUP_STEPS, max(1, steps // 10))
        self.done = 0
        self.remaining = steps
        self.progress = 0.0

    def next_rate(self) -> float:
        """Takes a step and returns its learning rate."""
        self.done += 1
        self.progress += (1 - self.progress) / self.remaining
        self.remaining -= 1
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return self.peak * min(1.0, self.done / self.warmup) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def fit(self, seconds_per_step: float) -> None:
        """Sets the remaining steps to those requested, or to those that fit before the deadline."""
        if self.deadline is not None and self.remaining:
            fitting = int((self.deadline - time.monotonic()) / seconds_per_step)
            self.remaining = min(self.requested - self.done, max(1, fitting))


class Trainer:
    """Model, optimizer and the text as one uint8 tensor on the device, where the random windows are drawn."""

    def __init__(self, model: LlamaForCausalLM, text: torch.Tensor, args: argparse.Namespace):
        self.model = model
        self.text = text
        self.batch = args.batch
        self.bfloat16 = args.bfloat16
        self.offsets = torch.arange(TRAINED_LENGTH + 1, device=text.device)
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
        self.loss = self._compiled_loss() if args.compile else self._loss

    def _windows(self) -> torch.Tensor:
        """uint8 [batch, 513] at random places of the text."""
        starts = torch.randint(len(self.text) - TRAINED_LENGTH, (self.batch, 1), device=self.text.device)
        return self.text[starts + self.offsets]

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        tokens = windows.long()
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def _compiled_loss(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The loss under torch.compile, or as it is where that fails, for example for want of a C compiler."""
        loss = torch.compile(self._loss)
        try:
            loss(self._windows()).backward()
        except Exception as error:
            console.print(f"torch.compile failed ({type(error).__name__}): training goes on without it, more slowly")
            return self._loss
        finally:
            self.model.zero_grad(set_to_none=True)
        return loss

    def step(self, rate: float) -> torch.Tensor:
        """One optimizer step at learning rate `rate`. Returns the loss in nats per byte, without waiting for it."""
        loss = self.loss(self._windows())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train(trainer: Trainer, schedule: Schedule) -> list[tuple[int, float]]:
    """Trains to the end of the schedule. Returns the loss curve as (step, bits per byte since the entry before)."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps  {task.fields[state]}"),
        TimeRemainingColumn(),
    )
    curve: list[tuple[int, float]] = []
    running = torch.zeros((), device=trainer.text.device)
    last_step, last_time = 0, time.monotonic()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=schedule.remaining, state="")
        while schedule.remaining:
            running += trainer.step(schedule.next_rate())
            compiled = schedule.done == UNTIMED_STEPS
            due = schedule.done % REPORT_EVERY == 0 or time.monotonic() - last_time > REPORT_SECONDS
            if schedule.remaining and not due and not compiled:
                continue
            steps = schedule.done - last_step
            loss = running.item() / steps / math.log(2)  # waits for the device
            if not math.isfinite(loss):
                raise SystemExit(f"training diverged before step {schedule.done}: try a lower --learning-rate")
            seconds_per_step = (time.monotonic() - last_time) / steps
            if last_step >= UNTIMED_STEPS:
                schedule.fit(seconds_per_step)
            curve.append((schedule.done, round(loss, 4)))
            state = f"{loss:.3f} bits per byte, {1000 * seconds_per_step:.2f} ms a step"
            progress.update(bar, completed=schedule.done, total=schedule.done + schedule.remaining, state=state)
            if not console.is_terminal and (len(curve) % 20 == 0 or not schedule.remaining):
                console.print(f"step {schedule.done} of {schedule.done + schedule.remaining}: {state}")
            running.zero_()
            last_step, last_time = schedule.done, time.monotonic()
    return curve


def held_out_windows(count: int) -> torch.Tensor:
    """uint8 [at most count, 512]: windows of the held-out modules whose scored ends do not overlap, evenly spaced."""
    modules = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in held_out_text(HELD_OUT_BYTES).values()]
    windows = torch.cat([module.unfold(0, TRAINED_LENGTH, SCORED_BYTES) for module in modules])
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def held_out_score(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    model.eval()
    return round(torch.cat([bits_per_byte(model, part) for part in windows.split(64)]).mean().item(), 4)


def describe_run(args: argparse.Namespace, text: TrainingText, model: LlamaForCausalLM, device: str) -> dict:
    on_gpu = device.startswith("cuda")
    return {
        "parameters": model.num_parameters(),
        "context": TRAINED_LENGTH,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "autocast": "bfloat16" if args.bfloat16 else None,
        "data": {
            "bytes": len(text.data),
            "files": text.files,
            "files_left_out_as_copies_of_the_standard_library": text.copies_left_out,
            "sha256": text.sha256,
            "package_bytes": text.package_bytes,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        },
    }


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_arguments(argv)
    deadline = None if args.max_minutes is None else started + 60 * args.max_minutes
    text = training_text(args.max_megabytes * 1_000_000)
    if len(text.data) < 1000 * TRAINED_LENGTH:
        raise SystemExit(f"only {len(text.data)} bytes of Python sources are installed; install more packages")
    console.print(
        f"{len(text.data) / 1e6:.1f} MB in {text.files} files, {text.copies_left_out} left out as copies of the "
        f"standard library, collected in {time.monotonic() - started:.1f} s"
    )
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    # A name without a mask function: the model passes no mask and SDPA takes its causal flash kernel when compiled too.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    model = LlamaForCausalLM._from_config(byte_llama_config(), attn_implementation="sdpa_causal").to(args.device)
    trainer = Trainer(model, torch.from_numpy(text.data.copy()).to(args.device), args)

    training_started = time.monotonic()
    schedule = Schedule(args.steps, args.learning_rate, deadline)
    curve = train(trainer, schedule)
    seconds = time.monotonic() - training_started
    windows = held_out_windows(args.eval_windows)
    in_float32 = held_out_score(model, windows)
    save(model, args.output, torch.bfloat16)
    as_stored = held_out_score(load(args.output, torch.float32, args.device), windows)
    report = describe_run(args, text, model, args.device) | {
        "steps": schedule.done,
        "seconds": round(seconds, 1),
        "held_out": {
            "windows": len(windows),
            "length": TRAINED_LENGTH,
            "scored_bytes": SCORED_BYTES,
            "bits_per_byte_float32_weights": in_float32,
            "bits_per_byte_as_stored_in_bfloat16": as_stored,
        },
        "loss_bits_per_byte": curve,
    }
    (args.output / "training.json").write_text(json.dumps(report) + "\n")
    console.print(
        f"{schedule.done} steps in {seconds:.0f} s; held out: {as_stored:.3f} bits per byte as stored in bfloat16 "
        f"({in_float32:.3f} in float32); written to {args.output}"
    )


if __name__ == "__main__":
    main()
