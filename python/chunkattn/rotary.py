"""Rotary position tables."""

import torch
from torch import Tensor


def rope_table(
    chunk_size: int,
    rotary_dim: int,
    base: float = 10000.0,
    *,
    inv_freq: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of every table row Dual Chunk Attention uses.

    Row p holds the angles ``p * inv_freq``. They are computed in float64 from the integer row: a float32 product is off
    by about 0.01 rad near row 2**18.

    Args:
        chunk_size: s of the paper (arXiv 2402.17463). No position ever exceeds it.
        rotary_dim: rotated dimensions of a head, even; the remaining ones pass through.
        base: rope theta; ``inv_freq[d] = base ** (-2 d / rotary_dim)``.
        inv_freq: [rotary_dim / 2] frequencies in radians per position, which replace ``base`` (scaled or learned ones).
        device: where the table lives. Default: the device of ``inv_freq``, or torch's default device.

    Returns:
        cos, sin: float32 [chunk_size + 1, rotary_dim / 2].

    Raises:
        ValueError: chunk_size or rotary_dim is out of range, or inv_freq has another shape.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    if inv_freq is None:
        device = torch.get_default_device() if device is None else torch.device(device)
        if not base > 0:
            raise ValueError(f"base must be positive, got {base}")
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
        frequencies = base**-exponents
    else:
        if inv_freq.shape != (rotary_dim // 2,):
            raise ValueError(f"inv_freq must have shape [{rotary_dim // 2}], got {list(inv_freq.shape)}")
        device = inv_freq.device if device is None else torch.device(device)
        frequencies = inv_freq.detach().to("cpu", torch.float64)
    rows = torch.arange(chunk_size + 1, dtype=torch.float64, device="cpu")
    angles = torch.outer(rows, frequencies)
    return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)
