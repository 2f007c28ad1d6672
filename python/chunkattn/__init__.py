"""Dual Chunk Attention on CPUs and GPUs."""

from chunkattn import _ops, _registration, reference
from chunkattn.functional import dca
from chunkattn.rotary import rope_table

__all__ = ["dca", "reference", "rope_table"]
