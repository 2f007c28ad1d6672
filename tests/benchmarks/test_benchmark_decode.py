"""The benchmarks of decoding on the CPU. No speed is asserted."""

import json

import benchmark_decode
import benchmark_forward
import benchmark_select_merge_decode
import pytest
import torch

import chunkattn


@pytest.mark.usefixtures("quick_ceilings")
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
            *(("decode", "chunkattn", cache, 96) for cache in ("rows", "rows, complete", *paged, "float8")),
            *(("decode", "sdpa", cache, None) for cache in ("rows", *paged)),
            ("decode", "composed-sdpa", "rows", 96),
            ("step", "chunkattn", "rows", 96),
            ("step", "sdpa", "rows", None),
            ("prefill", "chunkattn", None, 96),
            ("prefill", "chunkattn", "rows", 96),
            ("prefill", "chunkattn", "pages of 16", 96),
        ]
        assert results["rows"][5]["gbps"] > 0
        assert results["rows"][11]["steps_in_graph"] == benchmark_decode.STEPS
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
        rest = ["rows, complete", "pages of 16", "pages of 64", "pages of 128", "float8"]
        assert [row["cache"] for row in results["rows"]] == rest
        assert message in results["failed"][0]["error"]

    def test_refused_shapes(self):
        with pytest.raises(SystemExit, match="one query or as many queries as keys"):
            benchmark_decode.main(["--device", "cpu", "--shape", "s2/256-h4/2-d16"])
        with pytest.raises(SystemExit, match="takes shapes with as many queries as keys"):
            benchmark_forward.main(["--device", "cpu", "--shape", "s1/256-h4/2-d16"])


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
