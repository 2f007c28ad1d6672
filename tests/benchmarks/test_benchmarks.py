"""The benchmark scripts on the CPU: what they compute, write and refuse. No speed is asserted."""

import importlib
import itertools
import json
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch

import chunkattn
from chunkattn import reference, rope_table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]
common = importlib.import_module("common")
peers = importlib.import_module("peers")
benchmark_backward = importlib.import_module("benchmark_backward")
benchmark_decode = importlib.import_module("benchmark_decode")
benchmark_forward = importlib.import_module("benchmark_forward")
benchmark_select_merge = importlib.import_module("benchmark_select_merge")
benchmark_select_merge_decode = importlib.import_module("benchmark_select_merge_decode")
benchmark_varlen = importlib.import_module("benchmark_varlen")
gpu_session = importlib.import_module("gpu_session")
sanitize_sweep = importlib.import_module("sanitize_sweep")

ROW_FIELDS = {"impl", "pass", "batch", "heads", "kv_heads", "seq_q", "seq_k", "head_dim", "dtype", "chunk_size"}
ROW_FIELDS |= {"local_size", "ms", "ms_spread", "tflops", "max_error"}
HEADER_FIELDS = {"gpu", "driver", "torch", "cuda", "chunkattn", "git_tree", "dirty", "date", "ceilings"}


@pytest.fixture
def quick_ceilings(monkeypatch):
    ceilings = {"matmul_tflops": 0.1, "matmul": "1^3 float32", "copy_gbps": 1.0}
    monkeypatch.setattr(common, "measure_ceilings", lambda device, clock: ceilings)


