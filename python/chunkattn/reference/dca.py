"""Dual Chunk Attention in plain torch: the oracle the kernels are tested against.

Written from the definition (arXiv 2402.17463) and sharing no code with the kernels. Runs on any device in any floating
dtype, float64 included, and is differentiable. Time and work grow with Sq * Sk; the logits are formed for a block of
queries at a time, so that without gradients memory stays bounded.
"""

import math

import torch
from torch import Tensor

# Logits held at once. Blocks of queries are cut to it.
_LOGITS_PER_BLOCK = 1 << 23


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first ``2 * cos.shape[-1]`` dimensions of each head by one table row per token.

    Args:
        x: [B, S, H, D].
        cos, sin: [S, rotary_dim / 2], the row of each token.
        interleaved: pair dimensions (2d, 2d + 1), as GPT-J, instead of (d, d + rotary_dim / 2), as NeoX.

    Returns:
        [B, S, H, D] in the dtype of x, in which all arithmetic is done.
    """
    half = cos.shape[-1]
    cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in (cos, sin))
    rotated, passed = x.split([2 * half, x.shape[-1] - 2 * half], dim=-1)
    if interleaved:
        first, second = rotated.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = rotated.unflatten(-1, (2, half)).unbind(-2)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((rotated, passed), dim=-1)


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
    """Dual Chunk Attention with the arguments of :func:`chunkattn.dca`, computed in the dtype of q.

    Whether gradients repeat bit by bit is up to torch: ``deterministic`` has no effect.

    Returns:
        out [B, Sq, Hq, D] in the dtype of q and, with return_lse, the log-sum-exp of the logits [B, Hq, Sq] in float32
        (float64 for float64 inputs).
    """
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    stride = chunk_size - local_size
    logit_scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if isinstance(temperature, Tensor):
        logit_scale = (logit_scale * temperature.to(q.dtype)).view(-1, 1, 1, 1, 1)
    elif temperature is not None:
        logit_scale = logit_scale * temperature

    key_positions = torch.arange(seqlen_k, device=q.device)
    if not k_rotated:
        key_rows = key_positions % stride
        k = rotate(k, cos[key_rows], sin[key_rows], interleaved)

    outputs, lses = [], []
    block = max(1, _LOGITS_PER_BLOCK // max(1, batch * heads * seqlen_k))
    for begin in range(0, seqlen_q, block):
        q_block = q[:, begin : begin + block]
        count = q_block.shape[1]
        positions = seqlen_k - seqlen_q + begin + torch.arange(count, device=q.device)
        rows = positions % stride
        chunks_apart = positions[:, None] // stride - key_positions // stride

        logits = q.new_full((), -torch.inf)
        for regime, query_rows in (
            (chunks_apart == 0, rows),
            (chunks_apart == 1, (rows + stride).clamp(max=chunk_size)),
            (chunks_apart >= 2, torch.full_like(rows, min(2 * stride - 1, chunk_size))),
        ):
            turn = query_rows - rows if q_rotated else query_rows
            q_turned = rotate(q_block, cos[turn], sin[turn], interleaved)
            q_grouped = q_turned.unflatten(2, (kv_heads, heads // max(1, kv_heads)))
            products = torch.einsum("bnhgd,bmhd->bhgnm", q_grouped, k) * logit_scale
            logits = torch.where(regime, products, logits)
        logits = logits.masked_fill(key_positions > positions[:, None], -torch.inf)

        block_out = torch.einsum("bhgnm,bmhd->bnhgd", logits.softmax(dim=-1), v)
        outputs.append(block_out.flatten(2, 3))
        lses.append(logits.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(dim=-1).flatten(1, 2))

    out = torch.cat(outputs, dim=1) if outputs else torch.zeros_like(q)
    if not return_lse:
        return out
    if not lses:
        return out, out.new_zeros(batch, heads, 0, dtype=torch.promote_types(q.dtype, torch.float32))
    return out, torch.cat(lses, dim=2)
