"""The logit temperature of long sequences."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from chunkattn._checks import check_int, check_integer_tensor

Number = TypeVar("Number", float, Tensor)


def _of_ratio(ratio: Number, log: Callable[[Number], Number]) -> Number:
    """The rule, from max(1, L / original_length)."""
    return (0.1 * log(ratio) + 1) ** 2


def temperature_of_one(length: int, original_length: int) -> float:
    """:func:`temperature` of one length, on the host and in double precision."""
    return _of_ratio(max(1.0, length / original_length), math.log)


def temperature(seqlens: Tensor | Sequence[int], original_length: int) -> Tensor:
    """Qwen2.5-1M's logit temperature of each sequence, ready for ``chunkattn.dca(..., temperature=...)``.

    ``t = m ** 2`` with ``m = max(1, 0.1 * ln(L / original_length) + 1)`` (arXiv 2501.15383, the attention
    scaling of YaRN, arXiv 2309.00071), in float64. The host does not read a tensor's lengths: on a GPU nothing waits.

    Args:
        seqlens: [B] lengths L in tokens, a tensor of an integer dtype or a sequence of ints.
        original_length: tokens up to which the temperature is 1, at least 1.

    Returns:
        float32 [B], on the device of seqlens, or on torch's default device for a sequence.

    Raises:
        TypeError, ValueError: an argument is not what is listed above.
    """
    check_int("original_length", original_length, 1)
    if isinstance(seqlens, Tensor):
        check_integer_tensor("seqlens", seqlens)
        if seqlens.dim() != 1:
            raise ValueError(f"seqlens must have 1 dimension [B], got shape {list(seqlens.shape)}")
    elif isinstance(seqlens, Sequence) and not isinstance(seqlens, str | bytes):
        for index, length in enumerate(seqlens):
            check_int(f"seqlens[{index}]", length, 0)
        seqlens = torch.tensor(seqlens, dtype=torch.int64)
    else:
        raise TypeError(f"seqlens must be a tensor or a sequence of ints, got {type(seqlens).__name__}")
    # Where the ratio is below 1 its logarithm would be dropped anyway; that of an empty sequence has none.
    ratio = (seqlens.to(torch.float64) / original_length).clamp(min=1)
    return _of_ratio(ratio, torch.log).to(torch.float32)