def run_benchmark(benchmark, path, *arguments):
    quick = ["--device", "cpu", "--shape", "s150-h4/2-d16", "--seconds", "0", "--rounds", "2"]
    status = benchmark.main([*quick, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def run_forward(path, *arguments):
    return run_benchmark(benchmark_forward, path, *arguments)


def run_backward(path, *arguments):
    return run_benchmark(benchmark_backward, path, *arguments)


def run_varlen(path, *arguments):
    return run_benchmark(benchmark_varlen, path, "--shape", "b3-s96-h4/2-d16", "--dca", "64:16", *arguments)


class TestShape:
    @pytest.mark.parametrize("text", ["s8192-h32-d128", "s32768-h32/8-d128", "b2-s1/4096-h8-d64"])
    def test_round_trip(self, text):
        assert str(common.Shape.parse(text)) == text

    def test_k_is_1024(self):
        assert common.Shape.parse("s128k-h32/8-d128") == common.Shape(1, 32, 8, 131072, 131072, 128)

    @pytest.mark.parametrize("text", ["8k-h32-d128", "s8-h3/2-d64", "s16/8-h1-d64", ""])
    def test_refused(self, text):
        with pytest.raises(ValueError, match=f"got '{text}'"):
            common.Shape.parse(text)

    def test_causal_flops(self):
        shape = common.Shape.parse("b2-s1k-h3-d64")
        assert shape.flops() == 2 * 2 * 3 * 1024 * 1024 * 64
        assert shape.flops("backward") == 2.5 * shape.flops()
        assert common.Shape.parse("s1/4k-h1-d64").flops() == pytest.approx(4 * 64 * 4096, rel=1e-3)


class TestPackedShape:
    def test_lengths(self):
        lengths = benchmark_varlen.PackedShape.parse("b64-s8k-h32/8-d128").lengths
        assert len(lengths) == 64
        assert all(512 <= length <= 8192 for length in lengths)
        assert len(set(lengths)) > 50
        assert lengths == benchmark_varlen.PackedShape.parse("b64-s8k-h4-d64").lengths

    def test_flops(self):
        shape = benchmark_varlen.PackedShape.parse("b5-s1k-h3-d64")
        assert shape.flops() == sum(2 * 3 * length * length * 64 for length in shape.lengths)
        assert shape.flops("forward+backward") == 3.5 * shape.flops()


def test_one_chunk_holds_all_keys():
    assert common.DcaSetting.parse("one", 1000).stride == 1000
    with pytest.raises(ValueError, match="got '8:8'"):
        common.DcaSetting.parse("8:8", 1000)


@pytest.mark.parametrize("seq", [1, 48, 49, 97, 150])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(64, 16), (64, 1), (112, 64)])
def test_composed_dca_is_dca(seq, chunk_size, local_size):
    setting = common.DcaSetting(chunk_size, local_size)
    generator = torch.Generator().manual_seed(seq)
    q, k, v = (torch.randn(2, seq, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    cos, sin = rope_table(chunk_size, 16)
    out = peers.ComposedDca(peers.cpu_engine(), cos, sin, setting, seq)(q, k, v)
    expected = reference.dca(q, k, v, cos, sin, chunk_size=chunk_size, local_size=local_size)
    # The merge weighs by log-sum-exps, which torch's CPU attention gives in float32.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seq", [1, 48, 49, 97, 150])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(64, 16), (64, 1), (112, 64)])
def test_composed_gradients_are_those_of_dca(seq, chunk_size, local_size):
    setting = common.DcaSetting(chunk_size, local_size)
    generator = torch.Generator().manual_seed(seq)
    q, k, v, dout = (torch.randn(2, seq, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    cos, sin = rope_table(chunk_size, 16)
    composed = peers.ComposedDca(peers.cpu_engine(), cos, sin, setting, seq)
    grads = peers.ComposedGradients(composed, q, k, v, dout)()
    qkv = [x.requires_grad_() for x in (q, k, v)]
    out = reference.dca(*qkv, cos, sin, chunk_size=chunk_size, local_size=local_size)
    for grad, expected in zip(grads, torch.autograd.grad(out, qkv, dout), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5)


def test_fa2_backward_fits_the_schema_of_torch():
    engine = peers.fa2_engine()
    q = torch.empty(1, 300, 8, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 512, 8, 64, device="meta", dtype=torch.bfloat16)
    grads = engine.backward(q, q, k, k, *engine.with_lse(q, k, k, False), False)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("make", [peers.cudnn_engine, peers.fa2_engine])
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_engines_fit_the_schemas_of_torch(monkeypatch, make, causal):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    q = torch.empty(1, 300, 8, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 300 if causal else 512, 2, 64, device="meta", dtype=torch.bfloat16)
    out, lse = make().with_lse(q, k, k, causal)
    assert out.shape == q.shape
    assert lse.shape == (1, 8, 300)
    assert lse.dtype == torch.float32


def test_fa3_engine(monkeypatch, tmp_path):
    calls = []

    def fwd(q, k, v, *, is_causal):
        calls.append(is_causal)
        return q, q[..., 0].transpose(1, 2), None, None

    with pytest.raises(peers.Absent, match="--fa3"):
        peers.load_fa3(None)
    with pytest.raises(peers.Absent, match=r"does not hold libcudart\.so\.12"):
        peers.load_fa3(tmp_path)

    def bwd(dout, q, k, v, out, lse, *, is_causal):
        calls.append(is_causal)
        return q, k, v, None, None

    monkeypatch.setattr(peers, "load_fa3", lambda folder: types.SimpleNamespace(fwd=fwd, bwd=bwd))
    engine = peers.fa3_engine(tmp_path)
    q = torch.zeros(1, 8, 2, 4)
    assert engine.causal(q, q, q).shape == q.shape
    assert engine.with_lse(q, q, q, False)[1].shape == (1, 2, 8)
    assert len(engine.backward(q, q, q, q, q, q[..., 0].transpose(1, 2), True)) == 3
    assert calls == [True, False, True]


def test_portable_kernel_is_given_back(monkeypatch):
    forced = []
    monkeypatch.setattr(torch.ops.chunkattn, "force_kernel", forced.append, raising=False)
    with pytest.raises(RuntimeError), peers.portable_kernel():
        raise RuntimeError
    assert forced == ["portable", "auto"]


def test_every_round_has_an_order_of_its_own():
    order = []
    functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = common.time_interleaved(functions, common.CpuClock(), rounds=12, fewest_rounds=12, seconds=0)
    assert order[:6] == list("aabbcc")
    rounds = ["".join(order[begin : begin + 3]) for begin in range(6, len(order), 3)]
    assert len(rounds) == 12
    assert all(sorted(names) == list("abc") for names in rounds)
    assert {names[0] for names in rounds} == {names[-1] for names in rounds} == set("abc")
    assert all(len(timing.samples) == 12 for timing in timings.values())


def test_slow_functions_have_fewer_rounds():
    functions = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}
    timings = common.time_interleaved(functions, common.CpuClock(), rounds=50, fewest_rounds=2, seconds=0.03)
    assert 2 <= len(timings["slow"].samples) <= 3
    assert len(timings["fast"].samples) >= len(timings["slow"].samples)


def test_timing():
    timing = common.Timing(tuple(range(101)))
    assert (timing.ms, timing.spread) == (50, 80)


def test_cuda_clock(monkeypatch):
    ticks = itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(ticks)

        def elapsed_time(self, end):
            return end.at - self.at

    properties = types.SimpleNamespace(L2_cache_size=64)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    clock = common.CudaClock("cpu")
    assert clock.buffer.numel() * clock.buffer.element_size() == 4 * 64
    assert clock(lambda: next(ticks), 3) == [2, 2, 2]


def test_ceilings():
    ceilings = common.measure_ceilings("cpu", common.CpuClock(), repeats=1)
    assert ceilings["matmul_tflops"] > 0
    assert ceilings["copy_gbps"] > 0


def test_source_tree(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("CHUNKATTN_GIT_TREE", raising=False)
    assert common.git_tree() == (None, None)
    (tmp_path / ".git_tree").write_text("abc\n")
    assert common.git_tree() == ("abc", False)
    monkeypatch.setenv("CHUNKATTN_GIT_TREE", "def-dirty")
    assert common.git_tree() == ("def", True)


@pytest.mark.usefixtures("quick_ceilings")
class TestForward:
    def test_results(self, tmp_path, capsys):
        status, results = run_forward(tmp_path / "forward.json", "--dca", "64:16", "one")
        assert status == 0
        assert results["header"].keys() >= HEADER_FIELDS
        rows = [(row["impl"], row["chunk_size"], row["local_size"]) for row in results["rows"]]
        assert rows == [
            ("sdpa", None, None),
            ("composed-sdpa", 64, 16),
            ("chunkattn", 64, 16),
            ("chunkattn", 662, 512),
        ]
        for row in results["rows"]:
            assert row.keys() >= ROW_FIELDS
            assert 0 < row["max_error"] < 0.02
        assert {"fa3", "cudnn", "fa2", "flex", "composed-fa3", "chunkattn-portable"} <= results["absent"].keys()
        assert "absent: fa3" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda out: out[:, -1].add_(0.1), "output is wrong"),
            (lambda out: out[:, 70].fill_(torch.nan), "not written"),
        ],
    )
    def test_wrong_output_is_not_timed(self, monkeypatch, tmp_path, spoil, message):
        correct = peers.chunkattn_call

        def make_call(*arguments):
            def call():
                out = correct(*arguments)()
                spoil(out)
                return out

            return call

        monkeypatch.setattr(peers, "chunkattn_call", make_call)
        status, results = run_forward(tmp_path / "forward.json", "--dca", "64:16")
        assert status == 1
        assert [row["impl"] for row in results["rows"]] == ["sdpa", "composed-sdpa"]
        assert [failure["impl"] for failure in results["failed"]] == ["chunkattn"]
        assert message in results["failed"][0]["error"]

    def test_broken_peer_does_not_stop_the_others(self, monkeypatch, tmp_path):
        def broken(q, k, v):
            raise RuntimeError("no kernel\nfor this shape")

        engine = peers.Engine(broken, peers.cpu_engine().with_lse)
        monkeypatch.setattr(peers, "cpu_engine", lambda: engine)
        status, results = run_forward(tmp_path / "forward.json", "--dca", "64:16")
        assert status == 0
        assert [row["impl"] for row in results["rows"]] == ["composed-sdpa", "chunkattn"]
        assert results["failed"][0]["error"] == "RuntimeError: no kernel"

    def test_time_limit(self, tmp_path):
        status, results = run_forward(tmp_path / "forward.json", "--time-limit", "1e-9")
        assert status == 1
        assert "time limit" in results["failed"][0]["error"]

    def test_once_times_nothing(self, tmp_path):
        status, results = run_forward(tmp_path / "forward.json", "--once", "--impls", "chunkattn")
        assert (status, results["rows"]) == (0, [])


@pytest.mark.usefixtures("quick_ceilings")
class TestVarlen:
    def test_results(self, tmp_path):
        status, results = run_varlen(tmp_path / "varlen.json")
        assert status == 0
        assert results["header"]["benchmark"] == "varlen"
        impls = ("chunkattn", "chunkattn-alone", "chunkattn-longest")
        passes = ("forward", "forward+backward")
        assert [(row["pass"], row["impl"]) for row in results["rows"]] == [(p, impl) for p in passes for impl in impls]
        for row in results["rows"]:
            assert row.keys() >= ROW_FIELDS
            assert 0 < row["max_error"] < 0.2
            assert row["batch"] == (1 if row["impl"] == "chunkattn-longest" else 3)
        assert {"fa3", "chunkattn-portable"} <= results["absent"].keys()

    def test_wrong_output_is_not_timed(self, monkeypatch, tmp_path):
        correct = peers.chunkattn_step

        def spoiled(name, *arguments):
            def call():
                results = correct(name, *arguments)()
                if name == "dca_varlen":
                    results[0][-1] += 0.5
                return results

            return call

        monkeypatch.setattr(peers, "chunkattn_step", spoiled)
        status, results = run_varlen(tmp_path / "varlen.json", "--impls", "chunkattn", "chunkattn-alone")
        assert status == 1
        assert {row["impl"] for row in results["rows"]} == {"chunkattn-alone"}
        assert [failure["error"].partition(":")[0] for failure in results["failed"]] == [
            "output is wrong",
            "dq is wrong",
        ]

    def test_packed_fa3(self):
        called = []

        def fwd(*tensors, **keywords):
            called.append((tensors, keywords))
            return "out", "lse", None, None

        def bwd(*tensors, **keywords):
            called.append((tensors, keywords))
            return "dq", "dk", "dv", None

        ops = types.SimpleNamespace(fwd=fwd, bwd=bwd)
        packing = {"cu_seqlens_q": 1, "max_seqlen_q": 2}
        assert peers.packed_fa3_call(ops, "q", "k", "v", "dout", packing, False)() == ("out",)
        assert peers.packed_fa3_call(ops, "q", "k", "v", "dout", packing, True)() == ("dq", "dk", "dv")
        keywords = packing | {"is_causal": True}
        assert called[-1] == (("dout", "q", "k", "v", "out", "lse"), keywords)
        assert called[0] == (("q", "k", "v"), keywords)


@pytest.mark.usefixtures("quick_ceilings")
class TestBackward:
    def test_results(self, tmp_path):
        status, results = run_backward(tmp_path / "backward.json", "--dca", "64:16", "one")
        assert status == 0
        rows = [(row["impl"], row["pass"], row["chunk_size"], row["local_size"]) for row in results["rows"]]
        assert rows == [
            ("sdpa", "backward", None, None),
            ("composed-sdpa", "backward", 64, 16),
            ("chunkattn", "backward", 64, 16),
            ("chunkattn", "backward", 662, 512),
        ]
        for row in results["rows"]:
            assert row.keys() >= ROW_FIELDS
            assert 0 < row["max_error"] < 0.2
        assert {"fa3", "cudnn", "fa2", "flex", "composed-fa3", "chunkattn-portable"} <= results["absent"].keys()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda dq, dk, dv: dq[:, 70].mul_(1.5), "dq is wrong"),
            (lambda dq, dk, dv: dk[:, :40].add_(0.5), "dk is wrong"),
            (lambda dq, dk, dv: dv[:, 149].mul_(2), "dv is wrong"),
            (lambda dq, dk, dv: dk[:, 3].fill_(torch.nan), "dk has elements that are not finite"),
        ],
    )
    def test_wrong_gradients_are_not_timed(self, monkeypatch, tmp_path, spoil, message):
        correct = peers.chunkattn_gradients

        def make_gradients(*arguments, **options):
            def call():
                grads = correct(*arguments, **options)()
                spoil(*grads)
                return grads

            return call

        monkeypatch.setattr(peers, "chunkattn_gradients", make_gradients)
        status, results = run_backward(tmp_path / "backward.json", "--dca", "64:16", "--dtype", "float32")
        assert status == 1
        assert [row["impl"] for row in results["rows"]] == ["sdpa", "composed-sdpa"]
        assert [failure["impl"] for failure in results["failed"]] == ["chunkattn"]
        assert message in results["failed"][0]["error"]


