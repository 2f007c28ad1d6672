"""The oracles the kernels are tested against, in plain torch, each written from its definition.

They share no code with the kernels, run on any device in any floating dtype, float64 included, and are differentiable.
"""

from chunkattn.reference.cache import SelectMergeCache
from chunkattn.reference.dca import dca, rotate
from chunkattn.reference.decode import cached_rows, dca_with_kvcache
from chunkattn.reference.select_merge import select, select_merge

__all__ = ["SelectMergeCache", "cached_rows", "dca", "dca_with_kvcache", "rotate", "select", "select_merge"]
