"""The key-value cache of select-and-merge attention."""

import torch
from torch import Tensor

from chunkattn._checks import check_int
from chunkattn.functional import _check_kernels, _check_tensors, _selection_rows

_MODES = {"eligibility": ("group", "row"), "selection": ("causal", "query"), "heads": ("kv", "q")}


class SelectMergeCache:
    """Keys and values of sequences that grow, with what select-and-merge attention (arXiv 2410.04211) needs to go on.

    A step costs a token at most (top_k + merge) * region_size keys, whatever the context. With selection="causal", a
    group's regions are chosen once, when its first token arrives, by the query regions of the group before; that reads
    the sums of all regions once in merge * region_size tokens. Steps of any lengths, a whole prompt among them, then
    give what :func:`chunkattn.select_merge` with selection="causal" gives for the whole sequence: a prompt may go
    through :meth:`attend`, or through :func:`chunkattn.select_merge` (in any mode of selection) and :meth:`append`.

    A call enqueues its work and waits for nothing: lengths and region ids live on the device, so a CUDA graph that
    captured a step may be replayed for the steps that follow. All tensors are attributes and keep their addresses.

    Args:
        batch: sequences, B.
        kv_heads: Hkv.
        head_dim: D; on CUDA at most 256.
        capacity: tokens a sequence can have, below 2**31.
        query_heads: Hq, a multiple of kv_heads; needed with heads="q" only.
        region_size, top_k, merge: as in :func:`chunkattn.select`.
        eligibility: as in :func:`chunkattn.select`. With selection="query" and eligibility="row", a token of region g
            may list regions up to g - merge, itself included.
        selection: "causal"; or "query": every token chooses its own top_k regions among those before its group, with
            its query as semantic token. That reads the sums of all regions for every token.
        heads: "kv": one selection per KV head, scores summed over the query heads that share it; "q": one per query
            head, which reads keys and values once for each.
        page_size: tokens of a page, a multiple of region_size. None: each sequence has one block of memory.
        num_pages: of all sequences together, default as many as they can need. For page_size only.
        block_table: int32 [B, ceil(capacity / page_size)], contiguous in its last dimension, the pages of each
            sequence; it is kept, not copied, and may be filled in as sequences grow. Default: pages in order. For
            page_size only.
        dtype: of k and v; default torch.get_default_dtype(). CPU: float64, float32, bfloat16 or float16; CUDA: bfloat16
            or float16.
        device: of all tensors.

    Attributes:
        k, v: [B, capacity, Hkv, D], or in pages [num_pages, page_size, Hkv, D].
        region_sums: [B, Hkv, ceil(capacity / region_size), D], of the keys selected on, over the tokens that exist;
            float32, or float64 for float64. Regions that no token has reached hold anything.
        query_sums: [B, Hkv or Hq, merge, D], the same of the queries of the current group, those of the query heads
            that share a KV head added up; with selection="query" [.., 0, D].
        indices: int32 [B, Hkv or Hq, top_k], the regions of the current group, ascending, then -1; with
            selection="query" those of the last token.
        seqlens: int32 [B], tokens in the cache.
        block_table: int32 [B, pages of a sequence], or None.

        merge and top_k are cut to the regions of the capacity in these shapes.

    Raises:
        TypeError, ValueError: an argument is not what is listed above.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        query_heads: int | None = None,
        region_size: int = 16,
        top_k: int = 384,
        merge: int = 128,
        eligibility: str = "group",
        selection: str = "causal",
        heads: str = "kv",
        page_size: int | None = None,
        num_pages: int | None = None,
        block_table: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity}
        sizes |= {"region_size": region_size, "top_k": top_k, "merge": merge}
        for name, size in sizes.items():
            check_int(f"chunkattn: {name}", size, 0 if name == "batch" else 1)
            if size >= 2**31:
                raise ValueError(f"chunkattn: {name} must be below 2**31, got {size}")
        for name, mode in {"eligibility": eligibility, "selection": selection, "heads": heads}.items():
            if mode not in _MODES[name]:
                words = " or ".join(map(repr, _MODES[name]))
                raise ValueError(f"chunkattn: {name} must be {words}, got {mode!r}")
        self.region_size = region_size
        self.top_k = top_k
        self.merge = merge
        self.eligibility = eligibility
        self.selection = selection
        self.heads = heads
        self.capacity = capacity

        dtype = torch.get_default_dtype() if dtype is None else dtype
        regions = -(-capacity // region_size)
        index_heads = kv_heads if heads == "kv" else _query_heads(query_heads, kv_heads)
        rows = self._allocate_pages(batch, page_size, num_pages, block_table, device)
        sums = torch.promote_types(dtype, torch.float32)
        voters = min(merge, regions) if selection == "causal" else 0
        self.k = torch.zeros(*rows, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.region_sums = torch.zeros(batch, kv_heads, regions, head_dim, dtype=sums, device=device)
        self.query_sums = torch.zeros(batch, index_heads, voters, head_dim, dtype=sums, device=device)
        self.indices = torch.full((batch, index_heads, min(top_k, regions)), -1, dtype=torch.int32, device=device)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)

    def _allocate_pages(
        self,
        batch: int,
        page_size: int | None,
        num_pages: int | None,
        block_table: Tensor | None,
        device: torch.device | str | None,
    ) -> tuple[int, int]:
        """Sets the block table and returns how many pages there are and how many tokens each has."""
        self.block_table = None
        if page_size is None:
            for name, value in {"num_pages": num_pages, "block_table": block_table}.items():
                if value is not None:
                    raise ValueError(f"chunkattn: {name} must be None without page_size, got {type(value).__name__}")
            return batch, self.capacity
        check_int("chunkattn: page_size", page_size, 1)
        if page_size % self.region_size:
            raise ValueError(
                f"chunkattn: page_size must be a multiple of region_size, {self.region_size}, got {page_size}"
            )
        width = -(-self.capacity // page_size)
        if num_pages is None:
            num_pages = batch * width
        check_int("chunkattn: num_pages", num_pages, 0)
        if block_table is None:
            if num_pages < batch * width:
                raise ValueError(
                    f"chunkattn: num_pages must be at least {batch * width}, {width} for each sequence, without a "
                    f"block_table, got {num_pages}"
                )
            block_table = torch.arange(batch * width, dtype=torch.int32, device=device).view(batch, width)
        _check_tensors(block_table=block_table)
        if block_table.shape != (batch, width) or block_table.dtype != torch.int32:
            raise ValueError(
                f"chunkattn: block_table must be int32 of shape [{batch}, {width}], got {block_table.dtype} of shape "
                f"{list(block_table.shape)}"
            )
        self.block_table = block_table
        return num_pages, page_size

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
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends S >= 0 tokens to every sequence, and attends from them to their regions and, causally, their groups.

        Args:
            q: [B, S, Hq, D], rotated by the caller.
            k, v: [B, S, Hkv, D], k rotated by the caller. q, k and v have the dtype and the device of the cache. Their
                last dimension is contiguous, other strides are free.
            select_q, select_k: in the shapes of q and k, the rows to select on instead of q and k: the unrotated ones
                for selection without positions. A sequence should have them at every step or at none.
            new_seqlens: int32 [B], how many of the S tokens a sequence has, its first ones, default all. What follows
                them is not appended; its output is 0 and its log-sum-exp -inf.
            scale: factor of the logits, default 1 / sqrt(D).
            out: [B, S, Hq, D] in the dtype of q, contiguous: written and returned.
            return_lse: also return the log-sum-exp of the logits.

        Returns:
            out [B, S, Hq, D] in the dtype of q and, with return_lse, lse, float32 [B, Hq, S], natural logarithm. On
            CUDA tokens beyond the capacity are dropped, with output 0 and log-sum-exp -inf; so is what would go to a
            page that does not exist.

        Raises:
            TypeError, ValueError: an argument is not what is listed above, or, on the CPU, a sequence would exceed the
                capacity, or a page that it needs does not exist. The cache is unchanged.
            NotImplementedError: this build has no kernels for the device, or an argument requires grad: there is no
                backward through the cache.
        """
        arguments = self._arguments(q, k, v, select_q, select_k, new_seqlens)
        if out is None:
            out, lse = torch.ops.chunkattn.select_merge_with_kvcache(*arguments, scale)
        else:
            _check_tensors(out=out)
            lse = torch.ops.chunkattn.select_merge_with_kvcache.out(*arguments, scale, out)
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
        """Appends tokens as :meth:`attend` does, for example a prompt whose attention came from
        :func:`chunkattn.select_merge`, and leaves out the attention. The queries choose what later tokens attend to.
        """
        torch.ops.chunkattn.select_merge_append(*self._arguments(q, k, v, select_q, select_k, new_seqlens))

    def reset(self) -> None:
        """Makes all sequences empty."""
        self.seqlens.zero_()
        self.indices.fill_(-1)

    def _arguments(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select_q: Tensor | None,
        select_k: Tensor | None,
        new_seqlens: Tensor | None,
    ) -> tuple:
        """As the operators take them."""
        tensors = {"q": q, "k": k, "v": v}
        if new_seqlens is not None:
            tensors["new_seqlens"] = new_seqlens
        _check_tensors(**tensors)
        _check_kernels("select_merge_with_kvcache", q)
        if torch.is_grad_enabled():
            for name, tensor in tensors.items():
                if tensor.requires_grad:
                    raise NotImplementedError(
                        f"chunkattn: {name} requires grad, but there is no backward through the cache; use "
                        "torch.no_grad()"
                    )
        select_q = None if select_q is None else _selection_rows("select_q", select_q, "q", q)
        select_k = None if select_k is None else _selection_rows("select_k", select_k, "k", k)
        return (
            q, k, v, self.k, self.v, self.region_sums, self.query_sums, self.indices, self.seqlens, self.capacity,
            self.region_size, self.merge, self.eligibility, self.selection, self.block_table, select_q, select_k,
            new_seqlens,
        )  # fmt: skip


def _query_heads(query_heads: int | None, kv_heads: int) -> int:
    if query_heads is None:
        raise ValueError("chunkattn: query_heads must be given with heads='q', got None")
    check_int("chunkattn: query_heads", query_heads, 1)
    if query_heads % kv_heads:
        raise ValueError(f"chunkattn: query_heads must be a multiple of kv_heads, {kv_heads}, got {query_heads}")
    return query_heads
