"""Dual Chunk Attention on CPUs and GPUs."""

from chunkattn import _core, _ops, _registration, reference
from chunkattn._temperature import temperature
from chunkattn.cache import SelectMergeCache
from chunkattn.functional import dca, dca_varlen, dca_with_kvcache, select, select_merge
from chunkattn.rotary import CRDNTK, dynamic_ntk_base, ntk_base, rope_rows, rope_table

__version__ = _core.build_info()["version"]

__all__ = [
    "CRDNTK",
    "SelectMergeCache",
    "dca",
    "dca_varlen",
    "dca_with_kvcache",
    "dynamic_ntk_base",
    "ntk_base",
    "reference",
    "rope_rows",
    "rope_table",
    "select",
    "select_merge",
    "temperature",
]
