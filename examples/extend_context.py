"""How far past its training length does a model read? Plain RoPE, dynamic NTK and Dual Chunk Attention compared.

A small byte-level Llama, trained on windows of 512 bytes, reads standard library modules it was not trained on. The
same last 256 bytes of each are scored while the context before them grows from 512 to 16384 bytes in all. A model
that uses the longer context, or at least is not hurt by it, stays at or below its score at 512.

Prints a table and draws extend_context.png. No weight changes between the rows: dynamic NTK is the rope type of
transformers, Dual Chunk Attention is one call of chunkattn.integrations.transformers.enable_dca.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    import matplotlib
    import torch
    import transformers
    from byte_model import CHECKPOINT, SCORED_BYTES, bits_per_byte, load
    from corpus import HELD_OUT_MODULES, held_out_text
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from chunkattn.integrations.transformers import LengthTemperature, disable_dca, enable_dca
except ImportError as error:
    sys.exit(f"extend_context.py: {error}; `pip install 'chunkattn[demo]'` installs what it needs")

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BYTES_PER_BATCH = 16384
NTK_FACTOR = 2.0  # reads better than 1 at twice the trained length, no worse beyond

console = Console(soft_wrap=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder (default: the one shipped)")
    parser.add_argument("--samples", type=int, help="held-out modules (default: all on a GPU, 8 or 4 on a CPU)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="L", help="bytes, scored ones included"
    )
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the faster one on this device")
    parser.add_argument(
        "--output", type=Path, default=Path("extend_context.png"), help="PNG file (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    args.lengths = sorted(set(args.lengths))
    if args.lengths[0] <= SCORED_BYTES:
        parser.error(f"--lengths must be above {SCORED_BYTES}, the bytes that are scored; got {args.lengths[0]}")
    for path in filter(None, (args.output, args.json)):
        if not path.parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.parent}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch sees no GPU")
    return args


def fastest_dtype(checkpoint: Path, device: str) -> torch.dtype:
    """bfloat16 on a GPU. CPUs differ: it is more than twice as fast as float32 on some, many times slower on others."""
    if device.startswith("cuda"):
        return torch.bfloat16
    window = torch.zeros(1, 2048, dtype=torch.uint8)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load(checkpoint, dtype, device)
        seconds[dtype] = min(timeit.repeat(partial(bits_per_byte, model, window), number=1, repeat=4))
    return min(seconds, key=seconds.get)


def affordable_samples(dtype: torch.dtype, device: str) -> int:
    """All modules on a GPU; on a CPU what two cores read within three minutes."""
    return len(HELD_OUT_MODULES) if device.startswith("cuda") else 5 if dtype == torch.bfloat16 else 2


@dataclass(frozen=True)
class Method:
    """A way to read. `reading()` is a context in which `model` reads like that."""

    name: str
    model: transformers.LlamaForCausalLM
    color: str
    line: str = "-"
    reading: Callable[[], AbstractContextManager] = nullcontext


@contextmanager
def dual_chunk_attention(model: transformers.LlamaForCausalLM, **settings) -> Iterator[None]:
    enable_dca(model, **settings)
    try:
        yield
    finally:
        disable_dca(model)


def make_methods(checkpoint: Path, dtype: torch.dtype, device: str) -> list[Method]:
    model = load(checkpoint, dtype, device)
    trained_length = model.config.max_position_embeddings
    rope = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": NTK_FACTOR}
    ntk = load(checkpoint, dtype, device, rope_parameters=rope)
    methods = [Method("plain RoPE", model, "tab:gray"), Method("dynamic NTK", ntk, "tab:olive")]
    for local_size, color in ((trained_length // 8, "tab:orange"), (trained_length // 4, "tab:blue")):
        settings = {"chunk_size": trained_length * 3 // 4, "local_size": local_size}
        name = "DCA s={chunk_size} w={local_size}".format(**settings)
        with_temperature = {**settings, "temperature": LengthTemperature(trained_length)}
        methods.append(Method(name, model, color, "-", partial(dual_chunk_attention, model, **settings)))
        methods.append(
            Method(f"{name} t=m²", model, color, "--", partial(dual_chunk_attention, model, **with_temperature))
        )
    return methods


def relative_cost(length: int) -> int:
    """The attention of this model takes as long as everything else at about 4096 bytes."""
    return length * (length + 4096)


def measure(methods: list[Method], texts: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Bits per byte of the last SCORED_BYTES of `texts` [samples, bytes]: per method, float64 [lengths, samples].

    The lengths ascend: past the trained length, transformers' dynamic NTK keeps the base of the longest text so far.
    """
    results: dict[str, torch.Tensor] = {}
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(methods) * len(texts) * sum(map(relative_cost, lengths)))
        for method in methods:
            rows = []
            for length in lengths:
                progress.update(bar, description=f"{method.name}, {length} bytes")
                scores = []
                with method.reading():
                    for batch in texts[:, -length:].split(max(1, BYTES_PER_BATCH // length)):
                        scores.append(bits_per_byte(method.model, batch))
                        progress.advance(bar, len(batch) * relative_cost(length))
                rows.append(torch.cat(scores))
            results[method.name] = torch.stack(rows)
    return results


def print_table(results: dict[str, list[float]], lengths: list[int], trained_length: int, samples: int) -> None:
    table = Table(
        title=f"Bits per byte of the same {SCORED_BYTES} bytes in {samples} held-out modules, by context length"
    )
    table.add_column(f"trained on {trained_length} bytes")
    for length in lengths:
        table.add_column(f"{length}" if length != trained_length else f"[bold]{length}[/bold]", justify="right")
    for name, row in results.items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)


def print_summary(results: dict[str, torch.Tensor], lengths: list[int], trained_length: int) -> None:
    """What happens at eight times the trained length, where both lengths were measured, and how sure that is."""
    if not {trained_length, 8 * trained_length} <= set(lengths):
        return
    before, after = lengths.index(trained_length), lengths.index(8 * trained_length)
    best = min((name for name in results if name.startswith("DCA")), key=lambda name: results[name][after].mean())
    for name in (best, "plain RoPE"):
        scores = results[name]
        ratio = scores[after].mean() / scores[before].mean()
        sentence = f"{name}: {scores[after].mean():.3f} at {8 * trained_length} bytes, {ratio:.2f} times its value at "
        sentence += str(trained_length)
        if (samples := scores.shape[1]) > 1:
            # Of the ratio of two means over the same modules, to first order.
            error = (scores[after] - ratio * scores[before]).std() / samples**0.5 / scores[before].mean()
            sentence += f" (standard error over {samples} modules: {error:.2f})"
        console.print(sentence)


def length_label(length: int) -> str:
    return f"{length / 1024:g}k" if length >= 1024 else str(length)


def draw(
    results: dict[str, list[float]], methods: list[Method], lengths: list[int], trained_length: int, path: Path
) -> None:
    """A plot scaled for the methods that keep reading. The others leave it at the top; the legend says where to."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lowest = min(map(min, results.values()))
    readable = max(max(row) for name, row in results.items() if name.startswith("DCA"))
    bottom, top = 0.9 * lowest, max(1.1 * readable, 1.8 * lowest)
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for method in methods:
        row = results[method.name]
        label = f"{method.name} ({row[-1]:.1f} at {length_label(lengths[-1])})" if row[-1] > top else method.name
        axes.plot(lengths, row, method.line, color=method.color, marker="o", ms=4, label=label)
    axes.axvline(trained_length, color="black", lw=1, ls=":")
    axes.set_xscale("log", base=2)
    labels = [length_label(length) + ("\ntrained length" if length == trained_length else "") for length in lengths]
    axes.set_xticks(lengths, labels)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("context length in bytes")
    axes.set_ylabel(f"bits per byte of the last {SCORED_BYTES}")
    axes.set_title(f"A model trained on {trained_length} bytes reads on (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        dtype = getattr(torch, args.dtype) if args.dtype else fastest_dtype(args.checkpoint, args.device)
        samples = affordable_samples(dtype, args.device) if args.samples is None else args.samples
        methods = make_methods(args.checkpoint, dtype, args.device)
        modules = held_out_text(max(LENGTHS[-1], args.lengths[-1]), samples)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"extend_context.py: {error}")
    texts = torch.stack([torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in modules.values()])
    trained_length = methods[0].model.config.max_position_embeddings

    scores = measure(methods, texts, args.lengths)
    results = {name: rows.mean(1).tolist() for name, rows in scores.items()}
    print_table(results, args.lengths, trained_length, samples)
    print_summary(scores, args.lengths, trained_length)
    draw(results, methods, args.lengths, trained_length, args.output)
    console.print(f"The plot is in {args.output}.")
    if args.json:
        report = {
            "trained_length": trained_length,
            "scored_bytes": SCORED_BYTES,
            "modules": list(modules),
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lengths": args.lengths,
            "bits_per_byte": results,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
