"""Decoding with select-and-merge attention in plain torch: what was appended is kept, and everything computed anew."""

import math

import torch
from torch import Tensor

from chunkattn.reference.select_merge import _key_positions, _merge_rows, _region_means, _repeat_heads, select_merge


class SelectMergeCache:
    """The rule of :class:`chunkattn.SelectMergeCache` in the dtype of what is appended, which may be any floating one.

    The rows of each sequence are kept as they came. With selection="causal" a step is the end of one long forward.

    Attributes:
        rows: for each sequence q, k, v and the rows of q and k to select on, [tokens, heads, D].
    """

    def __init__(self, batch: int, **options) -> None:
        """options: region_size, top_k, merge, eligibility, selection, heads."""
        defaults = {"region_size": 16, "top_k": 384, "merge": 128}
        self.options = defaults | {"eligibility": "group", "selection": "causal", "heads": "kv"} | options
        self.rows: list[list[Tensor]] = [[] for _ in range(batch)]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        select_q: Tensor | None = None,
        select_k: Tensor | None = None,
        new_seqlens: Tensor | None = None,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends tokens, then attends from them. Lengths are read on the host."""
        self.append(q, k, v, select_q=select_q, select_k=select_k, new_seqlens=new_seqlens)
        counts = [q.shape[1]] * q.shape[0] if new_seqlens is None else new_seqlens.tolist()
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=lse_dtype)
        attend = self._attend_causal if self.options["selection"] == "causal" else self._attend_query
        for row, count in enumerate(counts):
            if count:
                out[row, :count], lse[row, :, :count] = attend([x[None] for x in self.rows[row]], count, scale)
        return (out, lse) if return_lse else out

    def append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        select_q: Tensor | None = None,
        select_k: Tensor | None = None,
        new_seqlens: Tensor | None = None,
    ) -> None:
        """Appends tokens."""
        new = (q, k, v, q if select_q is None else select_q, k if select_k is None else select_k)
        counts = [q.shape[1]] * q.shape[0] if new_seqlens is None else new_seqlens.tolist()
        for row, count in enumerate(counts):
            rows = [x[row, :count].clone() for x in new]
            self.rows[row] = [
                torch.cat(pair) for pair in zip(self.rows[row] or [x[:0] for x in rows], rows, strict=True)
            ]

    def _attend_causal(self, rows: list[Tensor], count: int, scale: float | None) -> tuple[Tensor, Tensor]:
        q, k, v, select_q, select_k = rows
        out, lse = select_merge(
            q, k, v, **self.options, select_q=select_q, select_k=select_k, scale=scale, return_lse=True
        )
        return out[0, -count:], lse[0, :, -count:]

    def _attend_query(self, rows: list[Tensor], count: int, scale: float | None) -> tuple[Tensor, Tensor]:
        q, k, v, select_q, select_k = rows
        seqlen, heads, head_dim = q.shape[1:]
        region_size, merge = self.options["region_size"], self.options["merge"]
        kv_heads = k.shape[2] if self.options["heads"] == "kv" else heads
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        means = _repeat_heads(_region_means(select_k, region_size), kv_heads)
        keys, values = (_repeat_heads(x, heads)[0] for x in (k, v))
        outs, lses = [], []
        for token in range(seqlen - count, seqlen):
            group = token // (region_size * merge)
            eligible = group * merge
            if self.options["eligibility"] == "row":
                eligible = max(0, token // region_size - merge + 1)
            voter = select_q[0, token].to(means.dtype).unflatten(0, (kv_heads, -1)).sum(dim=1)
            scores = torch.einsum("hd,jhd->hj", voter, means[0, :eligible])
            # One row that may list all of these.
            ids = _merge_rows(scores[None, :, None], self.options["top_k"], 1, "group")
            positions = _key_positions(ids, group * merge * region_size, token + 1, region_size)[0]
            attended = positions.repeat_interleave(heads // kv_heads, dim=0)
            head = torch.arange(heads, device=q.device)[:, None]
            clamped = attended.clamp(max=token)
            logits = torch.einsum("hd,hmd->hm", q[0, token], keys[clamped, head]) * scale
            logits = logits.masked_fill(attended > token, -torch.inf)
            outs.append(torch.einsum("hm,hmd->hd", logits.softmax(dim=-1), values[clamped, head]))
            lses.append(logits.to(means.dtype).logsumexp(dim=-1))
        return torch.stack(outs), torch.stack(lses, dim=1)
