"""The public functions, on top of the operators."""

import math

import torch
from torch import Tensor

from chunkattn import _ops
from chunkattn._registration import check_gradients


def _check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"chunkattn: {name} must be a tensor, got {type(tensor).__name__}")


def _check_kernels(operator: str, q: Tensor) -> None:
    if not _ops.has_kernels(operator, q.device):
        remedy = "" if _ops.CUDA_OPERATORS else "; build it again with nvcc"
        raise NotImplementedError(
            f"chunkattn: q is on {q.device}, but this build of chunkattn has kernels of {operator} for the CPU only"
            f"{remedy}"
        )


def _scale_and_temperature(
    scale: float | None, temperature: float | Tensor | None, q: Tensor
) -> tuple[float | None, Tensor | None]:
    """As the operators take them: one temperature for all is a factor of the scale."""
    if temperature is None or isinstance(temperature, Tensor):
        return scale, temperature
    if not 0 < temperature < math.inf:
        raise ValueError(f"chunkattn: temperature must be positive and finite, got {temperature}")
    if scale is None:
        _check_tensors(q=q)
        scale = 1 / math.sqrt(max(1, q.shape[-1]))
    return scale * temperature, None


def _deterministic(deterministic: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def _prepare(operator: str, tensors: dict[str, Tensor], deterministic: bool | None) -> bool:
    """Checks what the operators cannot and returns which backward is wanted."""
    _check_tensors(**tensors)
    _check_kernels(operator, tensors["q"])
    if torch.is_grad_enabled():
        check_gradients(name for name, tensor in tensors.items() if tensor.requires_grad)
    return _deterministic(deterministic)


def dca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    chunk_size: int,
    local_size: int,
    scale: float | None = None,
    temperature: float | Tensor | None = None,
    interleaved: bool = False,
    q_rotated: bool = False,
    k_rotated: bool = False,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dual Chunk Attention (arXiv 2402.17463): causal attention whose rotary positions never exceed chunk_size.

    With the stride c = chunk_size - local_size, a query at position i and a key at position j <= i lie
    ``i // c - j // c`` chunks apart. The key is rotated at row ``j % c``; the query at row ``i % c`` within a chunk, at
    ``min(i % c + c, chunk_size)`` for the chunk before and at ``min(2 * c - 1, chunk_size)`` for all earlier ones. One
    softmax runs over all of them. Queries are aligned to the end of the keys: query n of Sq has position Sk - Sq + n,
    which covers prefill, chunked prefill and decoding. For Sk <= c this is ordinary causal attention with RoPE.

    Args:
        q: [B, Sq, Hq, D].
        k, v: [B, Sk, Hkv, D], Sq <= Sk, Hq a multiple of Hkv. q, k and v share a dtype (CPU: float64, float32, bfloat16
            or float16; CUDA: bfloat16 or float16, D <= 256) and a device. Their last dimension is contiguous, other
            strides are free. Under autocast they are cast to its dtype; nothing else is.
        cos, sin: float32 [>= chunk_size + 1, rotary_dim / 2], see :func:`chunkattn.rope_table`. The first rotary_dim
            dimensions of each head are rotated, the others pass through.
        chunk_size: s of the paper.
        local_size: w of the paper, 0 < local_size < chunk_size.
        scale: factor of the logits, default 1 / sqrt(D).
        temperature: a further positive factor of the logits, one for all or float32 [B] for each sequence
            (Qwen2.5-1M, arXiv 2501.15383: ``max(1, 0.1 * ln(L / L_trained) + 1) ** 2``).
        interleaved: rotate pairs (2d, 2d + 1), as GPT-J, instead of (d, d + rotary_dim / 2), as NeoX.
        q_rotated: q arrives rotated at row ``i % c``.
        k_rotated: k arrives rotated at row ``j % c``.
        deterministic: make gradients repeat bit by bit, at some cost on CUDA, where dQ is otherwise summed in whatever
            order blocks finish; the output and the gradients on the CPU always do. None:
            ``torch.are_deterministic_algorithms_enabled()``.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [B, Sq, Hq, D], contiguous, in the dtype of q. With return_lse also lse, float32 [B, Hq, Sq], natural
        logarithm, not differentiable. Gradients flow to q, k and v.

    Raises:
        TypeError, ValueError: an argument is not what is listed above.
        NotImplementedError: this build has no kernels for the device, or a gradient is asked for that does not exist.
    """
    scale, temperature = _scale_and_temperature(scale, temperature, q)
    tensors = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
    if temperature is not None:
        tensors["temperature"] = temperature
    deterministic = _prepare("dca", tensors, deterministic)
    out, lse = torch.ops.chunkattn.dca(
        q, k, v, cos, sin, chunk_size, local_size, scale, temperature, interleaved, q_rotated, k_rotated, deterministic
    )
    return (out, lse) if return_lse else out


def dca_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    chunk_size: int,
    local_size: int,
    scale: float | None = None,
    temperature: float | Tensor | None = None,
    interleaved: bool = False,
    q_rotated: bool = False,
    k_rotated: bool = False,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`dca` of B sequences of different lengths, packed one behind the other without padding.

    Sequence b has the rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of q and those of cu_seqlens_k of k and v, as
    in FlashAttention's ``flash_attn_varlen_func``. Positions count from each sequence's own first key; where it has
    fewer keys than queries, its first queries see nothing and give output 0 and log-sum-exp -inf.

    Args:
        q: [total_q, Hq, D].
        k, v: [total_k, Hkv, D]; dtypes, D and strides as for :func:`dca`.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], from 0 to total_q and total_k. The host reads them on the CPU only,
            where they are checked; wrong ones on CUDA give wrong results, never an access outside the tensors.
        max_seqlen_q, max_seqlen_k: the length of the longest sequence, or more.
        temperature: as for :func:`dca`, a tensor has one element for each sequence.
        cos, sin, chunk_size, local_size, scale, interleaved, q_rotated, k_rotated, deterministic, return_lse: as for
            :func:`dca`.

    Returns:
        out [total_q, Hq, D], contiguous, in the dtype of q. With return_lse also lse, float32 [Hq, total_q], natural
        logarithm, not differentiable. Gradients flow to q, k and v.

    Raises:
        As :func:`dca`.
    """
    scale, temperature = _scale_and_temperature(scale, temperature, q)
    tensors = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
    tensors |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if temperature is not None:
        tensors["temperature"] = temperature
    deterministic = _prepare("dca_varlen", tensors, deterministic)
    out, lse = torch.ops.chunkattn.dca_varlen(
        q, k, v, cos, sin, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, chunk_size, local_size, scale,
        temperature, interleaved, q_rotated, k_rotated, deterministic,
    )  # fmt: skip
    return (out, lse) if return_lse else out


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
    """Dual Chunk Attention over a key-value cache, to which new keys and values are first appended in place.

    For decoding (Sq = 1), speculative decoding and chunked prefill (Sq > 1) of sequences of different lengths, after
    the conventions of FlashAttention's ``flash_attn_with_kvcache``. Sequence b has ``L = cache_seqlens[b] + Snew``
    tokens; the new keys and values go to its positions ``cache_seqlens[b] ..``, and query n of Sq has position
    ``L - Sq + n``. Queries before position 0, all of them for an empty sequence, give output 0 and log-sum-exp -inf.

    The cache holds keys rotated at row ``j % (chunk_size - local_size)`` of the table, so it is valid for one pair of
    chunk_size and local_size. Nothing beyond a sequence's tokens is read. The caller advances cache_seqlens.

    Lengths, table and pages are read on the device and nothing waits for them, so a call can be captured in a CUDA
    graph and replayed with other contents. On the CPU they are checked; on CUDA a length beyond the capacity or a page
    id that does not exist gives wrong results for that sequence, never an access outside the cache.

    Args:
        q: [B, Sq, Hq, D], dtypes and D as for :func:`dca`.
        k_cache, v_cache: [B, capacity, Hkv, D], or pages [num_pages, page_size, Hkv, D] with a block_table, Hq a
            multiple of Hkv; in the dtype of q, or float8_e4m3fn with q of float32, bfloat16 or float16. The last
            dimension is contiguous, other strides are free. A page size need not divide chunk_size.
        cos, sin, chunk_size, local_size, scale, temperature, interleaved: as for :func:`dca`.
        cache_seqlens: int32 [B], or one int for all: tokens in the cache before this call.
        block_table: int32 [B, pages of a sequence]: token j lies in row ``j % page_size`` of page
            ``block_table[b, j // page_size]``. Entries beyond a sequence's tokens are not read. Sequences may share
            pages that none of them appends to.
        k, v: [B, Snew, Hkv, D] in the dtype of q, or both None. New keys are raw; they are rotated on the way.
        k_scale, v_scale: float32, a scalar or [Hkv], with a float8 cache only: what its elements are multiplied by when
            they are read, and divided by, rounded to nearest and clamped to +-448 when they are written. None: 1.
        out: [B, Sq, Hq, D] in the dtype of q, last dimension contiguous: written and returned.
        num_splits: parts in which the keys of a sequence are attended in parallel, 0: chosen from the lengths.
        q_rotated: q arrives rotated at row ``position % (chunk_size - local_size)``.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [B, Sq, Hq, D] in the dtype of q and, with return_lse, lse, float32 [B, Hq, Sq], natural logarithm.

    Raises:
        TypeError, ValueError: an argument is not what is listed above, or, on the CPU, a length exceeds the capacity or
            a page that a sequence uses does not exist. The cache is unchanged.
        NotImplementedError: this build has no kernels for the device, or an argument requires grad: there is no
            backward through the cache.
    """
    _check_tensors(q=q)
    _check_kernels("dca_with_kvcache", q)
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cos": cos, "sin": sin}
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full(
            (q.shape[0],) if q.dim() else (0,), cache_seqlens, dtype=torch.int32, device=q.device
        )
    scale, temperature = _scale_and_temperature(scale, temperature, q)
    optional = {
        "block_table": block_table, "k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale, "out": out,
        "temperature": temperature,
    }  # fmt: skip
    tensors |= {"cache_seqlens": cache_seqlens} | {name: t for name, t in optional.items() if t is not None}
    _check_tensors(**tensors)
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise NotImplementedError(
                    f"chunkattn: {name} requires grad, but there is no backward through the cache; use torch.no_grad()"
                )
    k_scale, v_scale = (_per_head(factor, k_cache) for factor in (k_scale, v_scale))
    arguments = (
        q, k_cache, v_cache, cos, sin, cache_seqlens, chunk_size, local_size, block_table, k, v, k_scale, v_scale,
        num_splits, scale, temperature, interleaved, q_rotated,
    )  # fmt: skip
    if out is None:
        out, lse = torch.ops.chunkattn.dca_with_kvcache(*arguments)
    else:
        lse = torch.ops.chunkattn.dca_with_kvcache.out(*arguments, out)
    return (out, lse) if return_lse else out


def _per_head(factor: Tensor | None, cache: Tensor) -> Tensor | None:
    """A scalar as one factor for each KV head."""
    if factor is None or factor.dim() or cache.dim() != 4:
        return factor
    return factor.expand(cache.shape[2]).contiguous()


def select(
    q: Tensor,
    k: Tensor,
    *,
    region_size: int = 16,
    top_k: int = 384,
    merge: int = 128,
    eligibility: str = "group",
    selection: str = "lookahead",
    heads: str = "kv",
) -> Tensor:
    """The regions each group of queries attends to besides its own (arXiv 2410.04211, correlation-aware selection and
    merge).

    Regions are region_size neighbouring tokens and groups merge neighbouring regions, both aligned at token 0; the last
    of each may be partial. A region's semantic token is the mean of its rows over the tokens that exist; the score of a
    query region and a key region is the dot product of theirs. Both are computed in float32, or in float64 for float64
    inputs. Each voting row (query region) of a group lists its top_k best eligible key regions, best first, ties to the
    lowest index; a score that is NaN counts as infinity. The lists are read rank by rank and within a rank row by row,
    and a region is kept when first seen, until there are top_k. The work is quadratic in the number of regions, the
    memory linear.

    Args:
        q: [B, N, Hq, D].
        k: [B, N, Hkv, D], Hq a multiple of Hkv. q and k share a dtype (CPU: float64, float32, bfloat16 or float16) and
            a device. Their last dimension is contiguous, other strides are free. Under autocast they are cast to its
            dtype.
        region_size: tokens in a region.
        top_k: regions a row lists, and regions a group keeps. On CUDA at most 2**20 where there are more regions; the
            workspace grows with top_k times the regions, and beyond 2048 merging is slower.
        merge: query regions in a group.
        eligibility: which regions a row may list. With g0 the first region of the group the list is for, "group": those
            before g0; "row" (the paper's code): row r = 0, 1, ... of those that vote may list regions up to
            g0 + r - merge, itself included; so a partial group, which lacks rows, does not reach its newest regions.
        selection: which rows vote. "lookahead" (the paper): the group's own regions, so that the choice depends on
            later queries of the group; "causal": the regions of the group before.
        heads: "kv": one selection per KV head, scores summed over the query heads that share it; "q" (the paper's
            code): one per query head.

    Returns:
        int32 [B, Hkv, groups, top_k], or [B, Hq, groups, top_k] with heads="q", with
        groups = ceil(N / (region_size * merge)): region ids, ascending, then -1 where fewer are eligible. Not
        differentiable.

    Raises:
        TypeError, ValueError: an argument is not what is listed above.
        NotImplementedError: this build has no kernels for the device.
    """
    _check_tensors(q=q, k=k)
    _check_kernels("select", q)
    with torch.no_grad():
        return torch.ops.chunkattn.select(q, k, region_size, top_k, merge, eligibility, selection, heads)


def select_merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    region_size: int = 16,
    top_k: int = 384,
    merge: int = 128,
    eligibility: str = "group",
    selection: str = "lookahead",
    heads: str = "kv",
    indices: Tensor | None = None,
    select_q: Tensor | None = None,
    select_k: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Select-and-merge attention (arXiv 2410.04211): dense within a group of queries, selected regions before it.

    All queries of a group attend to all tokens of its selected regions and causally to the tokens of the group itself,
    under one softmax: a token costs at most (top_k + merge) * region_size keys, however long the sequence is. The first
    top_k + merge regions of a sequence are dense causal attention, unless eligibility is "row". Gradients flow to q, k
    and v through the attention, none through the selection.

    Args:
        q: [B, N, Hq, D], rotated by the caller.
        k, v: [B, N, Hkv, D], Hq a multiple of Hkv. q, k and v share a dtype (CPU: float64, float32, bfloat16 or
            float16) and a device. Their last dimension is contiguous, other strides are free. Under autocast they are
            cast to its dtype.
        region_size, top_k, merge, eligibility, selection, heads: see :func:`select`.
        indices: int32 [B, Hkv, groups, C], or [B, Hq, groups, C] with heads="q", the regions to attend to, for any
            C >= 0 and in any order. They replace the selection: top_k, eligibility, selection, select_q and select_k
            then have no effect. An id outside 0 .. g0 - 1, with g0 the first region of its group, is ignored (with
            CHUNKATTN_DEBUG=1 in the environment, ids other than -1 that would be are refused); one that is listed
            twice counts twice.
        select_q, select_k: in the shapes of q and k, the rows to select on instead of q and k: the unrotated ones for
            selection without positions.
        scale: factor of the logits, default 1 / sqrt(D).
        deterministic: make gradients repeat bit by bit, at some cost on CUDA, where they are otherwise summed in
            whatever order. Default: what torch.use_deterministic_algorithms() says.
        return_lse: also return the log-sum-exp of the logits.
        return_indices: also return the region ids, as :func:`select` does, or indices where given.

    Returns:
        out [B, N, Hq, D], contiguous, in the dtype of q. Then with return_lse the log-sum-exp, float32 [B, Hq, N],
        natural logarithm, not differentiable, then with return_indices the region ids.

    Raises:
        TypeError, ValueError: an argument is not what is listed above.
        NotImplementedError: this build has no kernels for the device.
    """
    _check_tensors(q=q, k=k, v=v)
    _check_kernels("select_merge", q)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        _check_kernels("select_merge_backward", q)
    if indices is None:
        indices = select(
            _selection_rows("select_q", select_q, "q", q),
            _selection_rows("select_k", select_k, "k", k),
            region_size=region_size, top_k=top_k, merge=merge,
            eligibility=eligibility, selection=selection, heads=heads,
        )  # fmt: skip
    else:
        _check_tensors(indices=indices)
        _check_index_heads(indices, heads, q, k)
    out, lse = torch.ops.chunkattn.select_merge(
        q, k, v, indices.contiguous(), region_size, merge, scale, _deterministic(deterministic)
    )
    result = (out, *((lse,) if return_lse else ()), *((indices,) if return_indices else ()))
    return result if len(result) > 1 else out


def _selection_rows(name: str, rows: Tensor | None, like_name: str, like: Tensor) -> Tensor:
    """The rows to select on: those given, which must be like the ones they replace, or these."""
    if rows is None:
        return like
    _check_tensors(**{name: rows})
    if rows.shape != like.shape:
        shapes = f"{list(like.shape)}, got {list(rows.shape)}"
        raise ValueError(f"chunkattn: {name} must have the shape of {like_name}, {shapes}")
    for what in ("dtype", "device"):
        ours, theirs = getattr(rows, what), getattr(like, what)
        if ours != theirs:
            raise ValueError(f"chunkattn: {name} must have the {what} of {like_name}, {theirs}, got {ours}")
    return rows


def _check_index_heads(indices: Tensor, heads: str, q: Tensor, k: Tensor) -> None:
    """The operator tells the two modes apart by the shape of indices: it must be the one that was asked for."""
    if heads not in ("kv", "q"):
        raise ValueError(f"chunkattn: heads must be 'kv' or 'q', got {heads!r}")
    name, like = ("k", k) if heads == "kv" else ("q", q)
    if indices.dim() == like.dim() == 4 and indices.shape[1] != like.shape[2]:
        raise ValueError(
            f"chunkattn: indices must have a list for each head of {name}, {like.shape[2]}, with heads={heads!r}, "
            f"got shape {list(indices.shape)}"
        )
