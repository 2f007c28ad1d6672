"""The benchmark of fine-tuning on the CPU. No speed is asserted."""

import importlib
import json

import pytest
import torch
from runs import HEADER_FIELDS

import chunkattn


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
