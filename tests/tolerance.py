"""How far a result may lie from the float64 oracle: FlashAttention's rule."""

import torch
from torch import Tensor

# Ulps granted on top. In float64 the oracle rounds as often as the result does and in another order, so there the ulps
# alone are the bound.
_ULPS = {torch.float64: 256, torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}


def assert_within_rule(
    actual: Tensor, oracle: Tensor, same_dtype: Tensor, name: str, *, ulps: float | None = None, terms: float = 0.0
) -> None:
    """|actual - oracle| <= 2 * max |same_dtype - oracle| + a few ulps.

    Args:
        actual: the result under test.
        oracle: the plain formula in float64 on the same (already rounded) inputs.
        same_dtype: the plain formula on torch operations in the dtype of the inputs.
        name: what to call the result in the message.
        ulps: how many ulps, in the dtype of actual, of the largest oracle element.
        terms: magnitude of the terms that were summed, where they may cancel and leave less than they rounded off.
    """
    assert actual.shape == oracle.shape, f"{name} has shape {list(actual.shape)}, the oracle {list(oracle.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.double() - oracle).abs().max().item()
    plain_error = (same_dtype.double() - oracle).abs().max().item()
    ulps = _ULPS[actual.dtype] if ulps is None else ulps
    bound = 2 * plain_error + ulps * torch.finfo(actual.dtype).eps * max(oracle.abs().max().item(), terms)
    assert error <= bound, f"{name} is off by {error:.3g}, allowed {bound:.3g}; torch in its dtype by {plain_error:.3g}"
