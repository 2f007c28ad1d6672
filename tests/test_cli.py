"""python -m chunkattn."""

import subprocess
import sys

import pytest
import torch

from chunkattn import _core, cli


def test_info_as_a_module():
    done = subprocess.run([sys.executable, "-m", "chunkattn", "info"], capture_output=True, text=True, check=True)
    assert _core.build_info()["version"] in done.stdout
    assert torch.__version__ in done.stdout
    assert "shape" not in done.stdout


def test_info_names_the_kernel_of_a_shape(capsys):
    shape = ["--seq", "100", "--seq-k", "1000", "--heads", "8", "--kv-heads", "2", "--head-dim", "80"]
    assert cli.main(["info", *shape, "--chunk", "384", "--local", "128", "--capability", "8.0"]) == 0
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.strip().startswith("sm_80")]
    for line, find_plan, tiles in zip(
        lines,
        (_core.plan_forward, _core.plan_backward),
        ("1 query tiles, 8 tiles", "8 key tiles, 16 tiles"),
        strict=True,
    ):
        plan = find_plan(batch=1, seqlen_q=100, seqlen_k=1000, heads=8, kv_heads=2, head_dim=80, compute_capability=80)
        assert f"{plan.name}, head_dim 128: tiles of {plan.tile_m} queries" in line
        assert f"; {tiles} of work" in line
        assert ("not compiled into this build" in line) == (_core.build_info()["cuda"] is None)
    assert "4 of 256 tokens" in output


@pytest.mark.parametrize(
    ("shape", "reason"),
    [(["--head-dim", "512"], "512"), (["--dtype", "float32"], "CUDA takes bfloat16 and float16, got float32")],
)
def test_info_says_why_there_is_no_kernel(capsys, shape, reason):
    assert cli.main(["info", "--seq", "64", "--capability", "90", *shape]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("sm_90"))
    assert "no kernel: " in line
    assert reason in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["info", "--seq", "0"], "argument --seq: got '0'; it takes a number from 1 on"),
        (["info", "--seq", "9", "--seq-k", "8"], "argument --seq-k: got 8; it takes --seq, 9, or more"),
        (["info", "--seq", "9", "--heads", "8", "--kv-heads", "3"], "got 3; it takes a divisor of --heads, 8"),
        (["info", "--seq", "9", "--chunk", "8", "--local", "8"], "got 8; it takes less than --chunk, 8"),
        (["info", "--seq", "9", "--capability", "7.5"], "got '7.5'; it takes a compute capability from 8.0 on"),
        (["info", "--seq", "9", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
