"""The session that runs checks and benchmarks on a GPU, with commands that are no GPU's."""

import json
import sys
import zipfile

import gpu_session
import pytest
import sanitize_sweep
import torch

import chunkattn


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
