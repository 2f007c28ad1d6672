"""The benchmark of select-and-merge attention on the CPU. No speed is asserted."""

import importlib

import benchmark_select_merge
import common
import peers
import pytest
import torch
from runs import HEADER_FIELDS, ROW_FIELDS, run_benchmark

import chunkattn


@pytest.mark.usefixtures("quick_ceilings")
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
