"""Rotary positions: tables, NTK-scaled bases, and the position augmentation CRD NTK."""

from chunkattn.rotary.ntk import CRDNTK, CyclicRotary, dynamic_ntk_base, ntk_base
from chunkattn.rotary.tables import rope_rows, rope_table

__all__ = ["CRDNTK", "CyclicRotary", "dynamic_ntk_base", "ntk_base", "rope_rows", "rope_table"]
