"""The figures of the README, and of the prose between the generated tables, are those of the committed result files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h100"
CPU_RESULTS = RESULTS.parent / "cpu"


def readme() -> str:
    if not (ROOT / "README.md").exists() or not RESULTS.exists():
        pytest.skip("runs from the repository")
    return (ROOT / "README.md").read_text()


def table_below(header: str) -> dict[str, list[str]]:
    """The rows of the table whose first line begins with `header`, by their first cell."""
    lines = iter(readme().splitlines())
    assert any(line.startswith(header) for line in lines), f"README.md has no table {header!r}"
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def test_demo_table():
    rows = table_below("| trained on 512 bytes")
    measured = json.loads((RESULTS / "extend_context.json").read_text())["bits_per_byte"]
    assert rows == {name: [f"{value:.3f}" for value in values] for name, values in measured.items()}


def test_finetuning_table():
    rows = table_below("| fine-tuned on 2,048 bytes")
    measured = json.loads((CPU_RESULTS / "finetune_dca.json").read_text())
    scores = [[f"{value:.3f}" for value in measured["bits_per_byte"][when]] for when in ("before", "after")]
    assert rows == {"before": scores[0], f"after {measured['steps']} steps": scores[1]}


def test_select_merge_finetuning_table():
    rows = table_below("| adapters trained on 2,048 bytes")
    measured = json.loads((CPU_RESULTS / "finetune_select_merge.json").read_text())
    scores = [[f"{value:.3f}" for value in measured["bits_per_byte"][when]] for when in ("before", "after")]
    assert rows == {"before": scores[0], f"after {measured['steps']} steps": scores[1]}


def test_passkey_table():
    rows = table_below("| trained on up to 512 tokens")
    measured = json.loads((CPU_RESULTS / "passkey.json").read_text())
    assert measured["trained_length"] == 512
    accuracy = {key: [f"{100 * share(row):.0f}%" for row in measured["accuracy"]] for key, share in SHARES.items()}
    assert rows == accuracy


SHARES = {"found, mean of all depths": lambda row: sum(row) / len(row), "found, worst depth": min}


@pytest.mark.parametrize(
    ("results", "header", "columns"),
    [
        ("forward", "| | chunkattn DCA | FlashAttention-3", ("chunkattn", "fa3", "cudnn", "fa2", "composed-fa3")),
        (
            "backward",
            "| | chunkattn DCA | deterministic",
            ("chunkattn", "chunkattn-deterministic", "fa3", "cudnn", "fa2", "composed-fa3"),
        ),
    ],
)
def test_speed_tables(results, header, columns):
    rows = table_below(header)
    measured = {}
    for row in json.loads((RESULTS / f"{results}.json").read_text())["rows"]:
        kv_heads = "" if row["kv_heads"] == row["heads"] else f"/{row['kv_heads']}"
        shape = f"{row['seq_q'] // 1000 if row['seq_q'] > 99999 else row['seq_q'] // 1024}k"
        shape += f", {row['heads']}{kv_heads} heads, d {row['head_dim']}"
        # Of the settings of DCA the table shows the paper's, the first one measured.
        measured.setdefault((shape, row["impl"]), f"{row['tflops']:.0f}")
    assert rows == {shape: [measured[shape, impl] for impl in columns] for shape in rows}


def test_decode_table():
    rows = table_below("| sequences x keys | chunkattn DCA")
    measured = {}
    for row in json.loads((RESULTS / "decode.json").read_text())["rows"]:
        if row["pass"] == "decode":
            step = f"{row['batch']} x {row['seq_k'] // 1024}k"
            measured[step, row["impl"], row["cache"]] = f"{row['gbps']:.0f}"
    caches = [("chunkattn", cache) for cache in ("rows", "pages of 16", "float8")]
    caches += [("fa3", "rows"), ("fa3", "pages of 16"), ("composed-fa3", "rows")]
    assert rows == {step: [measured[step, impl, cache] for impl, cache in caches] for step, _, _ in measured}


def test_select_merge_table():
    rows = table_below("| tokens | chunkattn select-and-merge")
    measured = {}
    for row in json.loads((RESULTS / "select_merge.json").read_text())["rows"]:
        if row["kv_heads"] == 8:
            measured[f"{row['seq_k']:,}", row["pass"], row["impl"]] = row["ms"]
    assert rows
    for tokens, cells in rows.items():
        forward, dense = (measured.get((tokens, "forward", impl)) for impl in ("chunkattn", "fa3"))
        share = measured[tokens, "selection", "chunkattn"] / forward
        assert cells == [f"{forward:.3g}", f"{share:.1%}", f"{dense:.3g}" if dense else "-"]


def measured_rows(results, *keys, unit="ms"):
    """A result file's rows by the values of some of their keys: of each, what was measured."""
    rows = json.loads((RESULTS / f"{results}.json").read_text())["rows"]
    return {tuple(row.get(key) for key in keys): row[unit] for row in rows}


