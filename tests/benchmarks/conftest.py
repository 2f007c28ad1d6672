"""Puts the scripts under test on the path, and spares them what takes time."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]


@pytest.fixture
def quick_ceilings(monkeypatch):
    ceilings = {"matmul_tflops": 0.1, "matmul": "1^3 float32", "copy_gbps": 1.0}
    monkeypatch.setattr("common.measure_ceilings", lambda device, clock: ceilings)
