"""Dual Chunk Attention over a key-value cache in plain torch."""

import torch
from torch import Tensor

from chunkattn.reference.dca import dca, rotate


def cached_rows(cache: Tensor, row: int, length: int, block_table: Tensor | None = None) -> Tensor:
    """The first `length` tokens [length, Hkv, D] of a sequence in a cache for :func:`chunkattn.dca_with_kvcache`."""
    if block_table is None:
        return cache[row, :length]
    pages = block_table[row, : -(-length // cache.shape[1])].long()
    # Gathered as bytes: torch has no indexing of float8.
    return cache.view(torch.uint8).index_select(0, pages).view(cache.dtype).flatten(0, 1)[:length]


def dca_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    cache_seqlens: int | Tensor,
    chunk_size: int,
    local_size: int,
    block_table: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    num_splits: int = 0,
    scale: float | None = None,
    temperature: float | Tensor | None = None,
    interleaved: bool = False,
    q_rotated: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`chunkattn.dca_with_kvcache`, sequence by sequence, computed in the dtype of q, whatever that of the cache.

    Lengths are read on the host. ``num_splits`` has no effect.
    """
    batch, seqlen_q, heads, _ = q.shape
    lengths = cache_seqlens.tolist() if isinstance(cache_seqlens, Tensor) else [cache_seqlens] * batch
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = q.new_full((batch, heads, seqlen_q), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    stride = chunk_size - local_size
    for row, cached in enumerate(lengths):
        if k is not None:
            rows = torch.arange(cached, cached + k.shape[1], device=q.device) % stride
            rotated = rotate(k[row : row + 1], cos[rows], sin[rows], interleaved)[0]
            _append(k_cache, rotated, k_scale, row, cached, block_table)
            _append(v_cache, v[row], v_scale, row, cached, block_table)
            cached += k.shape[1]
        unseeing = min(seqlen_q, max(0, seqlen_q - cached))
        out[row, :unseeing] = 0
        if unseeing == seqlen_q:
            continue
        keys, values = (
            _scaled(cached_rows(cache, row, cached, block_table).to(q.dtype), factor)
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        out[row, unseeing:], lse[row, :, unseeing:] = (
            result[0]
            for result in dca(
                q[row : row + 1, unseeing:],
                keys[None],
                values[None],
                cos,
                sin,
                chunk_size=chunk_size,
                local_size=local_size,
                scale=scale,
                temperature=temperature[row : row + 1] if isinstance(temperature, Tensor) else temperature,
                interleaved=interleaved,
                q_rotated=q_rotated,
                k_rotated=True,
                return_lse=True,
            )
        )
    return (out, lse) if return_lse else out


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """x [tokens, Hkv, D] times a factor for all or for each head."""
    return x if factor is None else x * factor.to(x.dtype).reshape(-1, 1)


def _append(
    cache: Tensor, rows: Tensor, factor: Tensor | None, row: int, begin: int, block_table: Tensor | None
) -> None:
    if factor is not None:
        rows = _scaled(rows, 1 / factor.to(rows.dtype))
    if cache.dtype == torch.float8_e4m3fn:
        largest = torch.finfo(cache.dtype).max
        rows = rows.clamp(-largest, largest)
    rows = rows.to(cache.dtype)
    while rows.shape[0]:
        page, first = (row, begin) if block_table is None else divmod(begin, cache.shape[1])
        if block_table is not None:
            page = int(block_table[row, page])
        slots = cache[page, first : first + rows.shape[0]]
        slots.copy_(rows[: slots.shape[0]])
        rows, begin = rows[slots.shape[0] :], begin + slots.shape[0]
