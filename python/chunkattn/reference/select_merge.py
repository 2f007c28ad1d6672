"""Correlation-aware select-and-merge attention in plain torch: the oracle the kernels are tested against.

Written from the definition (arXiv 2410.04211) and sharing no code with the kernels. Tokens form regions of region_size,
regions form groups of merge, both aligned at token 0, the last ones possibly partial. The queries of a group attend to
the same top_k earlier regions and causally to their own group. One group is worked on at a time, so that without
gradients memory is linear in the length. The time of the selection is quadratic in the number of regions, that of the
attention linear in the length.
"""

import math

import torch
from torch import Tensor

from chunkattn.reference.dca import _LOGITS_PER_BLOCK

_MODES = {"eligibility": ("group", "row"), "selection": ("lookahead", "causal"), "heads": ("kv", "q")}


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
    """The regions each group of queries attends to besides its own, with the arguments of :func:`chunkattn.select`.

    Means and scores are computed in float32, or in float64 for float64 inputs. q and k may have any floating dtype.

    Returns:
        int32 [B, Hkv, groups, top_k], or [B, Hq, groups, top_k] with heads="q".
    """
    _check_modes(region_size, top_k, merge, eligibility=eligibility, selection=selection, heads=heads)
    _check_queries_and_keys(q=q, k=k)
    kv_heads = k.shape[2] if heads == "kv" else q.shape[2]
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        # The scores of the query heads that share a KV head add up to the score of their summed means.
        q_means = _region_means(q, region_size).unflatten(2, (kv_heads, -1)).sum(dim=3)
        k_means = _repeat_heads(_region_means(k, region_size), kv_heads)
        regions = q_means.shape[1]
        selected = []
        for first in range(0, regions, merge):
            voters_begin = first if selection == "lookahead" else max(0, first - merge)
            voters = q_means[:, voters_begin : min(voters_begin + merge, regions)]
            scores = torch.einsum("brhd,bjhd->bhrj", voters, k_means[:, :first])
            selected.append(_merge_rows(scores, top_k, merge, eligibility))
    if not selected:
        return torch.empty(q.shape[0], kv_heads, 0, top_k, dtype=torch.int32, device=q.device)
    return torch.stack(selected, dim=2)


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
    """Select-and-merge attention with the arguments of :func:`chunkattn.select_merge`, computed in the dtype of q.

    q, k and v may have any floating dtype. Whether gradients repeat bit by bit is up to torch: ``deterministic`` has no
    effect.

    Returns:
        out [B, N, Hq, D] in the dtype of q. Then with return_lse the log-sum-exp of the logits [B, Hq, N] in float32
        (float64 for float64 inputs), then with return_indices the region ids.
    """
    _check_modes(region_size, top_k, merge, eligibility=eligibility, selection=selection, heads=heads)
    _check_queries_and_keys(q=q, k=k)
    _check_values(k, v, scale)
    batch, seqlen, query_heads, head_dim = q.shape
    kv_heads = k.shape[2] if heads == "kv" else query_heads
    group_tokens = region_size * merge
    if indices is None:
        select_q, select_k = _selection_rows(q, k, select_q, select_k)
        indices = select(
            select_q, select_k, region_size=region_size, top_k=top_k, merge=merge,
            eligibility=eligibility, selection=selection, heads=heads,
        )  # fmt: skip
    else:
        _check_indices(indices, [batch, kv_heads, -(-seqlen // group_tokens)], q.device)

    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    k, v = _repeat_heads(k, kv_heads), _repeat_heads(v, kv_heads)
    outputs, lses = [], []
    for group, begin in enumerate(range(0, seqlen, group_tokens)):
        end = min(begin + group_tokens, seqlen)
        positions = _key_positions(indices[:, :, group], begin, end, region_size)
        keys, values = _gather(k, positions), _gather(v, positions)
        block = max(1, _LOGITS_PER_BLOCK // max(1, batch * query_heads * positions.shape[-1]))
        for queries in torch.arange(begin, end, device=q.device).split(block):
            q_block = q[:, queries].unflatten(2, (kv_heads, -1))
            logits = torch.einsum("bnhsd,bhmd->bhsnm", q_block, keys) * scale
            future = positions[:, :, None, None, :] > queries[:, None]
            logits = logits.masked_fill(future, -torch.inf)
            out = torch.einsum("bhsnm,bhmd->bnhsd", logits.softmax(dim=-1), values)
            outputs.append(out.flatten(2, 3))
            lses.append(logits.to(_at_least_float32(q)).logsumexp(dim=-1).flatten(1, 2))

    result = [torch.cat(outputs, dim=1) if outputs else torch.zeros_like(q)]
    if return_lse:
        empty = q.new_zeros(batch, query_heads, 0, dtype=_at_least_float32(q))
        result.append(torch.cat(lses, dim=2) if lses else empty)
    if return_indices:
        result.append(indices)
    return tuple(result) if len(result) > 1 else result[0]


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, Hkv, D] as [B, N, heads, D], each head repeated for the query heads that share it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _region_means(x: Tensor, region_size: int) -> Tensor:
    """[B, N, H, D] to the semantic tokens [B, regions, H, D]: means over the tokens that exist."""
    x = x.to(_at_least_float32(x))
    whole = x.shape[1] // region_size
    rows, rest = x.split([whole * region_size, x.shape[1] - whole * region_size], dim=1)
    means = rows.unflatten(1, (whole, region_size)).mean(dim=2)
    return torch.cat((means, rest.mean(dim=1, keepdim=True)), dim=1) if rest.shape[1] else means


def _merge_rows(scores: Tensor, top_k: int, merge: int, eligibility: str) -> Tensor:
    """The regions one group keeps.

    Args:
        scores: [B, H, rows, g0], of each voting row and each region before the group.

    Returns:
        int32 [B, H, top_k], ascending, then -1.
    """
    rows, first = scores.shape[-2:]
    selected = torch.full((*scores.shape[:2], top_k), -1, dtype=torch.int32, device=scores.device)
    if first == 0:
        return selected
    row = torch.arange(rows, device=scores.device)[:, None]
    eligible = torch.full_like(row, first) if eligibility == "group" else (first + row - merge + 1).clamp(min=0)
    # NaN has no order: it counts as the highest score. (Where torch.sort puts it depends on its sign on some devices.)
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    # A row's eligible regions come before the others, so that a stable sort lists them first whatever their scores.
    scores = scores.masked_fill(torch.arange(first, device=scores.device) >= eligible, -torch.inf)
    listed = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]

    # The place of a region in the walk: no two regions are first seen at the same rank and row.
    rank = torch.arange(listed.shape[-1], device=scores.device)
    never = merge * first
    place = torch.where(rank < eligible, rank * merge + row, never).expand_as(listed)
    first_seen = torch.full_like(listed[:, :, 0, :1], never).repeat(1, 1, first)
    first_seen = first_seen.scatter_reduce(-1, listed.flatten(-2), place.flatten(-2), "amin")
    places, regions = first_seen.topk(min(top_k, first), largest=False)
    regions = regions.masked_fill(places == never, first).sort(dim=-1).values
    selected[..., : regions.shape[-1]] = regions.masked_fill(regions == first, -1)
    return selected


def _key_positions(ids: Tensor, begin: int, end: int, region_size: int) -> Tensor:
    """The tokens the group begin .. end - 1 attends to: [B, H, M], ``end`` in the place of an ignored region.

    Args:
        ids: int32 [B, H, C], the group's regions.
    """
    known = (ids >= 0) & (ids < begin // region_size)
    used = known.flatten(0, 1).any(dim=0)
    ids, known = ids[..., used].long(), known[..., used]
    tokens = ids[..., None] * region_size + torch.arange(region_size, device=ids.device)
    tokens = tokens.masked_fill(~known[..., None], end).flatten(-2)
    own = torch.arange(begin, end, device=ids.device).expand(*ids.shape[:2], -1)
    return torch.cat((tokens, own), dim=-1)


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    """[B, N, H, D] at positions [B, H, M], those past the end clamped: [B, H, M, D]."""
    batch, seqlen, heads, _ = x.shape
    batches = torch.arange(batch, device=x.device)[:, None, None]
    return x[batches, positions.clamp(max=seqlen - 1), torch.arange(heads, device=x.device)[:, None]]


def _check(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"chunkattn: {message}")


def _check_modes(region_size: int, top_k: int, merge: int, **modes: str) -> None:
    for name, size in {"region_size": region_size, "top_k": top_k, "merge": merge}.items():
        integer = isinstance(size, int) and not isinstance(size, bool)
        _check(integer, f"{name} must be an int, got {type(size).__name__}", TypeError)
        _check(size >= 1, f"{name} must be at least 1, got {size}")
    for name, mode in modes.items():
        _check(mode in _MODES[name], f"{name} must be {' or '.join(map(repr, _MODES[name]))}, got {mode!r}")


def _check_tensor(tensor: Tensor, name: str) -> None:
    _check(isinstance(tensor, Tensor), f"{name} must be a tensor, got {type(tensor).__name__}", TypeError)


def _check_like(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _check(tensor.dtype == like.dtype, f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}")
    _check(
        tensor.device == like.device, f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}"
    )


def _check_queries_and_keys(*, q: Tensor, k: Tensor) -> None:
    for name, tensor, dimensions in (("q", q, "[B, N, Hq, D]"), ("k", k, "[B, N, Hkv, D]")):
        _check_tensor(tensor, name)
        _check(tensor.dim() == 4, f"{name} must have 4 dimensions {dimensions}, got shape {list(tensor.shape)}")
    _check(q.is_floating_point(), f"q must have a floating dtype, got {q.dtype}")
    _check_like(k, "k", q, "q")
    for dim, what in ((0, "batch size"), (1, "length"), (3, "head dimension")):
        _check(k.shape[dim] == q.shape[dim], f"k must have the {what} of q, {q.shape[dim]}, got {k.shape[dim]}")
    _check(q.shape[3] >= 1, f"q must have a head dimension of at least 1, got shape {list(q.shape)}")
    heads, kv_heads = q.shape[2], k.shape[2]
    _check(
        heads >= kv_heads >= 1 and heads % kv_heads == 0,
        f"q must have a number of heads that is a multiple of the heads of k, got {heads} and {kv_heads}",
    )


def _check_values(k: Tensor, v: Tensor, scale: float | None) -> None:
    _check_tensor(v, "v")
    _check(v.shape == k.shape, f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    _check_like(v, "v", k, "k")
    _check(scale is None or 0 < scale < math.inf, f"scale must be positive and finite, got {scale}")


def _selection_rows(q: Tensor, k: Tensor, select_q: Tensor | None, select_k: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = []
    for name, tensor, like_name, like in (("select_q", select_q, "q", q), ("select_k", select_k, "k", k)):
        if tensor is not None:
            _check_tensor(tensor, name)
            shapes = f"{list(like.shape)}, got {list(tensor.shape)}"
            _check(tensor.shape == like.shape, f"{name} must have the shape of {like_name}, {shapes}")
            _check_like(tensor, name, like, like_name)
        rows.append(like if tensor is None else tensor)
    return rows[0], rows[1]


def _check_indices(indices: Tensor, leading: list[int], device: torch.device) -> None:
    _check_tensor(indices, "indices")
    _check(indices.dtype == torch.int32, f"indices must be int32, got {indices.dtype}")
    _check(indices.device == device, f"indices must be on the device of q, {device}, got {indices.device}")
    _check(
        indices.dim() == 4 and list(indices.shape[:3]) == leading,
        f"indices must have shape [{', '.join(map(str, leading))}, C], got {list(indices.shape)}",
    )