@pytest.mark.usefixtures("quick_ceilings")
class TestSelectMergeDecode:
    def run(self, path, *arguments):
        quick = [
            "--device",
            "cpu",
            "--region-size",
            "4",
            "--top-k",
            "5",
            "--merge",
            "6",
            "--rounds",
            "2",
            "--seconds",
            "0",
        ]
        status = benchmark_select_merge_decode.main([*quick, "--json", str(path), *arguments])
        return status, json.loads(path.read_text())

    def test_results(self, tmp_path, quick_ceilings):
        status, results = self.run(tmp_path / "decode.json", "--shape", "s1/250-h4/2-d16", "b2-s1/100-h2-d8")
        assert status == 0
        assert results["failed"] == []
        assert [row["impl"] for row in results["rows"]] == 2 * benchmark_select_merge_decode.IMPLS
        for row in results["rows"]:
            assert row["pass"] == "decode"
            assert row["gbps"] > 0
            if row["impl"] != "dense":
                assert 0 < row["max_error"] < 1e-5
                assert (row["region_size"], row["top_k"], row["merge"]) == (4, 5, 6)

    def test_wrong_steps_are_not_timed(self, tmp_path, quick_ceilings, monkeypatch):
        attend = chunkattn.SelectMergeCache.attend
        monkeypatch.setattr(chunkattn.SelectMergeCache, "attend", lambda self, *rows: attend(self, *rows) + 0.01)
        status, results = self.run(tmp_path / "decode.json", "--shape", "s1/250-h4/2-d16")
        assert status == 1
        assert results["rows"] == []
        assert "output is off by 0.01" in results["failed"][0]["error"]

    def test_time_limit(self, tmp_path, quick_ceilings):
        shapes = ["s1/250-h4/2-d16", "b2-s1/100-h2-d8"]
        status, results = self.run(tmp_path / "decode.json", "--time-limit", "1e-9", "--shape", *shapes)
        assert status == 1
        assert [failure["error"] for failure in results["failed"]] == 2 * ["not run: the time limit was reached"]

    def test_refuses_prompts(self, tmp_path):
        with pytest.raises(SystemExit, match="takes shapes with one query"):
            self.run(tmp_path / "decode.json", "--shape", "s10-h2-d8")


