"""The oracle of select-and-merge attention against a second formulation: lists, loops and one pair at a time."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_merge_cases import (
    BOUNDARY_LENGTHS,
    ELIGIBILITIES,
    HEADS,
    MODES,
    SELECTIONS,
    SelectMergeCase,
    dense_causal,
)

from chunkattn.reference import select, select_merge


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def literal_selection(q, k, *, region_size, top_k, merge, eligibility, selection, heads):
    """[b][head][group]: the kept regions, in the order they were kept."""
    batch, seqlen, q_heads, _ = q.shape
    kv_heads = k.shape[2]
    share = q_heads // kv_heads
    regions = math.ceil(seqlen / region_size)
    tokens = [range(a * region_size, min(seqlen, (a + 1) * region_size)) for a in range(regions)]
    q, k = q.tolist(), k.tolist()

    def score(b, head, g, j):
        pairs = [(head, head // share)] if heads == "q" else [(head * share + s, head) for s in range(share)]
        return sum(dot(mean([q[b][i][h] for i in tokens[g]]), mean([k[b][i][n] for i in tokens[j]])) for h, n in pairs)

    def kept(b, head, first):
        lists = []
        for row in range(first, first + merge):
            voter = row if selection == "lookahead" else row - merge
            if not 0 <= voter < regions:
                continue
            limit = first - 1 if eligibility == "group" else row - merge
            scores = {j: score(b, head, voter, j) for j in range(limit + 1)}
            lists.append(sorted(scores, key=lambda j: (-scores[j], j))[:top_k])
        found = []
        for rank in range(top_k):
            for best in lists:
                if rank < len(best) and best[rank] not in found and len(found) < top_k:
                    found.append(best[rank])
        return found

    all_heads = range(q_heads if heads == "q" else kv_heads)
    return [[[kept(b, h, first) for first in range(0, regions, merge)] for h in all_heads] for b in range(batch)]


def literal_attention(q, k, v, kept, *, region_size, merge, scale=None):
    """out and lse; kept as by literal_selection."""
    batch, seqlen, q_heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out, lse = torch.zeros_like(q), q.new_zeros(batch, q_heads, seqlen)
    queries, keys, values = q.tolist(), k.tolist(), v.tolist()
    for b, h, i in itertools.product(range(batch), range(q_heads), range(seqlen)):
        n = h * k.shape[2] // q_heads
        group = i // (region_size * merge)
        regions = kept[b][h * len(kept[b]) // q_heads][group]
        attended = [j * region_size + t for j in regions for t in range(region_size)]
        attended += range(group * region_size * merge, i + 1)
        logits = [scale * dot(queries[b][i][h], keys[b][j][n]) for j in attended]
        largest = max(logits)
        weights = [math.exp(x - largest) for x in logits]
        lse[b, h, i] = largest + math.log(sum(weights))
        for d in range(head_dim):
            out[b, i, h, d] = sum(x * values[b][j][n][d] for x, j in zip(weights, attended, strict=True)) / sum(weights)
    return out, lse


def padded(kept, top_k):
    return torch.tensor(
        [[[sorted(ids) + [-1] * (top_k - len(ids)) for ids in groups] for groups in heads] for heads in kept],
        dtype=torch.int32,
    )


def assert_equals_literal(case):
    q, k, v = case.inputs()
    kept = literal_selection(q, k, **case.options())
    ids = select(q, k, **case.options())
    assert ids.dtype == torch.int32
    torch.testing.assert_close(ids, padded(kept, case.top_k), rtol=0, atol=0)
    out, lse, used = select_merge(q, k, v, **case.options(), return_lse=True, return_indices=True)
    assert torch.equal(used, ids)
    literal_out, literal_lse = literal_attention(q, k, v, kept, region_size=case.region_size, merge=case.merge)
    # The logits of integers reach 12 * 12 * head_dim, and a softmax is off by their rounding.
    atol = 1e-12 if case.integers else 1e-13
    torch.testing.assert_close(out, literal_out, rtol=1e-13, atol=atol)
    torch.testing.assert_close(lse, literal_lse, rtol=1e-13, atol=atol)


@pytest.mark.parametrize(("eligibility", "selection", "heads_mode"), MODES)
@pytest.mark.parametrize(
    "case",
    [
        SelectMergeCase(),
        SelectMergeCase(batch=2, heads=4, kv_heads=2),
        SelectMergeCase(heads=6, kv_heads=2, seqlen=14),
        SelectMergeCase(heads=3, kv_heads=3, seqlen=24),
        SelectMergeCase(seqlen=30, top_k=1),
        SelectMergeCase(seqlen=30, top_k=2, merge=5),
        SelectMergeCase(seqlen=30, top_k=5, merge=2),
        SelectMergeCase(seqlen=20, merge=1),
        SelectMergeCase(seqlen=12, region_size=1),
        SelectMergeCase(seqlen=12, region_size=1, merge=1),
        SelectMergeCase(seqlen=31, region_size=5, merge=2, top_k=2),
        SelectMergeCase(seqlen=13, merge=100),
        SelectMergeCase(seqlen=13, region_size=100),
        SelectMergeCase(seqlen=28, top_k=100),
        SelectMergeCase(seqlen=40, integers=True),
        SelectMergeCase(seqlen=43, integers=True, region_size=4, merge=2, head_dim=1),
    ],
    ids=str,
)
def test_oracle_equals_loops(case, eligibility, selection, heads_mode):
    assert_equals_literal(case.but(eligibility=eligibility, selection=selection, heads_mode=heads_mode))


@pytest.mark.parametrize("seqlen", BOUNDARY_LENGTHS)
def test_oracle_around_region_and_group_boundaries(seqlen):
    for eligibility, selection in itertools.product(ELIGIBILITIES, SELECTIONS):
        case = SelectMergeCase(seqlen=seqlen, region_size=3, top_k=2, eligibility=eligibility, selection=selection)
        assert_equals_literal(case)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        SelectMergeCase,
        seqlen=st.integers(1, 36),
        batch=st.integers(1, 2),
        heads=st.just(4),
        kv_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.integers(1, 3),
        region_size=st.integers(1, 4),
        top_k=st.integers(1, 6),
        merge=st.integers(1, 5),
        eligibility=st.sampled_from(ELIGIBILITIES),
        selection=st.sampled_from(SELECTIONS),
        heads_mode=st.sampled_from(HEADS),
        integers=st.booleans(),
        seed=st.integers(0, 1 << 30),
    )
)
def test_oracle_equals_loops_on_random_cases(case):
    assert_equals_literal(case)


def test_fewer_eligible_regions_than_top_k():
    case = SelectMergeCase(seqlen=24, top_k=9)
    assert select(*case.inputs(count=2), **case.options())[0, 0].tolist() == [
        [-1] * 9,
        [0, 1, 2] + [-1] * 6,
        [0, 1, 2, 3, 4, 5] + [-1] * 3,
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ties_go_to_the_lowest_index(selection):
    case = SelectMergeCase(seqlen=40, selection=selection)
    q, k = (torch.ones_like(x) for x in case.inputs(count=2))
    ids = select(q, k, **case.options())[0, 0].tolist()
    assert ids == [[-1] * 3] + [[0, 1, 2]] * 6


def test_ranks_come_before_rows_in_the_merge():
    # One token a region. The key of region j picks what query row r scores it: rows list [0, 1, 2] and [3, 2, 1].
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0], [0.0, 5.0, 6.0, 9.0]], dtype=torch.float64)
    k = torch.zeros(6, 2, dtype=torch.float64)
    k[:4] = scores.T
    q = torch.zeros(6, 2, dtype=torch.float64)
    q[4, 0] = q[5, 1] = 1
    q, k = q[None, :, None], k[None, :, None]
    for top_k, expected in {1: [0], 2: [0, 3], 3: [0, 1, 3], 4: [0, 1, 2, 3]}.items():
        assert select(q, k, region_size=1, merge=2, top_k=top_k)[0, 0, 2].tolist() == expected


@pytest.mark.parametrize(("eligibility", "selection", "heads_mode"), MODES)
def test_large_top_k_is_dense_causal_attention(eligibility, selection, heads_mode):
    # By "row" and "lookahead" a partial group lacks the rows for which its newest regions would be eligible.
    seqlen = 96 if (eligibility, selection) == ("row", "lookahead") else 103
    case = SelectMergeCase(seqlen, 2, 4, 2, 16, 4, 25, 3, eligibility, selection, heads_mode)
    q, k, v = case.inputs()
    out = select_merge(q, k, v, **case.options())
    torch.testing.assert_close(out, dense_causal(q, k, v), rtol=0, atol=1e-13)


def test_a_partial_group_lacks_rows():
    # The last group starts at region 6 and has one row, which may list region 6 - 3 and before.
    case = SelectMergeCase(seqlen=13, top_k=100, eligibility="row")
    assert select(*case.inputs(count=2), **case.options())[0, 0, 2, :5].tolist() == [0, 1, 2, 3, -1]
    case = case.but(selection="causal")
    assert select(*case.inputs(count=2), **case.options())[0, 0, 2, :7].tolist() == [0, 1, 2, 3, 4, 5, -1]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_first_regions_are_dense_and_later_ones_are_not(selection):
    case = SelectMergeCase(160, 1, 2, 2, 8, 4, 12, 4, selection=selection)
    q, k, v = case.inputs()
    out = select_merge(q, k, v, **case.options())
    dense = dense_causal(q, k, v)
    edge = (case.top_k + case.merge) * case.region_size
    torch.testing.assert_close(out[:, :edge], dense[:, :edge], rtol=0, atol=1e-13)
    assert (out - dense)[:, edge:].abs().amax(dim=(0, 2, 3)).min() > 1e-6


def test_defaults_at_two_thousand_tokens_are_dense():
    case = SelectMergeCase(seqlen=2500, heads=2, kv_heads=1, head_dim=16)
    q, k, v = case.inputs()
    out, indices = select_merge(q, k, v, return_indices=True)
    torch.testing.assert_close(out, dense_causal(q, k, v), rtol=0, atol=1e-13)
    assert indices.shape == (1, 1, 2, 384)


def test_without_merging_each_region_keeps_its_own_best():
    case = SelectMergeCase(seqlen=64, heads=1, region_size=4, merge=1, top_k=3)
    q, k = case.inputs(count=2)
    ids = select(q, k, **case.options())[0, 0]
    scores = q[0, :, 0].view(16, 4, 3).mean(1) @ k[0, :, 0].view(16, 4, 3).mean(1).T
    for region in range(3, 16):
        assert ids[region].tolist() == scores[region, :region].topk(3).indices.sort().values.tolist()


def test_scores_are_summed_over_the_heads_that_share_a_kv_head():
    # Head 0 prefers region 0 by 3, head 1 region 1 by 1.
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 3)[None]
    k = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])[None]
    sizes = {"region_size": 1, "merge": 1, "top_k": 1}
    assert select(q, k, **sizes)[0, :, 2].tolist() == [[0]]
    assert select(q, k, **sizes, heads="q")[0, :, 2].tolist() == [[0], [1]]


@pytest.mark.parametrize("heads_mode", HEADS)
def test_given_indices_replace_the_selection(heads_mode):
    case = SelectMergeCase(batch=2, heads=4, kv_heads=2, heads_mode=heads_mode)
    q, k, v = case.inputs()
    # Unsorted, and of another count than top_k. Groups start at regions 0, 3, 6 and 9, the last region is 10.
    ids = [[[5, 0], [2, 0], [-1, 4], [7, 3]], [[-1, 0], [0, 3], [-7, 11], [8, 1 << 30]]]
    kept = [[[[], [2, 0], [4], [7, 3]], [[], [0], [], [8]]]] * 2
    if heads_mode == "q":
        ids, kept = [*ids, *ids], [[*kept[0], *kept[0]]] * 2
    indices = torch.tensor([ids] * 2, dtype=torch.int32)
    out, lse, used = select_merge(
        q, k, v, **case.options(), indices=indices, scale=0.7, return_lse=True, return_indices=True
    )
    assert used is indices
    literal_out, literal_lse = literal_attention(q, k, v, kept, region_size=2, merge=3, scale=0.7)
    torch.testing.assert_close(out, literal_out, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, literal_lse, rtol=0, atol=1e-13)


def test_no_indices_leave_the_own_group():
    case = SelectMergeCase(seqlen=18)
    q, k, v = case.inputs()
    out = select_merge(q, k, v, **case.options(), indices=torch.empty(1, 1, 3, 0, dtype=torch.int32))
    for begin in (0, 6, 12):
        group = (x[:, begin : begin + 6] for x in (q, k, v))
        torch.testing.assert_close(out[:, begin : begin + 6], dense_causal(*group), rtol=0, atol=1e-13)


def test_selection_on_other_rows():
    case = SelectMergeCase(seqlen=40, batch=2, heads=4, kv_heads=2)
    q, k, v, other_q, other_k = case.inputs(count=5)
    indices = select(other_q, other_k, **case.options())
    assert not torch.equal(indices, select(q, k, **case.options()))
    fixed = select_merge(q, k, v, **case.options(), indices=indices)
    assert torch.equal(select_merge(q, k, v, **case.options(), select_q=other_q, select_k=other_k), fixed)
    for rows in ({"select_q": other_q}, {"select_k": other_k}):
        used = select_merge(q, k, v, **case.options(), **rows, return_indices=True)[1]
        assert torch.equal(used, select(rows.get("select_q", q), rows.get("select_k", k), **case.options()))


def test_what_is_returned():
    case = SelectMergeCase()
    qkv = case.inputs()
    out, lse, indices = select_merge(*qkv, **case.options(), return_lse=True, return_indices=True)
    assert torch.equal(select_merge(*qkv, **case.options()), out)
    for flag, expected in (("return_lse", lse), ("return_indices", indices)):
        returned = select_merge(*qkv, **case.options(), **{flag: True})
        assert len(returned) == 2
        assert torch.equal(returned[0], out)
        assert torch.equal(returned[1], expected)


@pytest.mark.parametrize("heads_mode", HEADS)
def test_oracle_has_the_right_gradients(heads_mode):
    case = SelectMergeCase(seqlen=15, region_size=2, merge=2, top_k=2, heads_mode=heads_mode)
    qkv = tuple(x.requires_grad_() for x in case.inputs())
    indices = select(*qkv[:2], **case.options())

    def function(*x):
        return select_merge(*x, **case.options(), indices=indices, return_lse=True)

    assert torch.autograd.gradcheck(function, qkv)


def test_no_gradient_flows_through_the_selection():
    case = SelectMergeCase(seqlen=40)
    q, k, v, *other = (x.requires_grad_() for x in case.inputs(count=5))
    indices = select(*other, **case.options())
    assert not indices.requires_grad
    out = select_merge(q, k, v, **case.options(), select_q=other[0], select_k=other[1])
    grads = torch.autograd.grad(out.sum(), (q, k, v, *other), allow_unused=True)
    assert grads[3:] == (None, None)
    fixed = select_merge(q, k, v, **case.options(), indices=indices)
    for ours, expected in zip(grads, torch.autograd.grad(fixed.sum(), (q, k, v)), strict=False):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("eligibility", "selection", "heads_mode"), MODES)
def test_causality(eligibility, selection, heads_mode):
    case = SelectMergeCase(47, 1, 2, 1, 3, 2, 3, 4, eligibility, selection, heads_mode)
    qkv = case.inputs()
    out = select_merge(*qkv, **case.options())
    moved_before = False
    for token in range(case.seqlen):
        changed = tuple(x.clone() for x in qkv)
        for x in changed:
            x[:, token:] *= -30
        changed_out = select_merge(*changed, **case.options())
        assert not torch.equal(changed_out[:, token:], out[:, token:])
        group_begin = token // case.group_tokens * case.group_tokens
        assert torch.equal(changed_out[:, :group_begin], out[:, :group_begin])
        moved_before |= not torch.equal(changed_out[:, group_begin:token], out[:, group_begin:token])
    assert moved_before == (selection == "lookahead")


@pytest.mark.parametrize("eligibility", ELIGIBILITIES)
def test_a_causal_prefix_is_the_whole_of_a_shorter_sequence(eligibility):
    case = SelectMergeCase(47, 1, 2, 1, 3, 2, 3, 4, eligibility, "causal")
    qkv = case.inputs()
    out = select_merge(*qkv, **case.options())
    for length in range(1, case.seqlen):
        prefix = select_merge(*(x[:, :length] for x in qkv), **case.options())
        torch.testing.assert_close(prefix, out[:, :length], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_oracle_runs_in_any_dtype(dtype):
    case = SelectMergeCase(120, 2, 4, 2, 16, 4, 5, 4)
    qkv = case.inputs(dtype)
    out, lse, indices = select_merge(*qkv, **case.options(), return_lse=True, return_indices=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The rounded inputs carry the selection: in float32, scores are exact enough to tell these regions apart.
    exact_qkv = tuple(x.double() for x in qkv)
    assert torch.equal(indices, select(*exact_qkv[:2], **case.options()))
    exact = select_merge(*exact_qkv, **case.options())
    assert (out.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps


def test_autocast_leaves_the_scores_in_float32():
    case = SelectMergeCase(400, 1, 2, 1, 16, 2, 4, 4)
    q, k = case.inputs(torch.float32, count=2)
    with torch.autocast("cpu", torch.bfloat16):
        ids = select(q, k, **case.options())
    assert torch.equal(ids, select(q, k, **case.options()))


def test_oracle_in_blocks_equals_oracle_at_once(monkeypatch):
    case = SelectMergeCase(batch=2, heads=4, kv_heads=2, seqlen=45, merge=6)
    qkv = case.inputs()
    at_once = select_merge(*qkv, **case.options(), return_lse=True)
    # At most 5 queries of 12 at a time, fewer where keys are many.
    monkeypatch.setattr(sys.modules["chunkattn.reference.select_merge"], "_LOGITS_PER_BLOCK", 5 * 2 * 4 * 12)
    in_blocks = select_merge(*qkv, **case.options(), return_lse=True)
    torch.testing.assert_close(in_blocks, at_once, rtol=0, atol=1e-14)


def test_strides_are_free():
    case = SelectMergeCase(batch=2, heads=4, kv_heads=2)
    qkv = case.inputs()
    strided = tuple(x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in qkv)
    torch.testing.assert_close(
        select_merge(*strided, **case.options()), select_merge(*qkv, **case.options()), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("empty", [{"seqlen": 0}, {"batch": 0}], ids=["no tokens", "no sequences"])
def test_nothing_to_attend(empty):
    case = SelectMergeCase().but(**empty)
    qkv = case.inputs()
    out, lse, indices = select_merge(*qkv, **case.options(), return_lse=True, return_indices=True)
    assert out.shape == qkv[0].shape
    assert lse.shape == (case.batch, 2, case.seqlen)
    assert indices.shape == (case.batch, 1, -(-case.seqlen // case.group_tokens), case.top_k)


def ids_of(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


# What differs from a good call, and the message.
BAD_CALLS = [
    ({"q": None}, "q must be a tensor, got NoneType"),
    ({"k": [1.0]}, "k must be a tensor, got list"),
    ({"q": lambda x: x[0]}, r"q must have 4 dimensions \[B, N, Hq, D\], got shape \[21, 4, 3\]"),
    ({"k": lambda x: x[0]}, r"k must have 4 dimensions \[B, N, Hkv, D\], got shape \[21, 2, 3\]"),
    ({"q": lambda x: x.long()}, "q must have a floating dtype, got torch.int64"),
    ({"k": lambda x: x.half()}, "k must have the dtype of q, torch.float64, got torch.float16"),
    ({"k": lambda x: x.to("meta")}, "k must be on the device of q, cpu, got meta"),
    ({"k": lambda x: x[:1]}, "k must have the batch size of q, 2, got 1"),
    ({"k": lambda x: x[:, 1:]}, "k must have the length of q, 21, got 20"),
    ({"k": lambda x: x[..., 1:]}, "k must have the head dimension of q, 3, got 2"),
    (
        {"q": lambda x: x[..., :0], "k": lambda x: x[..., :0]},
        r"q must have a head dimension .* got shape \[2, 21, 4, 0",
    ),
    ({"q": lambda x: x[:, :, :3]}, "q must have .* multiple of the heads of k, got 3 and 2"),
    ({"q": lambda x: x[:, :, :1]}, "q must have .* multiple of the heads of k, got 1 and 2"),
    ({"q": lambda x: x[:, :, :0]}, "q must have .* multiple of the heads of k, got 0 and 2"),
    ({"k": lambda x: x[:, :, :0]}, "q must have .* multiple of the heads of k, got 4 and 0"),
    ({"region_size": 0}, "region_size must be at least 1, got 0"),
    ({"region_size": 2.0}, "region_size must be an int, got float"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"top_k": True}, "top_k must be an int, got bool"),
    ({"merge": -1}, "merge must be at least 1, got -1"),
    ({"merge": "3"}, "merge must be an int, got str"),
    ({"eligibility": "rows"}, "eligibility must be 'group' or 'row', got 'rows'"),
    ({"selection": "query"}, "selection must be 'lookahead' or 'causal', got 'query'"),
    ({"heads": None}, "heads must be 'kv' or 'q', got None"),
]

BAD_CALLS_OF_ATTENTION = [
    ({"v": None}, "v must be a tensor, got NoneType"),
    ({"v": lambda x: x[:, 1:]}, r"v must have the shape of k, \[2, 21, 2, 3\], got \[2, 20, 2, 3\]"),
    ({"v": lambda x: x.float()}, "v must have the dtype of k, torch.float64, got torch.float32"),
    ({"v": lambda x: x.to("meta")}, "v must be on the device of k, cpu, got meta"),
    ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    ({"scale": math.inf}, "scale must be positive and finite, got inf"),
    ({"scale": math.nan}, "scale must be positive and finite, got nan"),
    ({"select_q": 1}, "select_q must be a tensor, got int"),
    (
        {"select_q": torch.zeros(2, 21, 2, 3)},
        r"select_q must have the shape of q, \[2, 21, 4, 3\], got \[2, 21, 2, 3\]",
    ),
    (
        {"select_k": torch.zeros(2, 21, 4, 3)},
        r"select_k must have the shape of k, \[2, 21, 2, 3\], got \[2, 21, 4, 3\]",
    ),
    ({"select_k": torch.zeros(2, 21, 2, 3)}, "select_k must have the dtype of k, torch.float64, got torch.float32"),
    ({"indices": [[0]]}, "indices must be a tensor, got list"),
    ({"indices": ids_of(2, 2, 4, 3, dtype=torch.int64)}, "indices must be int32, got torch.int64"),
    ({"indices": ids_of(2, 2, 4, 3).to("meta")}, "indices must be on the device of q, cpu, got meta"),
    ({"indices": ids_of(2, 2, 4)}, r"indices must have shape \[2, 2, 4, C\], got \[2, 2, 4\]"),
    ({"indices": ids_of(2, 2, 3, 3)}, r"indices must have shape \[2, 2, 4, C\], got \[2, 2, 3, 3\]"),
    ({"indices": ids_of(2, 4, 4, 3)}, r"indices must have shape \[2, 2, 4, C\], got \[2, 4, 4, 3\]"),
    ({"indices": ids_of(2, 2, 4, 3), "heads": "q"}, r"indices must have shape \[2, 4, 4, C\], got \[2, 2, 4, 3\]"),
]


def refused(function, names, edits, message):
    case = SelectMergeCase(batch=2, heads=4, kv_heads=2)
    arguments = dict(zip(("q", "k", "v"), case.inputs(), strict=True)) | case.options()
    edited = {name: edit(arguments[name]) if callable(edit) else edit for name, edit in edits.items()}
    arguments = {name: value for name, value in (arguments | edited).items() if name in names or name not in "qkv"}
    with pytest.raises((TypeError, ValueError), match=f"^chunkattn: {message}"):
        function(**arguments)


@pytest.mark.parametrize(("edits", "message"), BAD_CALLS)
def test_select_refuses(edits, message):
    refused(select, "qk", edits, message)


@pytest.mark.parametrize(("edits", "message"), BAD_CALLS + BAD_CALLS_OF_ATTENTION)
def test_select_merge_refuses(edits, message):
    refused(select_merge, "qkv", edits, message)