def test_speed_sentences():
    text = " ".join(readme().split())
    step = measured_rows("decode", "impl", "pass", "seq_k")
    packed = measured_rows("varlen", "impl", "pass", "kv_heads", "head_dim")
    together, one_by_one = (
        [packed[impl, pass_, 8, 128] for pass_ in ("forward", "forward+backward")]
        for impl in ("chunkattn", "chunkattn-alone")
    )
    rates = measured_rows("select_merge_flex", "impl", "seq_k", unit="tflops")
    listed, blocks = ([rates[impl, tokens] for tokens in (2**15, 2**17)] for impl in ("chunkattn", "flex"))
    steps = measured_rows("select_merge_decode", "impl", "batch", "seq_k")
    ours, dense = (
        [1e3 * steps[impl, 1, tokens] for tokens in (2**17, 2**20, 2**22)] for impl in ("select-merge", "dense")
    )
    tuning = measured_rows("finetune_32k", "impl")
    seconds = [tuning[impl,] / 1e3 for impl in ("chunkattn", "select-merge", "cudnn")]
    memory = max(measured_rows("finetune_32k", "impl", unit="peak_gib").values())
    sentences = [
        f"a cache of 100 keys takes {1e3 * step['chunkattn', 'step', 100]:.1f} us in a CUDA graph",
        f"FlashAttention-3's {1e3 * step['fa3', 'step', 100]:.1f}.",
        "take {:.1f} ms forward and {:.0f} ms with gradients".format(*together),
        "one after the other {:.1f} and {:.0f} ms".format(*one_by_one),
        "runs at {:.0f} and {:.0f} TFLOP/s of executed FLOPs over 32k and 131k tokens with 32 heads".format(*listed),
        "FlexAttention over as many keys in blocks of 128 at {:.0f} and {:.0f} (".format(*blocks),
        "takes {:.0f} us over 128k tokens, {:.0f} over 1M and {:.0f} over 4M".format(*ours),
        "a dense step takes {:.0f}, {:,.0f} and {:,.0f} us".format(*dense),
        "takes {:.2f} s with DCA, {:.2f} s with select-and-merge attention and {:.2f} s with cuDNN's".format(*seconds),
        f"all at {memory:.1f} GiB",
    ]
    assert [sentence for sentence in sentences if sentence not in text] == []


def test_shares_of_a_single_chunk():
    readme()
    rates = measured_rows("forward_regimes", "chunk_size", "local_size", unit="tflops")
    single = rates.pop((33280, 512))
    share = {f"{chunk}:{local}": f"{rate / single:.1%}" for (chunk, local), rate in rates.items()}
    assert share["3072:512"] == share["3584:512"]
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert f"3072:512 and 3584:512 run at {share['3072:512']} of a single chunk's rate, " in page
    assert f"3520:512 at {share['3520:512']} and 3008:512 at {share['3008:512']}, " in page


def test_backward_in_long_rounds():
    text = " ".join(readme().split())
    times = measured_rows("backward_32k", "impl")
    ratios = {impl: f"{times[impl,] / times['chunkattn',]:.2f}" for impl in ("fa3", "cudnn", "composed-fa3")}
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert f"at {ratios['fa3']} of FlashAttention-3's rate over 32,768 keys, {ratios['cudnn']} of cuDNN's" in page
    assert f"and {ratios['composed-fa3']} of DCA composed of FlashAttention-3's calls." in page
    fa3, calls = ratios["fa3"], ratios["composed-fa3"]
    assert f"the backward runs at {fa3} of FlashAttention-3's rate and {calls} of its calls'." in text
    memory = measured_rows("backward_32k", "impl", unit="workspace_mib")
    mib = [f"{memory[impl,]:,.0f}" for impl in ("chunkattn", "fa3", "composed-fa3")]
    assert "it takes {} MiB, FlashAttention-3 {} and its calls {}.".format(*mib) in text


def test_flex_attention():
    readme()
    rate = measured_rows("forward_flex", "impl", "seq_q", unit="tflops")
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    flex, cudnn, ours = (rate[impl, 16384] for impl in ("flex", "cudnn", "chunkattn"))
    assert f"dense causal attention at {flex:.0f} TFLOP/s over 16,384 keys" in page
    assert f"cuDNN's runs at {cudnn:.0f} and chunkattn's DCA at {ours:.0f} " in page