class TestDecode:
    def run(self, path, *arguments):
        quick = ["--device", "cpu", "--dca", "96:32", "--seconds", "0", "--rounds", "2", "--prefill-chunk", "60"]
        status = benchmark_decode.main([*quick, "--json", str(path), *arguments])
        return status, json.loads(path.read_text())

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_results(self, tmp_path, dtype):
        shapes = ["b2-s1/256-h4/2-d16", "s1/100-h4/2-d16", "s160-h4/2-d16"]
        status, results = self.run(tmp_path / "decode.json", "--dtype", dtype, "--shape", *shapes)
        assert results["failed"] == []
        assert status == 0
        rows = [(row["pass"], row["impl"], row["cache"], row["chunk_size"]) for row in results["rows"]]
        paged = [f"pages of {size}" for size in (16, 64, 128)]
        assert rows == [
            *(("decode", "chunkattn", cache, 96) for cache in ("rows", *paged, "float8")),
            *(("decode", "sdpa", cache, None) for cache in ("rows", *paged)),
            ("decode", "composed-sdpa", "rows", 96),
            ("step", "chunkattn", "rows", 96),
            ("step", "sdpa", "rows", None),
            ("prefill", "chunkattn", None, 96),
            ("prefill", "chunkattn", "rows", 96),
            ("prefill", "chunkattn", "pages of 16", 96),
        ]
        assert results["rows"][4]["gbps"] > 0
        assert results["rows"][10]["steps_in_graph"] == benchmark_decode.STEPS
        for row in results["rows"]:
            assert 0 < row["max_error"] < 0.02
        assert {"fa3", "composed-fa3"} == results["absent"].keys()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda out, cache: out[-1, :, -1].mul_(1.1), "output is wrong"),
            (lambda out, cache: out[0, :, 0].fill_(torch.nan), "not written"),
            (lambda out, cache: cache.k[0, cache.length - 1, 0].mul_(1.1), "the appended token is wrong"),
            (lambda out, cache: cache.v[-1, cache.length - 1, -1].neg_(), "the appended token is wrong"),
        ],
    )
    def test_wrong_steps_are_not_timed(self, monkeypatch, tmp_path, spoil, message):
        correct = benchmark_decode.dca_step

        def step(q, cache, *arguments):
            out = correct(q, cache, *arguments)
            if cache.name == "rows":
                spoil(out, cache)
            return out

        monkeypatch.setattr(benchmark_decode, "dca_step", step)
        arguments = ["--shape", "b2-s1/256-h4/2-d16", "--dtype", "float32", "--impls", "chunkattn"]
        status, results = self.run(tmp_path / "decode.json", *arguments)
        assert status == 1
        assert [row["cache"] for row in results["rows"]] == ["pages of 16", "pages of 64", "pages of 128", "float8"]
        assert message in results["failed"][0]["error"]

    def test_refused_shapes(self):
        with pytest.raises(SystemExit, match="one query or as many queries as keys"):
            benchmark_decode.main(["--device", "cpu", "--shape", "s2/256-h4/2-d16"])
        with pytest.raises(SystemExit, match="takes shapes with as many queries as keys"):
            benchmark_forward.main(["--device", "cpu", "--shape", "s1/256-h4/2-d16"])


