"""Does a small model with select-and-merge attention find a passkey, and how far beyond the length it was trained on?

    python examples/passkey.py

A Llama of some hundred thousand parameters is trained from random weights, in minutes on two cores, on the usual test:
filler sentences, among them "The pass key is 4 8 2 1 3 . Remember it . 4 8 2 1 3 is the pass key .", and at the end the
question for it. A token is a word. Texts have at most --length tokens in training, which shows each step other rotary
positions (CRD NTK). Then model.generate() answers in texts of up to 16 times that length, with the key at every depth.
The share of right answers is drawn as a heat map, passkey.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

try:
    import matplotlib
    import torch
    import transformers
    from extend_context import length_label
    from finetuning import console, make_progress
    from rich.table import Table
    from torch import Tensor
    from torch.nn import functional as F
    from train_byte_llama import Schedule
    from transformers import LlamaConfig, LlamaForCausalLM

    from chunkattn.integrations.transformers import crd_ntk, enable_select_merge
except ImportError as error:
    sys.exit(f"passkey.py: {error}; `pip install 'chunkattn[demo]'` installs what it needs")

FILLER = "The grass is green . The sky is blue . The sun is yellow . Here we go . There and back again ."
STATEMENT = "The pass key is {key} . Remember it . {key} is the pass key ."
QUESTION = "What is the pass key ? The pass key is"
DIGITS = 5
WORDS = [*map(str, range(10)), *sorted(set(f"{FILLER} {STATEMENT} {QUESTION}".replace("{key}", "").split()))]

SHORTEST = 48  # tokens of the first texts in training
LEARNED = 0.95  # share of right digits at which texts get twice as long
BATCH_TOKENS = 4096
SIZES = {"region_size": 4, "top_k": 56, "merge": 8}  # at most 256 keys for a token
NTK_SCALE = 64.0  # of the evaluation


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest training texts (%(default)s)")
    parser.add_argument("--steps", type=int, default=900, help="default: %(default)s")
    parser.add_argument(
        "--select-on",
        choices=("unrotated", "rotated"),
        default="unrotated",
        help="choose regions by queries and keys without or with their positions (default: %(default)s)",
    )
    parser.add_argument("--max-minutes", type=float, help="fit the steps of the training into this time")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="L", help="tokens to evaluate at (default: 1/2 to 16 times --length)"
    )
    parser.add_argument(
        "--depths", type=int, default=11, help="places of the key, evenly spaced (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=10, help="texts of each length and depth (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("passkey.png"), help="PNG file (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    shortest = len(make_texts(1, 0.0, None, torch.Generator())[0])
    args.lengths = args.lengths or [args.length // 2 << power for power in range(6)]
    for name, values, least in (
        ("length", [args.length], SHORTEST),
        ("lengths", args.lengths, shortest),
        ("steps", [args.steps], 1),
        ("depths", [args.depths], 2),
        ("samples", [args.samples], 1),
    ):
        if min(values) < least:
            parser.error(f"--{name} must be at least {least}, got {min(values)}")
    for path in filter(None, (args.plot, args.json)):
        if not path.parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.parent}")
    return args


def encode(text: str) -> Tensor:
    return torch.tensor([WORDS.index(word) for word in text.split()])


def make_texts(count: int, depth: float | None, length: int | None, generator: torch.Generator) -> Tensor:
    """Texts [count, length] that end with the right answer, DIGITS tokens.

    depth: where the key is stated, from 0, the beginning, to 1, right before the question; None: anywhere.
    length: None: the shortest there is.
    """
    keys = torch.randint(10, (count, DIGITS), generator=generator)
    filler = encode(FILLER)
    stated = encode(STATEMENT.replace("{key}", " ".join("0" * DIGITS))).repeat(count, 1)
    stated[stated == 0] = torch.cat((keys, keys), dim=1).flatten()
    asked = torch.cat((encode(QUESTION).repeat(count, 1), keys), dim=1)
    room = 0 if length is None else length - stated.shape[1] - asked.shape[1]
    if depth is None:
        place = torch.randint(room + 1, (count, 1), generator=generator)
    else:
        place = torch.full((count, 1), round(depth * room))
    # Texts begin anywhere in the filler.
    begin = torch.randint(len(filler), (count, 1), generator=generator)
    texts = filler[(begin + torch.arange(room + stated.shape[1])) % len(filler)]
    texts.scatter_(1, place + torch.arange(stated.shape[1]), stated)
    return torch.cat((texts, asked), dim=1)


def make_model(length: int, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(device)


def answer_logits(model: LlamaForCausalLM, texts: Tensor, rotary) -> Tensor:
    """Of the tokens of the answer, [count, DIGITS, words]."""
    hidden = model.model(input_ids=texts[:, :-1], use_cache=False, rotary=rotary).last_hidden_state
    return model.lm_head(hidden[:, -DIGITS:])


def train(model: LlamaForCausalLM, args: argparse.Namespace) -> list[dict]:
    """Texts get longer as soon as the model can answer in those it sees. Returns when they did, and how well."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    schedule = Schedule(args.steps, args.learning_rate, deadline)
    # A circle of positions not much longer than a text is closed within many texts, where neighbours are far apart.
    positions = crd_ntk(
        model,
        base_period=args.length,
        period_start=8 * args.length,
        period_max=32 * args.length,
        grow_every=max(1, args.steps // 4),
    )
    generator = torch.Generator().manual_seed(args.seed)
    history, longest, right = [], SHORTEST, 0.0
    started = time.monotonic()
    with make_progress() as progress:
        bar = progress.add_task("training", total=args.steps, state="")
        while schedule.remaining:
            step = schedule.done
            for group in optimizer.param_groups:
                group["lr"] = schedule.next_rate()
            # Of three steps one goes back to a shorter length, so that none is forgotten.
            length = longest if step % 3 else SHORTEST << (step // 3) % (longest // SHORTEST).bit_length()
            texts = make_texts(BATCH_TOKENS // length, None, length, generator).to(model.device)
            draw = positions.draw(step, length, torch.Generator().manual_seed(args.seed))
            logits = answer_logits(model, texts, draw)
            loss = F.cross_entropy(logits.flatten(0, 1), texts[:, -DIGITS:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if length == longest:
                share = (logits.argmax(dim=-1) == texts[:, -DIGITS:]).float().mean().item()
                right += 0.1 * (share - right)
            if right > LEARNED and longest < args.length:
                history.append({"steps": schedule.done, "length": longest, "right_digits": round(right, 3)})
                console.print(f"{right:.0%} of digits right at {longest} tokens after {schedule.done} steps")
                longest, right = min(2 * longest, args.length), 0.0
            schedule.fit((time.monotonic() - started) / schedule.done)
            progress.update(
                bar, completed=schedule.done, total=schedule.done + schedule.remaining, state=f"{right:.0%}"
            )
    history.append({"steps": schedule.done, "length": longest, "right_digits": round(right, 3)})
    console.print(f"{right:.0%} of digits right at {longest} tokens after {schedule.done} steps")
    return history


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, args: argparse.Namespace, depths: list[float]) -> list[list[float]]:
    """The share of texts whose key generate() gives in full, [lengths, depths]."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed + 1)
    accuracy = []
    with make_progress() as progress:
        bar = progress.add_task("asking", total=len(args.lengths) * len(depths), state="cells")
        for length in args.lengths:
            row = []
            for depth in depths:
                texts = make_texts(args.samples, depth, length, generator).to(model.device)
                answers = model.generate(texts[:, :-DIGITS], max_new_tokens=DIGITS, do_sample=False)
                row.append((answers == texts).all(dim=1).float().mean().item())
                progress.advance(bar)
            accuracy.append(row)
    return accuracy


def print_table(accuracy: list[list[float]], lengths: list[int], depths: list[float], trained: int) -> None:
    table = Table(title=f"Passkeys found, by length and depth; trained on up to {trained} tokens", title_justify="left")
    table.add_column("tokens", justify="right")
    for depth in depths:
        table.add_column(f"{depth:.0%}", justify="right")
    for length, row in zip(lengths, accuracy, strict=True):
        table.add_row(str(length), *(f"{value:.0%}" for value in row))
    console.print(table)


def draw(accuracy: list[list[float]], lengths: list[int], depths: list[float], trained: int, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    image = axes.imshow(torch.tensor(accuracy).T.numpy(), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    inside = sum(length <= trained for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside - 0.5, color="black", lw=1.5, ls=":")
    axes.set_xlabel(f"tokens of the text; trained on up to {trained}, left of the dotted line")
    axes.set_ylabel("depth of the key")
    axes.set_title("Passkeys found with select-and-merge attention")
    figure.colorbar(image, label="share of right answers")
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_error()  # texts longer than the trained length are the point
    torch.manual_seed(args.seed)
    model = make_model(args.length, args.device)
    enable_select_merge(model, **SIZES, select_on=args.select_on, ntk_scale=NTK_SCALE)
    depths = [index / (args.depths - 1) for index in range(args.depths)]

    started = time.monotonic()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        history = train(model, args)
        trained = time.monotonic()
        accuracy = evaluate(model, args, depths)
    evaluated = time.monotonic()

    print_table(accuracy, args.lengths, depths, args.length)
    draw(accuracy, args.lengths, depths, args.length, args.plot)
    console.print(
        f"Trained in {trained - started:.0f} s, asked in {evaluated - trained:.0f} s; the heat map is in {args.plot}."
    )
    if args.json:
        report = {
            "trained_length": args.length,
            "steps": history[-1]["steps"],
            "parameters": model.num_parameters(),
            "training": history,
            **SIZES,
            "select_on": args.select_on,
            "ntk_scale": NTK_SCALE,
            "samples": args.samples,
            "lengths": args.lengths,
            "depths": depths,
            "accuracy": accuracy,
            "training_seconds": round(trained - started, 1),
            "evaluation_seconds": round(evaluated - trained, 1),
            "device": torch.cuda.get_device_name(args.device) if model.device.type == "cuda" else "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
