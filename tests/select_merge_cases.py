"""Inputs for the operators of select-and-merge attention, and what a selection is judged by."""

import itertools
from dataclasses import dataclass, fields, replace

import torch
from cases import check_forward
from hypothesis import strategies as st
from torch import Tensor

import chunkattn

ELIGIBILITIES = ("group", "row")
SELECTIONS = ("lookahead", "causal")
HEADS = ("kv", "q")
MODES = list(itertools.product(ELIGIBILITIES, SELECTIONS, HEADS))

# With regions of 3 tokens and groups of 9: around the ends of both.
BOUNDARY_LENGTHS = [1, 2, 3, 4, 8, 9, 10, 11, 12, 17, 18, 19, 26, 27, 28]


@dataclass(frozen=True, repr=False)
class SelectMergeCase:
    """One call. The defaults meet everything: four groups of which the last is partial, as its last region is."""

    seqlen: int = 21
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 3
    region_size: int = 2
    top_k: int = 3
    merge: int = 3
    eligibility: str = "group"
    selection: str = "lookahead"
    heads_mode: str = "kv"
    integers: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "default"

    def but(self, **changes) -> "SelectMergeCase":
        return replace(self, **changes)

    @property
    def group_tokens(self) -> int:
        return self.region_size * self.merge

    def inputs(
        self, dtype: torch.dtype = torch.float64, count: int = 3, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, ...]:
        """q, k, v (and q and k again), standard normal, or integers that tie and whose means over 1 to 4 are exact."""
        generator = torch.Generator().manual_seed(self.seed)
        q_shape = (self.batch, self.seqlen, self.heads, self.head_dim)
        k_shape = (self.batch, self.seqlen, self.kv_heads, self.head_dim)
        shapes = (q_shape, k_shape, k_shape, q_shape, k_shape)[:count]
        if self.integers:
            drawn = (12 * torch.randint(-1, 2, shape, generator=generator) for shape in shapes)
        else:
            drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return tuple(x.to(device, dtype) for x in drawn)

    def options(self) -> dict:
        names = ("region_size", "top_k", "merge", "eligibility", "selection")
        return {name: getattr(self, name) for name in names} | {"heads": self.heads_mode}


# Regions of 4 tokens, groups of 20: seven groups, the last region and group partial.
CASE = SelectMergeCase(seqlen=138, batch=2, heads=4, kv_heads=2, head_dim=24, region_size=4, top_k=7, merge=5)
# Groups of several tiles, and lists of several blocks of keys.
LONG = SelectMergeCase(seqlen=1700, heads=2, head_dim=64, region_size=16, top_k=30, merge=40)

_modes = {
    "eligibility": st.sampled_from(ELIGIBILITIES),
    "selection": st.sampled_from(SELECTIONS),
    "heads_mode": st.sampled_from(HEADS),
    "seed": st.integers(0, 1000),
}
random_sizes = {
    "batch": st.integers(1, 2),
    "heads": st.just(6),
    "kv_heads": st.sampled_from([1, 2, 3, 6]),
    "head_dim": st.integers(1, 70),
    "region_size": st.integers(1, 20),
    "top_k": st.integers(1, 20),
    "merge": st.integers(1, 12),
}
random_cases = st.builds(
    SelectMergeCase,
    seqlen=st.integers(1, 200),
    **random_sizes,
    **_modes,
)
# Sizes that the kernels of Hopper take, several tiles, and lists so long that short ones are tried first.
aligned_cases = st.builds(
    SelectMergeCase,
    seqlen=st.integers(1, 1000),
    batch=st.integers(1, 2),
    heads=st.just(4),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([16, 64, 80, 128, 192, 256]),
    region_size=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]),
    top_k=st.integers(1, 200),
    merge=st.integers(16, 150),
    **_modes,
)