class TestSelectMerge:
    @pytest.fixture(autouse=True)
    def small_lists(self, monkeypatch):
        """Groups of 16 tokens, of which the third and later ones choose."""
        monkeypatch.setattr(benchmark_select_merge.SelectMerge, "lists", benchmark_select_merge.Lists(4, 6, 4))

    def run(self, path, *arguments):
        return run_benchmark(benchmark_select_merge, path, "--pass", *benchmark_select_merge.PASSES, *arguments)

    def test_results(self, tmp_path):
        status, results = self.run(tmp_path / "select_merge.json", "--dtype", "float32")
        assert (status, results["failed"]) == (0, [])
        assert results["header"].keys() >= HEADER_FIELDS
        assert [(row["pass"], row["impl"]) for row in results["rows"]] == [
            ("forward", "sdpa"),
            ("forward", "chunkattn"),
            ("selection", "chunkattn"),
            ("attention", "chunkattn-dca"),
            ("attention", "chunkattn"),
            ("backward", "chunkattn-dca"),
            ("backward", "chunkattn"),
            ("training", "sdpa"),
            ("training", "chunkattn"),
        ]
        for row in results["rows"]:
            assert row.keys() >= ROW_FIELDS
            assert row["pass"] == "selection" or 0 < row["max_error"] < 1e-3

    def test_executed_flops(self):
        lists, shape = benchmark_select_merge.Lists(4, 6, 4), common.Shape.parse("s40-h4/2-d16")
        # Groups of 16, 16 and 8 tokens attend to 0, 4 and 6 regions before them.
        pairs = 2 * 16 * 17 / 2 + 16 * 16 + 8 * 9 / 2 + 8 * 24
        assert lists.flops(shape, "attention") == 4 * 4 * 16 * pairs
        assert lists.flops(shape, "training") == 3.5 * lists.flops(shape, "forward")
        assert lists.flops(shape, "selection") == 2 * 16 * 10**2

    @pytest.mark.parametrize(
        ("operator", "spoil", "failures"),
        [
            # What attends to lists that it selects itself then differs from the lists that were asked for.
            ("select", lambda ids: ids[..., -1, 2].fill_(1), ["forward", "selection", "training"]),
            ("select_merge", lambda out: out[:, -1].add_(0.1), ["forward", "attention", "training"]),
        ],
    )
    def test_wrong_results_are_not_timed(self, monkeypatch, tmp_path, operator, spoil, failures):
        correct = getattr(chunkattn, operator)

        def wrong(*tensors, **options):
            result = correct(*tensors, **options)
            spoil(result)
            return result

        monkeypatch.setattr(chunkattn, operator, wrong)
        status, results = self.run(tmp_path / "select_merge.json", "--dtype", "float32")
        assert status == 1
        assert {failure["impl"] for failure in results["failed"]} == {"chunkattn"}
        assert [failure["pass"] for failure in results["failed"]] == failures

    def test_without_a_backward(self, monkeypatch, tmp_path):
        monkeypatch.setattr(benchmark_select_merge._ops, "has_kernels", lambda name, _: name != "select_merge_backward")
        status, results = self.run(tmp_path / "select_merge.json")
        assert status == 0
        assert {row["pass"] for row in results["rows"]} == {"forward", "selection", "attention"}
        assert "select_merge_backward" in results["absent"]["gradients"]

    def test_flex_attends_to_as_much(self, monkeypatch):
        shape, lists = common.Shape.parse("s4096-h2/1-d16", "float32"), benchmark_select_merge.Lists(16, 64, 32)
        q, k, v = shape.random_inputs("cpu")
        indices = chunkattn.select(q, k, **lists.options())
        seen = []

        def attend(q, k, v, *, block_mask, **_):
            seen.append(block_mask)
            return q

        flex = importlib.import_module("torch.nn.attention.flex_attention")
        monkeypatch.setattr(flex, "flex_attention", attend)
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        assert peers.flex_regions(q, k, v, indices, lists)().shape == q.shape
        (mask,) = seen
        pairs = mask.full_kv_num_blocks.sum() * 128 * 128 + mask.kv_num_blocks.sum() * 128 * 129 / 2
        assert 4 * 16 * pairs == lists.flops(shape, "attention")


