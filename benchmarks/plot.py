"""Draws result files of the benchmarks and writes their tables into a page of the documentation.

    python benchmarks/plot.py benchmarks/results/h100/forward.json

For each file, a PNG with the rate by length of every implementation (of select_merge.json with the time by length), and
a section between two markers of the page, which is replaced on every run. The page is never edited between its markers.
"""

import argparse
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import common
import matplotlib.pyplot as plt

ROOT = common.ROOT

# Okabe and Ito's colours, which the colour-blind can tell apart. An engine has one colour: solid where it computes
# dense attention, dashed where DCA is composed of it.
COLOURS = {
    "chunkattn": "#D55E00",
    "fa3": "#0072B2",
    "cudnn": "#009E73",
    "fa2": "#CC79A7",
    "flex": "#E69F00",
    "sdpa": "#56B4E9",
    "chunkattn-alone": "#E6A57A",
    "chunkattn-longest": "#F0E442",
}
MARKERS = {
    "chunkattn": "o",
    "chunkattn-deterministic": "P",
    "fa3": "s",
    "cudnn": "^",
    "fa2": "D",
    "flex": "v",
    "sdpa": "s",
}
LABELS = {
    "chunkattn": "chunkattn (DCA)",
    "chunkattn-deterministic": "chunkattn, deterministic (DCA)",
    "chunkattn-portable": "chunkattn, portable kernel (DCA)",
    "chunkattn-dca": "chunkattn (DCA)",
    "chunkattn-alone": "chunkattn, one by one (DCA)",
    "chunkattn-longest": "chunkattn, the longest alone (DCA)",
    "fa3": "FlashAttention-3, dense",
    "cudnn": "cuDNN, dense",
    "fa2": "FlashAttention-2, dense",
    "flex": "FlexAttention, dense",
    "sdpa": "torch SDPA, dense",
}
ORDER = list(LABELS)
UNITS = {"tflops": "TFLOP/s", "gbps": "GB/s"}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
COMPLETE = "rows, complete"  # the cache of a step that appends nothing
RATIO_PEERS = ["fa3", "cudnn", "fa2", "sdpa", "composed-fa3", "composed-cudnn", "composed-fa2", "composed-sdpa"]
RATIO_PEERS += ["chunkattn-alone"]  # of packed sequences: the same, one by one
PANELS_PER_LINE = 4


def base_of(impl):
    """The implementation whose colour another one shares: composed-fa3 has fa3's."""
    return impl.removeprefix("composed-").removesuffix("-portable").removesuffix("-deterministic")


def label_of(impl):
    if impl.startswith("composed-"):
        return f"DCA composed of {LABELS[base_of(impl)].split(',')[0]} calls"
    return LABELS.get(impl, impl)


def order_of(impl):
    base = base_of(impl)
    return (impl.startswith("composed-"), ORDER.index(base) if base in ORDER else len(ORDER), impl)


def rate_unit(rows):
    return "tflops" if all("tflops" in row for row in rows) else "gbps"


def passes_of(rows):
    return list(dict.fromkeys(row["pass"] for row in rows))


def main_rows(rows):
    """The rows a plot shows: of each implementation at each shape the first one, with the first DCA setting."""
    shown = {}
    for row in rows:
        shown.setdefault((row["impl"], row["pass"], common.row_shape(row)), row)
    return list(shown.values())


def panels_of(rows):
    """Rows by what they share beside the length."""
    panels = {}
    for row in rows:
        panels.setdefault((row["pass"], configuration(row)), []).append(row)
    return panels


def heads_label(row):
    heads = f"{row['heads']}/{row['kv_heads']}" if row["heads"] != row["kv_heads"] else row["heads"]
    return f"{heads} heads, d {row['head_dim']}"


def configuration(row):
    """What was measured, without the length: batch if not 1, heads, head size, data type."""
    batch = f"batch {row['batch']}, " if row["batch"] > 1 else ""
    queries = f", {row['seq_q']} queries" if row["seq_q"] != row["seq_k"] else ""
    dtype = DTYPES.get(row["dtype"], row["dtype"])
    return f"{batch}{heads_label(row)}{queries}, {dtype}"


