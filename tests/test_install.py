"""What is missing at build or load time is named in one sentence, without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunkattn import _ops

ROOT = Path(__file__).parents[1]


def run_setup(tmp_path, *, without: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """setup.py build_ext, with a module that cannot be imported and with environment variables."""
    hide = f"import sys; sys.modules[{without!r}] = None; " if without else "import sys; "
    script = f"{hide}sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]; "
    script += "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("without", "environment", "message"),
    [
        ("torch", {}, "building needs torch 2.10 or later in this environment: install it"),
        ("pybind11", {}, "building needs pybind11 in this environment: install it"),
        (None, {"CHUNKATTN_CUDA": "yes"}, "CHUNKATTN_CUDA is 'yes'; it takes 1, 0 or nothing."),
        (None, {"CHUNKATTN_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nvcc was not found: install the CUDA toolkit"),
        (None, {"CHUNKATTN_CUDA": "0", "CXX": "no-such-compiler"}, "no-such-compiler was not found: install one"),
    ],
)
def test_build_names_what_is_missing(tmp_path, without, environment, message):
    done = run_setup(tmp_path, without=without, **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("chunkattn: ") for line in done.stderr.splitlines()) == 1


def test_missing_library(tmp_path):
    with pytest.raises(ImportError, match=r"_C is missing from .*: build it with 'pip install --no-build-isolation"):
        _ops.find_library(tmp_path)


def test_library_that_does_not_load(tmp_path):
    path = tmp_path / "_C.so"
    path.write_bytes(b"no library")
    assert _ops.find_library(tmp_path) == path
    with pytest.raises(ImportError, match=f"does not load with torch .*{path}"):
        _ops.load_library(path)


def test_torch_that_is_too_old(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"chunkattn needs torch 2\.10 or later, found 2\.9\.1\."):
        _ops.load_library(tmp_path / "_C.so")