class TestFinetune:
    @pytest.fixture
    def finetune(self):
        pytest.importorskip("transformers", minversion="5")
        pytest.importorskip("peft")
        return importlib.import_module("benchmark_finetune")

    def run(self, finetune, path, *arguments):
        quick = ["--device", "cpu", "--shape", "tiny", "--rounds", "3"]
        status = finetune.main([*quick, "--json", str(path), *arguments])
        return status, json.loads(path.read_text())

    def test_results(self, finetune, tmp_path, capsys):
        status, results = self.run(finetune, tmp_path / "finetune.json", "--tokens", "40", "150")
        assert status == 0
        assert results["header"].keys() >= HEADER_FIELDS
        assert results["header"]["trained_parameters"] == 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32))
        names = ("impl", "tokens", "chunk_size", "local_size", "region_size", "top_k", "merge")
        dense = [None] * 5
        assert [[row[name] for name in names] for row in results["rows"]] == [
            [impl, tokens, *setting]
            for tokens in (40, 150)
            for impl, setting in (
                ("chunkattn", [64, 16, None, None, None]),
                ("select-merge", [None, None, 4, 6, 4]),
                ("sdpa", dense),
            )
        ]
        for row in results["rows"]:
            assert row["ms"] > 0
            assert row["steps"] == 3
        ours, _, dense = (row["loss"] for row in results["rows"][:3])
        assert ours == pytest.approx(dense, abs=0.01), "one chunk is causal attention"
        assert {"cudnn", "fa2"} <= results["absent"].keys()
        assert "absent: cudnn" in capsys.readouterr().out

    def test_every_weight_is_of_the_benchmarks_dtype(self, finetune):
        model = finetune.make_model("tiny", "cpu", 8)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}

    def test_implementations_are_what_runs(self, monkeypatch, finetune):
        calls = []
        real = {
            "chunkattn": chunkattn.dca,
            "select-merge": chunkattn.select_merge,
            "sdpa": torch.nn.functional.scaled_dot_product_attention,
        }

        def record(name):
            return lambda *arguments, **options: calls.append((name, options)) or real[name](*arguments, **options)

        monkeypatch.setattr(chunkattn, "dca", record("chunkattn"))
        monkeypatch.setattr(chunkattn, "select_merge", record("select-merge"))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record("sdpa"))
        benchmark = finetune.Finetune(finetune.parse_arguments(["--device", "cpu"]))
        tokens = torch.randint(128, (1, 101))
        for name in ("chunkattn", "sdpa", "select-merge", "chunkattn"):
            before = [weight.detach().clone() for weight in benchmark.optimizer.param_groups[0]["params"]]
            benchmark.step(name, tokens)
            # Two layers, each once in the forward and once more in the backward.
            assert [call for call, _ in calls] == [name] * 4
            if name == "sdpa":
                assert all(options["is_causal"] and options["attn_mask"] is None for _, options in calls)
            if name == "select-merge":
                assert all(options.items() >= vars(benchmark.select_merge).items() for _, options in calls)
            calls.clear()
            after = benchmark.optimizer.param_groups[0]["params"]
            assert any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))

    def test_broken_implementation_does_not_stop_the_others(self, monkeypatch, finetune, tmp_path):
        def broken(*arguments, **options):
            raise RuntimeError("no kernel\nfor this shape")

        monkeypatch.setattr(chunkattn, "dca", broken)
        status, results = self.run(finetune, tmp_path / "finetune.json")
        assert status == 1
        assert [row["impl"] for row in results["rows"]] == ["select-merge", "sdpa"]
        assert results["failed"] == [{"impl": "chunkattn", "tokens": 150, "error": "RuntimeError: no kernel"}]

    def test_time_limit(self, finetune, tmp_path):
        status, results = self.run(finetune, tmp_path / "finetune.json", "--time-limit", "1e-9")
        assert status == 1
        assert results["failed"][0]["error"] == "not run: the time limit was reached"

    def test_bad_argument(self, finetune, capsys):
        with pytest.raises(SystemExit):
            finetune.parse_arguments(["--rounds", "0"])
        assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
        for text in ("16:384", "16:0:128", "a:b:c"):
            with pytest.raises(SystemExit):
                finetune.parse_arguments(["--select-merge", text])
            assert "--select-merge must be REGION:TOP_K:MERGE, three positive integers" in capsys.readouterr().err


