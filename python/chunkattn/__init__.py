"""Dual Chunk Attention on CPUs and GPUs."""

from chunkattn import _core, _ops, _registration, reference
from chunkattn.functional import dca
from chunkattn.rotary import rope_table

__version__ = _core.build_info()["version"]

__all__ = ["dca", "reference", "rope_table"]
