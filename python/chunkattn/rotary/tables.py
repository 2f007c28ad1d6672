"""The cosines and sines of rotary positions."""

import torch
from torch import Tensor

from chunkattn._checks import check_integer_tensor


def rope_rows(
    positions: Tensor,
    rotary_dim: int,
    base: float = 10000.0,
    *,
    inv_freq: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of any positions.

    Position p holds the angles ``p * inv_freq``. They are computed in float64 from the integer position: a float32
    product is off by about 0.01 rad near position 2**18.

    Args:
        positions: [...] of any shape, in tokens, of an integer dtype.
        rotary_dim: rotated dimensions of a head, even; the remaining ones pass through.
        base: rope theta; ``inv_freq[d] = base ** (-2 d / rotary_dim)``.
        inv_freq: [rotary_dim / 2] frequencies in radians per position, which replace ``base`` (scaled or learned ones).

    Returns:
        cos, sin: float32 [..., rotary_dim / 2], on the device of positions.

    Raises:
        TypeError: positions is not a tensor of integers.
        ValueError: rotary_dim or base is out of range, or inv_freq has another shape.
    """
    check_integer_tensor("positions", positions)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    if inv_freq is None:
        if not base > 0:
            raise ValueError(f"base must be positive, got {base}")
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device) / rotary_dim
        frequencies = base**-exponents
    else:
        if inv_freq.shape != (rotary_dim // 2,):
            raise ValueError(f"inv_freq must have shape [{rotary_dim // 2}], got {list(inv_freq.shape)}")
        frequencies = inv_freq.detach().to(positions.device, torch.float64)
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def rope_table(
    chunk_size: int,
    rotary_dim: int,
    base: float = 10000.0,
    *,
    inv_freq: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of every table row Dual Chunk Attention uses: :func:`rope_rows` of 0 to chunk_size.

    Args:
        chunk_size: s of the paper (arXiv 2402.17463). No position ever exceeds it.
        rotary_dim, base, inv_freq: as in :func:`rope_rows`.
        device: where the table lives. Default: the device of ``inv_freq``, or torch's default device.

    Returns:
        cos, sin: float32 [chunk_size + 1, rotary_dim / 2].

    Raises:
        ValueError: chunk_size, rotary_dim or base is out of range, or inv_freq has another shape.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    cos, sin = rope_rows(torch.arange(chunk_size + 1, device="cpu"), rotary_dim, base, inv_freq=inv_freq)
    if device is None:
        device = torch.get_default_device() if inv_freq is None else inv_freq.device
    return cos.to(device), sin.to(device)