class TestPlot:
    @pytest.fixture
    def results(self, tmp_path):
        rows = []
        timing = common.Timing((1.0, 1.1))
        for text in ("s8k-h32-d128", "s16k-h32-d128", "s32k-h32/8-d128"):
            shape = common.Shape.parse(text)
            rows.append(common.make_row("fa3", "forward", shape, timing))
            for impl, setting in (("composed-fa3", "3072:512"), ("chunkattn", "3072:512"), ("chunkattn", "one")):
                setting = common.DcaSetting.parse(setting, shape.seq_k)
                rows.append(common.make_row(impl, "forward", shape, timing, setting=setting, max_error=0.01))
        path = tmp_path / "h100" / "forward.json"
        common.write_results(path, common.make_header("forward", "cpu"), rows, {"cudnn": "not here"})
        return path

    def test_page_and_image(self, results, tmp_path):
        plot = importlib.import_module("plot")
        page = tmp_path / "docs" / "performance.md"
        page.parent.mkdir()
        page.write_text("# Speed\n\nBy hand.\n")
        for _ in range(2):
            assert plot.main([str(results), "--page", str(page)]) == 0
        text = page.read_text()
        assert text.startswith("# Speed\n\nBy hand.\n")
        assert text.count("benchmark h100-forward: begin") == 1
        assert "| 32/8 heads, d 128, bf16, 32,768 keys | 3072:512 |" in text
        assert "cudnn (not here)" in text
        assert "100.0%" in text
        image = tmp_path / "docs" / "images" / "h100-forward.png"
        assert image.read_bytes().startswith(b"\x89PNG")

    def test_backward(self, tmp_path):
        plot = importlib.import_module("plot")
        shape, setting = common.Shape.parse("s8k-h32-d128"), common.DcaSetting(3072, 512)
        rows = [
            common.make_row(impl, "backward", shape, common.Timing((1.0,)), setting=setting)
            for impl in ("chunkattn", "chunkattn-deterministic", "chunkattn-portable", "composed-fa3")
        ]
        path = tmp_path / "h100" / "backward.json"
        common.write_results(path, common.make_header("backward", "cpu"), rows)
        page = tmp_path / "performance.md"
        assert plot.main([str(path), "--page", str(page)]) == 0
        assert "| chunkattn | chunkattn-deterministic | chunkattn-portable | composed-fa3 |" in page.read_text()
        assert (tmp_path / "images" / "h100-backward.png").is_file()

    def test_decode(self, tmp_path):
        plot = importlib.import_module("plot")
        setting = common.DcaSetting(3072, 512)
        step, prompt = (common.Shape.parse(text) for text in ("b16-s1/32k-h32/8-d128", "s128k-h32/8-d128"))

        def row(impl, pass_, shape, cache, ms, **extra):
            timing = common.Timing((ms,))
            if pass_ != "prefill":
                extra["bytes_moved"] = 10**9
            return common.make_row(impl, pass_, shape, timing, setting=setting, cache=cache, **extra)

        rows = [
            row("chunkattn", "decode", step, "rows", 1.0),
            row("chunkattn", "decode", step, "float8", 0.5),
            row("fa3", "decode", step, "rows", 1.1),
            row("composed-fa3", "decode", step, "rows", 1.25),
            row("chunkattn", "step", step, "rows", 0.0083, steps_in_graph=50),
            row("chunkattn", "prefill", prompt, None, 200.0),
            row("chunkattn", "prefill", prompt, "rows", 210.0, tokens=8192),
        ]
        header = common.make_header("decode", "cpu", {"matmul_tflops": 1, "matmul": "1^3", "copy_gbps": 1250})
        path = tmp_path / "h100" / "decode.json"
        common.write_results(path, header, rows)
        page = tmp_path / "performance.md"
        assert plot.main([str(path), "--page", str(page)]) == 0
        text = page.read_text()
        assert "| 16 x 32k | rows | 3072:512 | 1000 | 80.0% | 909 | 800 | 1.10 | 1.25 | - |" in text
        assert "| 16 x 32k | float8 | 3072:512 | 2000 | 160.0% | - | - | - | - | 2.00 |" in text
        assert "| 32,768 keys | 8.3 |" in text
        assert "chunks of 8k, rows | 210 |" in text
        assert "| 1.050 |" in text
        assert (tmp_path / "images" / "h100-decode.png").is_file()

    def test_select_merge(self, tmp_path):
        plot = importlib.import_module("plot")
        shape, setting = common.Shape.parse("s32k-h32-d128"), common.DcaSetting(3072, 512)

        def row(impl, pass_, ms, text=None, **options):
            at = common.Shape.parse(text) if text else shape
            return common.make_row(impl, pass_, at, common.Timing((ms,)), **options)

        rows = [
            row("chunkattn-dca", "attention", 10.0, setting=setting),
            row("chunkattn", "attention", 5.0, flops=4e12),
        ]
        rows += [row("fa3", "training", 50.0, flops=1e13), row("chunkattn", "training", 20.0, flops=5e12)]
        for text, ms in (("s8k-h32/8-d128", 1.0), ("s1024k-h32/8-d128", 200.0)):
            rows += [
                row("chunkattn", "selection", ms / 10, text, flops=1e9),
                row("chunkattn", "forward", ms, text, flops=1e9),
            ]
        rows.append(row("fa3", "forward", 2.0, "s8k-h32/8-d128"))
        path = tmp_path / "h100" / "select_merge.json"
        common.write_results(path, common.make_header("select_merge", "cpu"), rows)
        page = tmp_path / "performance.md"
        assert plot.main([str(path), "--page", str(page)]) == 0
        text = page.read_text()
        assert "| 8,192 | 1 | 10.0% | 2 | 2.00 |" in text
        assert "| 1,048,576 | 200 | 10.0% | - | - |" in text
        assert "| training | 32 heads, d 128, bf16, 32,768 keys | fa3 | 20 ms | 50 ms | 2.50 |" in text
        assert "| fa3 at 8,192 x 16384 | 200 ms | 2 ms x 16384 | 163.8 |" in text
        assert (tmp_path / "images" / "h100-select_merge.png").is_file()

    def test_missing_end_marker(self):
        plot = importlib.import_module("plot")
        page = plot.replace_section("", "x", "text").replace("<!-- benchmark x: end -->", "")
        with pytest.raises(ValueError, match="begin, generated"):
            plot.replace_section(page, "x", "text")


