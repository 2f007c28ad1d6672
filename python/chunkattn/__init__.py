"""Long-context attention on CPUs and GPUs: Dual Chunk Attention, and select-and-merge attention."""

from chunkattn import _core, _ops, _registration, reference
from chunkattn._temperature import temperature
from chunkattn.functional import dca, select, select_merge
from chunkattn.rotary import CRDNTK, dynamic_ntk_base, ntk_base, rope_rows, rope_table

__version__ = _core.build_info()["version"]

__all__ = [
    "CRDNTK",
    "dca",
    "dynamic_ntk_base",
    "ntk_base",
    "reference",
    "rope_rows",
    "rope_table",
    "select",
    "select_merge",
    "temperature",
]
