"""What the benchmarks share on the CPU: shapes, clocks, rounds, ceilings, the source tree."""

import itertools
import time
import types

import benchmark_varlen
import common
import pytest
import torch


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