class TestGpuSession:
    @pytest.fixture
    def fake_tool(self, tmp_path):
        """Stands for compute-sanitizer and ncu: fails when told to check for races, otherwise does nothing."""
        tool = tmp_path / "tool"
        tool.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *racecheck*) exit 9;; esac\n')
        tool.chmod(0o755)
        return str(tool)

    @pytest.fixture(autouse=True)
    def quick_description(self, monkeypatch):
        monkeypatch.setattr(gpu_session, "describe_package", lambda environment: ("chunkattn", ""))

    def run(self, tmp_path, *arguments):
        output = tmp_path / "output"
        status = gpu_session.main(["--output", str(output), *arguments])
        summary = json.loads((output / "summary.json").read_text())
        return status, {stage["stage"]: stage for stage in summary["stages"]}, output

    def test_stages(self, monkeypatch, tmp_path, fake_tool):
        monkeypatch.setattr(gpu_session, "find_tool", lambda name, *patterns: fake_tool)
        arguments = ["--stages", "pytest", "sanitizer", "ncu", "--pytest-args=--version"]
        status, stages, output = self.run(tmp_path, *arguments, "--sanitizer-tools", "racecheck,memcheck")
        assert status == 1
        assert {name: stage["status"] for name, stage in stages.items()} == {
            "pytest": "passed",
            "sanitizer": "failed",
            "ncu": "passed",
        }
        log = (output / "sanitizer.log").read_text()
        assert "--tool memcheck --report-api-errors no" in log, "a failed tool must not stop the next one"

    def test_stage_without_its_tool_fails(self, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu_session, "find_tool", lambda name, *patterns: None)
        status, stages, _ = self.run(tmp_path, "--stages", "sanitizer")
        assert status == 1
        assert stages["sanitizer"]["detail"] == "compute-sanitizer was not found"

    @pytest.mark.parametrize("stage", ["forward", "backward", "varlen", "decode", "select_merge"])
    def test_benchmark_stage(self, monkeypatch, tmp_path, stage):
        run = []
        monkeypatch.setattr(gpu_session, "run_limited", lambda command, *_: run.append(list(map(str, command))) or 0)
        further = f"--{stage.replace('_', '-')}-args=--flex"
        status, stages, output = self.run(tmp_path, "--stages", stage, further, "--fa3", "fa3")
        assert (status, stages[stage]["status"]) == (0, "passed")
        ((_, script, *arguments),) = run
        assert script == f"benchmarks/benchmark_{stage}.py"
        assert arguments[:2] == ["--json", str(output / f"{stage}.json")]
        assert {"--flex", "--fa3"} <= set(arguments)

    def test_finetune_stage(self, monkeypatch, tmp_path):
        run = []
        monkeypatch.setattr(gpu_session, "run_limited", lambda command, *_: run.append(list(map(str, command))) or 0)
        arguments = ["--stages", "finetune", "--finetune-args=--tokens 8192", "--finetune-limit", "100", "--fa3", "fa3"]
        status, _, output = self.run(tmp_path, *arguments)
        assert status == 0
        limits = ["--json", str(output / "finetune.json"), "--time-limit", "75"]
        assert run == [[sys.executable, "benchmarks/benchmark_finetune.py", *limits, "--tokens", "8192"]]

    def test_limits(self, tmp_path):
        sleep = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
        log = tmp_path / "log"
        assert gpu_session.run_limited(sleep, log, 1) is None
        assert "killed" in log.read_text()
        assert gpu_session.run_limited([sys.executable, "-c", "raise SystemExit(3)"], log, 20) == 3

    def test_wheel(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "demo-1.whl", "w") as wheel:
            wheel.writestr("demo/__init__.py", "")
        assert (gpu_session.install(str(tmp_path / "demo-*.whl"), tmp_path / "site") / "demo" / "__init__.py").is_file()
        with pytest.raises(SystemExit, match="matches 0"):
            gpu_session.install(str(tmp_path / "other-*.whl"), tmp_path / "site")


def test_sanitizer_sweep(monkeypatch, capsys):
    problems = [p for p in sanitize_sweep.PROBLEMS if not isinstance(p, sanitize_sweep.Dca) or p.seq_k < 150]
    monkeypatch.setattr(sanitize_sweep, "PROBLEMS", problems)
    assert sanitize_sweep.main(["--device", "cpu"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sanitize_sweep, "missing_operator", lambda problem, _: problem.operators[0])
        assert sanitize_sweep.main(["--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert f"{len(problems)} problems, 0 wrong, 0 left out" in output
    assert "left out, no kernels of select for cpu: SelectMerge seq=121 head_dim=64" in output

    def wrong(q, k, v, *_, **__):
        return q * torch.nan + k.sum() + v.sum(), torch.tensor(0.0)

    monkeypatch.setattr(chunkattn, "dca", wrong)
    assert sanitize_sweep.main(["--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out