def random_indices(case: SelectMergeCase, count: int, low: int, high: int, seed: int = 0) -> Tensor:
    """[B, H, groups, count] ids in low .. high - 1, in any order and more than once."""
    generator = torch.Generator().manual_seed(seed)
    index_heads = case.heads if case.heads_mode == "q" else case.kv_heads
    shape = (case.batch, index_heads, -(-case.seqlen // case.group_tokens), count)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def check_selection(q: Tensor, k: Tensor, options: dict) -> Tensor:
    """Calls select, judges what it chose by the scores in float64, returns it."""
    ids = chunkattn.select(q, k, **options)
    assert ids.dtype == torch.int32
    assert ids.device == q.device
    expected = chunkattn.reference.select(q.double(), k.double(), **options)
    assert ids.shape == expected.shape
    if not torch.equal(ids, expected):
        assert_selection_is_near(ids.cpu(), q.cpu(), k.cpu(), **options)
    return ids


def check_select_merge(qkv: tuple[Tensor, Tensor, Tensor], options: dict, **others) -> Tensor:
    """Judges what select_merge selects, and compares its output with the oracle's for this selection; `others` are
    options that do not matter to the selection."""
    ids = check_selection(*qkv[:2], options)
    out, used = chunkattn.select_merge(*qkv, **options, **others, return_indices=True)
    assert torch.equal(used, ids)
    assert torch.equal(out, check_forward(qkv, options | others | {"indices": ids}, "select_merge"))
    return out


def assert_selection_is_near(ids, q, k, *, region_size, top_k, merge, eligibility, selection, heads) -> None:
    """Some scores within rounding of the exact ones give this selection, as far as pairs of regions tell: none was kept
    that comes after one that was dropped."""
    kv_heads = k.shape[2] if heads == "kv" else q.shape[2]
    eps = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    scores = _scores(q, k, kv_heads, region_size)
    # Rounding is relative to what is summed, which may cancel.
    slack = 16 * eps * _scores(q.abs(), k.abs(), kv_heads, region_size)
    never = 1 << 62
    for b, h, group in itertools.product(*map(range, ids.shape[:3])):
        first = group * merge
        kept = [i for i in ids[b, h, group].tolist() if i != -1]
        assert kept == sorted(set(kept))
        assert ids[b, h, group, len(kept) :].eq(-1).all()
        assert all(0 <= i < first for i in kept)
        soonest, latest = [torch.full((first,), never) for _ in range(2)]
        voters = range(first, first + merge) if selection == "lookahead" else range(first - merge, first)
        most = 0
        for row, voter in enumerate(voters):
            eligible = first if eligibility == "group" else max(0, first + row - merge + 1)
            if not 0 <= voter < scores.shape[2] or eligible == 0:
                continue
            most = max(most, eligible)
            low, high = ((scores + sign * slack)[b, h, voter, :eligible] for sign in (-1, 1))
            for seen, ahead in ((soonest, low > high[:, None]), (latest, high >= low[:, None])):
                # A region is not ahead of itself.
                rank = (ahead & ~torch.eye(eligible, dtype=torch.bool)).sum(dim=1)
                place = torch.where(rank < top_k, rank * merge + row, never)
                seen[:eligible] = torch.minimum(seen[:eligible], place)
        dropped = torch.ones(first, dtype=torch.bool)
        dropped[kept] = False
        # The row with the most eligible regions lists this many, and with room left nothing that is listed is missing.
        assert len(kept) >= min(top_k, most), f"group {group} keeps {kept}, too few"
        end = min(latest[dropped].tolist(), default=never)
        assert len(kept) == top_k or end == never, f"group {group} keeps {kept} and drops what it lists"
        start = max(soonest[kept].tolist(), default=-1)
        assert start < end, f"group {group} keeps {kept}, of which one comes after one that was dropped"


def _scores(q: Tensor, k: Tensor, kv_heads: int, region_size: int) -> Tensor:
    """[B, H, regions, regions], in float64."""
    region = torch.arange(q.shape[1]) // region_size
    counts = torch.bincount(region)[:, None, None]
    shape = (q.shape[0], len(counts))
    means = [
        torch.zeros(*shape, *x.shape[2:], dtype=torch.float64).index_add_(1, region, x.double()) / counts
        for x in (q, k)
    ]
    q_means, k_means = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in means)
    return torch.einsum("bghd,bjhd->bhgj", q_means, k_means).unflatten(1, (kv_heads, -1)).sum(dim=2)