def length_label(length):
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def draw_panel(axes, rows, unit, ceiling):
    lengths = sorted({row["seq_k"] for row in rows})
    place = {length: index for index, length in enumerate(lengths)}
    for impl in sorted({row["impl"] for row in rows}, key=order_of):
        points = sorted((place[row["seq_k"]], row[unit]) for row in rows if row["impl"] == impl)
        base = base_of(impl)
        axes.plot(
            *zip(*points, strict=True),
            label=label_of(impl),
            color=COLOURS.get(base, "#555555"),
            marker=MARKERS.get(impl, MARKERS.get(base, "x")),
            linestyle="-" if impl == base else "--",
            markerfacecolor=None if impl == base else "white",
            linewidth=2.8 if impl == "chunkattn" else 1.6,
            markersize=7 if impl == "chunkattn" else 5.5,
            zorder=3 if impl == "chunkattn" else 2,
        )
    axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axes.set_xlim(-0.4, len(lengths) - 0.6)
    axes.set_xlabel("keys")
    finish_panel(axes, unit, ceiling)


def draw_bars(axes, rows, unit, ceiling, group_of, axis):
    """The rates of implementations side by side, in groups by group_of(row), their labels."""
    groups = list(dict.fromkeys(map(group_of, rows)))
    impls = sorted({row["impl"] for row in rows}, key=order_of)
    width = 0.8 / len(impls)
    for index, impl in enumerate(impls):
        members = [row for row in rows if row["impl"] == impl]
        colour = COLOURS.get(impl, COLOURS.get(base_of(impl), "#555555"))
        axes.bar(
            [groups.index(group_of(row)) + (index - (len(impls) - 1) / 2) * width for row in members],
            [row[unit] for row in members],
            width,
            label=label_of(impl),
            color=colour if impl in COLOURS else "white",
            edgecolor=colour,
            hatch=None if impl in COLOURS else "///",
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_xlabel(axis)
    finish_panel(axes, unit, ceiling)


def finish_panel(axes, unit, ceiling):
    if ceiling:
        axes.axhline(ceiling, color="#888888", linestyle=":", linewidth=1.2, zorder=1)
        name = "matmul" if unit == "tflops" else "copy"
        axes.text(0.01, ceiling, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=8, color="#666666")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results, path):
    """Draws the rates of a result file: by length, one panel for each number of heads and head size; those of decode
    steps by shape, one panel for each kind of cache; those of packed sequences by heads, one panel for each pass."""
    rows = main_rows(results["rows"])
    steps = decode_rows(results["rows"])
    passes = passes_of(rows)
    panel_width = 3.4
    if steps:
        panels = {("decode", kind): [row for row in steps if row["cache"] == kind] for kind in caches_of(steps)}
        rows, passes = steps, ["decode"]
        draw_one = partial(draw_bars, group_of=step_label, axis="sequences x keys")
    elif results["header"]["benchmark"] == "varlen":
        panels = {(pass_, "packed sequences"): [row for row in rows if row["pass"] == pass_] for pass_ in passes}
        draw_one = partial(draw_bars, group_of=heads_label, axis=None)
        panel_width = 5.0
    else:
        panels, draw_one = panels_of(rows), draw_panel
    unit = rate_unit(rows)
    ceilings = results["header"].get("ceilings") or {}
    ceiling = ceilings.get("matmul_tflops" if unit == "tflops" else "copy_gbps")
    columns = min(PANELS_PER_LINE, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(max(6.5, panel_width * columns), 3.5 * lines + 1.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((pass_, title), members) in zip(grid.flat, panels.items(), strict=False):
        draw_one(axes, members, unit, ceiling)
        axes.set_title(f"{pass_}: {title}" if len(passes) > 1 else title, fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel(UNITS[unit])
    handles = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, columns + 1), frameon=False
    )
    header = results["header"]
    what = "Decoding, float8 caches by their own bytes" if steps else f"Causal attention {' and '.join(passes)}"
    figure.suptitle(f"{what}, {header['gpu'] or header['cpu']}", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_times(results, path):
    """Draws the time of the forward by length, of select-and-merge attention and of dense attention."""
    rows = [row for row in results["rows"] if row["pass"] in ("forward", "selection")]
    figure, axes = plt.subplots(figsize=(7.5, 5.0), layout="constrained")
    lines = {(row["impl"], row["pass"]): [] for row in sorted(rows, key=lambda row: order_of(row["impl"]))}
    for row in rows:
        lines[row["impl"], row["pass"]].append((row["seq_k"], row["ms"]))
    for (impl, pass_), points in lines.items():
        ours, selection = impl == "chunkattn", pass_ == "selection"
        label = "chunkattn (select-and-merge)" if ours else label_of(impl)
        axes.plot(
            *zip(*sorted(points), strict=True),
            label="of it selection" if selection else label,
            color=COLOURS.get(impl, "#555555"),
            marker=MARKERS.get(impl, "x"),
            linestyle="--" if selection else "-",
            markerfacecolor="white" if selection else None,
            linewidth=2.8 if ours and not selection else 1.6,
            zorder=3 if ours else 2,
        )
    lengths = sorted({row["seq_k"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [length_label(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    header = results["header"]
    axes.set_title(f"Forward, {configuration(rows[0])}, {header['gpu'] or header['cpu']}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown_table(header, lines):
    ruler = ["---" if index == 0 else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ruler, *lines])


def shape_label(row):
    return f"{configuration(row)}, {row['seq_k']:,} keys"


def rates_table(rows, unit):
    """Rates of every implementation by shape, with the first DCA setting."""
    impls = sorted({row["impl"] for row in rows}, key=order_of)
    by_shape = {}
    for row in main_rows(rows):
        by_shape.setdefault(shape_label(row), {})[row["impl"]] = row
    lines = []
    for shape, found in by_shape.items():
        settings = {f"{row['chunk_size']}:{row['local_size']}" for row in found.values() if row["chunk_size"]}
        rates = [number(found[impl][unit]) if impl in found else "-" for impl in impls]
        lines.append([shape, " ".join(sorted(settings)), *rates])
    return markdown_table([UNITS[unit], "s:w", *impls], lines)


def ratios_table(rows, unit):
    """How many times faster chunkattn is than each peer."""
    peers = [impl for impl in RATIO_PEERS if any(row["impl"] == impl for row in rows)]
    by_shape = {}
    for row in main_rows(rows):
        by_shape.setdefault(shape_label(row), {})[row["impl"]] = row[unit]
    lines = [
        [shape, *(f"{found['chunkattn'] / found[peer]:.2f}" if peer in found else "-" for peer in peers)]
        for shape, found in by_shape.items()
        if "chunkattn" in found
    ]
    return markdown_table(["chunkattn, times the rate of", *peers], lines)


def settings_table(rows, unit):
    """Rates with every DCA setting, and their share of the rate with a single chunk; None where only one was timed."""
    by_shape = {}
    for row in rows:
        if row["chunk_size"] and not row["impl"].startswith("composed-"):
            by_shape.setdefault((row["impl"], shape_label(row)), []).append(row)
    lines = []
    for (impl, shape), members in by_shape.items():
        single = [row[unit] for row in members if row["chunk_size"] - row["local_size"] >= row["seq_k"]]
        if len(members) < 2:
            continue
        for row in members:
            share = f"{row[unit] / single[0]:.1%}" if single else "-"
            lines.append([shape, impl, f"{row['chunk_size']}:{row['local_size']}", number(row[unit]), share])
    return markdown_table(["shape", "impl", "s:w", UNITS[unit], "of a single chunk"], lines) if lines else None


def decode_rows(rows):
    return [row for row in rows if row["pass"] == "decode"]


def caches_of(rows):
    return list(dict.fromkeys(row["cache"] for row in rows if row["cache"] != COMPLETE))


def step_label(row):
    return f"{row['batch']} x {length_label(row['seq_k'])}"


def find_row(rows, like, impl, cache):
    """The row of another implementation or kind of cache at the shape of `like`, or None."""
    found = [row for row in rows if common.row_shape(row) == common.row_shape(like) and row["impl"] == impl]
    return next((row for row in found if row["cache"] == cache), None)


def decode_table(rows, copy_gbps):
    """Rates of decode steps over every kind of cache, beside peers over the same kind."""
    peers = [impl for impl in RATIO_PEERS if any(row["impl"] == impl for row in rows)]
    header = ["GB/s, sequences x keys", "cache", "s:w", "chunkattn", "of a copy", *peers]
    header += [*(f"times {peer}" for peer in peers), "times bf16 tokens/s"]
    lines = []
    for row in rows:
        if row["impl"] != "chunkattn":
            continue
        # DCA is composed over the plain cache only. What peers read is always complete.
        kind = "rows" if row["cache"] == COMPLETE else row["cache"]
        found = [find_row(rows, row, peer, kind) for peer in peers]
        plain = find_row(rows, row, "chunkattn", "rows")
        line = [step_label(row), row["cache"], f"{row['chunk_size']}:{row['local_size']}", number(row["gbps"])]
        line.append(f"{row['gbps'] / copy_gbps:.1%}" if copy_gbps else "-")
        line += [number(peer["gbps"]) if peer else "-" for peer in found]
        line += [f"{peer['ms'] / row['ms']:.2f}" if peer else "-" for peer in found]
        line.append(f"{plain['ms'] / row['ms']:.2f}" if plain and row["cache"] == "float8" else "-")
        lines.append(line)
    return markdown_table(header, lines)


def steps_table(rows):
    """Microseconds of a step over a cache that takes no time to read."""
    impls = sorted({row["impl"] for row in rows}, key=order_of)
    by_shape = {}
    for row in rows:
        by_shape.setdefault(f"{row['seq_k']:,} keys", {})[row["impl"]] = row
    lines = [
        [shape, *(f"{found[impl]['ms'] * 1e3:.1f}" if impl in found else "-" for impl in impls)]
        for shape, found in by_shape.items()
    ]
    header = [f"us of a step, {rows[0]['steps_in_graph']} in a graph", *impls]
    return markdown_table(header, lines) if lines else None


def prefill_table(rows):
    """Milliseconds of a prompt read in chunks through the cache, beside one call of dca."""
    lines = []
    for row in rows:
        whole = find_row(rows, row, "chunkattn", None)
        how = f"chunks of {length_label(row['tokens'])}, {row['cache']}" if row["cache"] else "one call"
        share = f"{row['ms'] / whole['ms']:.3f}" if whole else "-"
        setting = f"{row['chunk_size']}:{row['local_size']}"
        lines.append([shape_label(row), setting, how, number(row["ms"]), number(row["tflops"]), share])
    return markdown_table(["prompt", "s:w", "read in", "ms", "TFLOP/s", "times one call"], lines)


def decode_section(results):
    copy_gbps = (results["header"].get("ceilings") or {}).get("copy_gbps")
    by_pass = {pass_: [row for row in results["rows"] if row["pass"] == pass_] for pass_ in passes_of(results["rows"])}
    tables = [decode_table(by_pass["decode"], copy_gbps)]
    tables += [
        make(by_pass[name]) for name, make in (("step", steps_table), ("prefill", prefill_table)) if name in by_pass
    ]
    return tables


def provenance(results):
    """Sentences that say where and how the numbers were measured, and what is missing."""
    header = results["header"]
    tree = header["git_tree"] or "unknown"
    tree = f"{tree[:12]}{' with changes' if header['dirty'] else ''}"
    machine = f"{header['gpu']}, driver {header['driver']}" if header["gpu"] else header["cpu"]
    cuda = f", CUDA {header['cuda']}" if header["gpu"] else f", {header['threads']} threads"
    versions = f"torch {header['torch']}{cuda}, chunkattn {header['chunkattn']}, source tree {tree}"
    text = f"{machine}, {versions}, {header['date'][:10]}."
    ceilings = header.get("ceilings")
    if ceilings:
        product = f"{number(ceilings['matmul_tflops'])} TFLOP/s ({ceilings['matmul']} matrix product)"
        text += f" Ceilings in the same run: {product}, {number(ceilings['copy_gbps'])} GB/s (copy, read + write)."
    missing = [f"{name} ({reason})" for name, reason in results.get("absent", {}).items()]
    if missing:
        text += f" Not measured: {'; '.join(missing)}."
    failures = [f"{failure['impl']} at {failure['shape']}: {failure['error']}" for failure in results.get("failed", [])]
    if failures:
        text += f" Failed: {'; '.join(failures)}."
    return text


def forward_table(rows):
    """Times of the forward by length: select-and-merge attention, the share of its selection, dense attention."""
    by_length = {}
    for row in rows:
        if row["pass"] in ("forward", "selection"):
            by_length.setdefault(row["seq_k"], {})[row["impl"], row["pass"]] = row["ms"]
    impls = {impl for found in by_length.values() for impl, _ in found if impl != "chunkattn"}
    dense = sorted(impls, key=order_of)
    lines = []
    for length, found in sorted(by_length.items()):
        ours, selection = (found.get(("chunkattn", pass_)) for pass_ in ("forward", "selection"))
        if ours is None:
            continue
        times = [found.get((impl, "forward")) for impl in dense]
        cells = [number(ours), f"{selection / ours:.1%}" if selection else "-"]
        cells += [number(time) if time else "-" for time in times]
        fastest = min(filter(None, times), default=None)
        lines.append([f"{length:,}", *cells, f"{fastest / ours:.2f}" if fastest else "-"])
    return markdown_table(["tokens", "ms", "of it selection", *(f"{i}, ms" for i in dense), "dense / ours"], lines)


def comparisons_table(rows):
    """What the parts of select-and-merge attention are measured against; None where nothing is."""
    found = {(row["pass"], row["impl"], common.row_shape(row)): row for row in rows}
    lines = []
    for (pass_, impl, shape), row in found.items():
        peers = [peer for p, peer, s in found if (p, s) == (pass_, shape) and peer != "chunkattn"]
        if impl != "chunkattn" or pass_ in ("forward", "selection"):
            continue
        for peer in sorted(peers, key=order_of):
            other = found[pass_, peer, shape]
            # A rate of executed FLOPs, or where both compute gradients of different attentions, a time.
            unit, ratio = ("TFLOP/s", row["tflops"] / other["tflops"])
            values = [row["tflops"], other["tflops"]]
            if pass_ == "training":
                unit, values, ratio = "ms", [row["ms"], other["ms"]], other["ms"] / row["ms"]
            lines.append([pass_, shape_label(row), peer, *(f"{number(v)} {unit}" for v in values), f"{ratio:.2f}"])
    lines += _longest_line(found)
    header = ["pass", "shape", "beside", "chunkattn", "the other", "times as fast"]
    return markdown_table(header, lines) if lines else None


def _longest_line(found):
    """The longest forward beside the longest dense one, whose time grows with the square of the length."""
    forwards = [(shape, impl, row["ms"]) for (pass_, impl, shape), row in found.items() if pass_ == "forward"]
    ours = max((f for f in forwards if f[1] == "chunkattn"), key=lambda f: f[0].seq_k, default=None)
    for peer in ("fa3", "cudnn", "fa2", "sdpa"):
        dense = max((f for f in forwards if f[1] == peer), key=lambda f: f[0].seq_k, default=None)
        if ours and dense and dense[0].seq_k < ours[0].seq_k:
            factor = (ours[0].seq_k // dense[0].seq_k) ** 2
            beside = f"{peer} at {dense[0].seq_k:,} x {factor}"
            times = [f"{number(ours[2])} ms", f"{number(dense[2])} ms x {factor}"]
            label = shape_label(found["forward", "chunkattn", ours[0]])
            return [["forward", label, beside, *times, f"{dense[2] * factor / ours[2]:.1f}"]]
    return []


def select_merge_section(results, image):
    rows = results["rows"]
    note = "Rates count executed FLOPs: fewer here than in dense attention and DCA."
    parts = [provenance(results), f"![ms by length]({image})", forward_table(rows), comparisons_table(rows), note]
    return "\n\n".join(filter(None, parts))


def section(results, image):
    rows = results["rows"]
    if decode_rows(rows):
        return "\n\n".join([provenance(results), f"![GB/s by shape]({image})", *decode_section(results)])
    unit = rate_unit(rows)
    parts = [provenance(results), f"![{UNITS[unit]} by length]({image})"]
    passes = passes_of(rows)
    for pass_ in passes:
        members = [row for row in rows if row["pass"] == pass_]
        heading = f"**{pass_.capitalize()}**" if len(passes) > 1 else None
        parts += [heading, rates_table(members, unit), ratios_table(members, unit), settings_table(members, unit)]
    return "\n\n".join(filter(None, parts))


def replace_section(page, name, text):
    """The page with the text between the markers of a section; a page without them gets them at its end."""
    begin, end = f"<!-- benchmark {name}: begin, generated -->", f"<!-- benchmark {name}: end -->"
    block = f"{begin}\n{text}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{block}\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has the marker {begin!r} but not {end!r} after it")
    return pattern.sub(lambda _: block, page, count=1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="result files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--images", type=Path, help="folder for the PNGs; default: images beside the page")
    options = parser.parse_args(argv)
    images = options.images or options.page.parent / "images"
    page = options.page.read_text() if options.page.is_file() else "# Performance\n"
    for file in options.files:
        results = common.read_results(file)
        if not results["rows"]:
            raise SystemExit(f"{file} has no rows")
        name = f"{file.resolve().parent.name}-{file.stem}"
        image = images / f"{name}.png"
        timed = results["header"]["benchmark"] == "select_merge"
        (draw_times if timed else draw)(results, image)
        text = (select_merge_section if timed else section)(results, os.path.relpath(image, options.page.parent))
        page = replace_section(page, name, text)
        print(f"{image} and the section {name} of {options.page}")
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
