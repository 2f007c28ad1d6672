"""select_merge against the float64 oracle, on every device, in every dtype the device has kernels for."""

import itertools

import pytest
import torch
from cases import check_forward, dtypes, skip_without_kernels
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from select_merge_cases import (
    BOUNDARY_LENGTHS,
    CASE,
    ELIGIBILITIES,
    HEADS,
    LONG,
    MODES,
    SELECTIONS,
    SelectMergeCase,
    aligned_cases,
    check_select_merge,
    dense_causal,
    random_cases,
    random_indices,
)
from test_dca_forward import inside_larger, sequence_first, transposed, with_row_gaps
from tolerance import assert_within_rule

import chunkattn


@pytest.fixture
def device(device):
    return skip_without_kernels(device, "select", "select_merge")


def check_all_dtypes(case, device, **others):
    for dtype in dtypes(device):
        check_select_merge(case.inputs(dtype, 3, device), case.options(), **others)


@pytest.mark.parametrize(("eligibility", "selection", "heads_mode"), MODES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 4},
        {"heads": 6, "kv_heads": 1},
        {"merge": 1, "region_size": 5, "seqlen": 63},
        {"region_size": 1, "merge": 1, "seqlen": 25},
        {"top_k": 1000},
        {"merge": 1000},
        {"region_size": 1000},
    ],
    ids=str,
)
def test_modes(device, changes, eligibility, selection, heads_mode):
    case = CASE.but(eligibility=eligibility, selection=selection, heads_mode=heads_mode, **changes)
    check_all_dtypes(case, device)


@pytest.mark.parametrize("seqlen", BOUNDARY_LENGTHS)
def test_lengths_around_region_and_group_boundaries(device, seqlen):
    check_all_dtypes(CASE.but(seqlen=seqlen, region_size=3, merge=3, top_k=2), device)


@pytest.mark.parametrize(
    "changes",
    [{}, {"seqlen": 1281}, {"merge": 60}, {"region_size": 300, "merge": 2, "top_k": 2}, {"head_dim": 128}],
    ids=str,
)
def test_long_groups_and_lists(device, changes):
    case = LONG.but(**changes)
    for dtype in dtypes(device)[-2:]:
        check_select_merge(case.inputs(dtype, 3, device), case.options())


@pytest.mark.parametrize("head_dim", [1, 2, 7, 33, 64, 65, 80, 128, 192, 256])
def test_head_dims(device, head_dim):
    check_all_dtypes(CASE.but(seqlen=70, head_dim=head_dim), device)


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_scale(device, scale):
    check_all_dtypes(CASE, device, scale=scale)


@pytest.mark.parametrize("heads_mode", HEADS)
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_given_indices(device, heads_mode, count):
    # In any order, repeated, and out of range: negative, of the own group, of later ones, or absurd.
    case = CASE.but(heads_mode=heads_mode)
    ids = random_indices(case, count, -2, 40)
    ids.view(-1)[::11] = 2**31 - 1
    ids.view(-1)[5::13] = -(2**31)
    for dtype in dtypes(device):
        check_forward(case.inputs(dtype, 3, device), case.options() | {"indices": ids.to(device)}, "select_merge")


def test_a_region_listed_twice_counts_twice(device):
    case = CASE.but(seqlen=60)
    ids = random_indices(case, 3, 0, 5)
    for dtype in dtypes(device):
        qkv = case.inputs(dtype, 3, device)
        once, twice = (
            chunkattn.select_merge(*qkv, **case.options(), indices=x.to(device))
            for x in (torch.tensor([0, -1, -1]).int().expand_as(ids), torch.tensor([0, 0, -1]).int().expand_as(ids))
        )
        assert not torch.equal(once[:, 20:], twice[:, 20:])
        check_forward(qkv, case.options() | {"indices": ids.to(device)}, "select_merge")


def test_ignored_ids_change_nothing(device):
    case = CASE.but(seqlen=100)
    for dtype in dtypes(device):
        qkv = case.inputs(dtype, 3, device)
        out, ids = chunkattn.select_merge(*qkv, **case.options(), return_indices=True)
        groups = ids.shape[2]
        own = (torch.arange(groups, dtype=torch.int32, device=device) * case.merge)[:, None]
        for other in (own, own + 1, own + 100, own - 2**31, -2 - own):
            others = other.expand(*ids.shape[:3], 1)
            padded = torch.cat((others, ids, others), dim=-1)
            assert torch.equal(chunkattn.select_merge(*qkv, **case.options(), indices=padded), out)


def test_order_of_ids_is_free(device):
    for dtype in dtypes(device):
        qkv = CASE.inputs(dtype, 3, device)
        ids = chunkattn.select(*qkv[:2], **CASE.options())
        check_forward(qkv, CASE.options() | {"indices": ids.flip(-1)}, "select_merge")


def test_indices_of_any_strides(device):
    qkv = CASE.inputs(dtypes(device)[-1], 3, device)
    out, ids = chunkattn.select_merge(*qkv, **CASE.options(), return_indices=True)
    strided = ids.transpose(1, 3).contiguous().transpose(1, 3)
    assert not strided.is_contiguous()
    assert torch.equal(chunkattn.select_merge(*qkv, **CASE.options(), indices=strided), out)


def test_selection_on_other_rows(device):
    for dtype in dtypes(device):
        q, k, v, other_q, other_k = CASE.inputs(dtype, 5, device)
        for rows in ({"select_q": other_q}, {"select_k": other_k}, {"select_q": other_q, "select_k": other_k}):
            out, ids = chunkattn.select_merge(q, k, v, **CASE.options(), **rows, return_indices=True)
            chosen = chunkattn.select(rows.get("select_q", q), rows.get("select_k", k), **CASE.options())
            assert torch.equal(ids, chosen)
            assert torch.equal(out, chunkattn.select_merge(q, k, v, **CASE.options(), indices=chosen))


def test_what_is_returned(device):
    qkv = CASE.inputs(dtypes(device)[0], 3, device)
    out, lse, indices = chunkattn.select_merge(*qkv, **CASE.options(), return_lse=True, return_indices=True)
    assert lse.dtype == torch.float32
    assert torch.equal(chunkattn.select_merge(*qkv, **CASE.options()), out)
    for flag, expected in (("return_lse", lse), ("return_indices", indices)):
        returned = chunkattn.select_merge(*qkv, **CASE.options(), **{flag: True})
        assert len(returned) == 2
        assert torch.equal(returned[0], out)
        assert torch.equal(returned[1], expected)
    again = chunkattn.select_merge(*qkv, **CASE.options(), indices=indices, return_indices=True)
    assert again[1] is indices


@pytest.mark.parametrize("selection", SELECTIONS)
def test_while_all_regions_fit_it_is_dense_causal_attention(device, selection):
    case = LONG.but(seqlen=700, top_k=30, merge=15, selection=selection)
    for dtype in dtypes(device):
        qkv = case.inputs(dtype, 3, device)
        oracle = dense_causal(*(x.double() for x in qkv))
        assert_within_rule(chunkattn.select_merge(*qkv, **case.options()), oracle, dense_causal(*qkv), "out")


@pytest.mark.parametrize(("eligibility", "selection"), list(itertools.product(ELIGIBILITIES, SELECTIONS)))
def test_causality(device, eligibility, selection):
    # What comes from a token on is changed: nothing before it moves, or with "lookahead" nothing before its group.
    case = SelectMergeCase(47, 1, 2, 1, 3, 2, 3, 4, eligibility, selection)
    for dtype in dtypes(device)[-3:-1]:
        qkv = case.inputs(dtype, 3, device)
        out, lse = chunkattn.select_merge(*qkv, **case.options(), return_lse=True)
        moved_before = False
        for token in range(case.seqlen):
            changed = tuple(x.clone() for x in qkv)
            for x in changed:
                x[:, token:] *= -30
            changed_out, changed_lse = chunkattn.select_merge(*changed, **case.options(), return_lse=True)
            assert not torch.equal(changed_out[:, token:], out[:, token:])
            group_begin = token // case.group_tokens * case.group_tokens
            assert torch.equal(changed_out[:, :group_begin], out[:, :group_begin])
            assert torch.equal(changed_lse[..., :group_begin], lse[..., :group_begin])
            moved_before |= not torch.equal(changed_out[:, group_begin:token], out[:, group_begin:token])
        assert moved_before == (selection == "lookahead")


@pytest.mark.parametrize("view", [transposed, with_row_gaps, inside_larger, sequence_first])
def test_strided_views(device, view):
    for dtype in dtypes(device):
        check_select_merge(tuple(view(x) for x in CASE.inputs(dtype, 3, device)), CASE.options())


def test_views_of_one_projection(device):
    case = CASE.but(kv_heads=4)
    for dtype in dtypes(device):
        q, k, v = torch.stack(case.inputs(dtype, 3, device), dim=2).unbind(2)
        check_select_merge((q, k, v), case.options())


def test_one_kv_head_is_read_in_place(device):
    # Contiguous keys of one head need no copy where regions are neighbours.
    for top_k in (5, 100):
        check_all_dtypes(CASE.but(batch=1, heads=3, kv_heads=1, top_k=top_k), device)


def test_large_logits(device):
    for dtype in dtypes(device):
        out, lse = chunkattn.select_merge(*CASE.inputs(dtype, 3, device), **CASE.options(), scale=60.0, return_lse=True)
        assert out.isfinite().all()
        assert lse.isfinite().all()
    check_select_merge(CASE.inputs(dtypes(device)[0], 3, device), CASE.options(), scale=60.0)


def test_results_repeat_bitwise(device):
    for dtype in dtypes(device):
        qkv = LONG.inputs(dtype, 3, device)
        first = chunkattn.select_merge(*qkv, **LONG.options(), return_lse=True, return_indices=True)
        again = chunkattn.select_merge(*qkv, **LONG.options(), return_lse=True, return_indices=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("threads", [2, 5])
def test_cpu_threads(threads):
    for dtype in dtypes(torch.device("cpu")):
        qkv = CASE.inputs(dtype)
        expected = chunkattn.select_merge(*qkv, **CASE.options(), return_lse=True)
        torch.set_num_threads(threads)
        try:
            results = chunkattn.select_merge(*qkv, **CASE.options(), return_lse=True)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_nan_stays_in_its_batch_row(device, argument):
    for dtype in dtypes(device):
        qkv = CASE.but(batch=3).inputs(dtype, 3, device)
        clean = chunkattn.select_merge(*qkv, **CASE.options(), return_lse=True)
        qkv[argument][1] = torch.nan
        dirty = chunkattn.select_merge(*qkv, **CASE.options(), return_lse=True)
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(before[::2], after[::2])
        assert not dirty[0][1].isfinite().all()


def test_unselected_keys_are_not_read(device):
    # NaN anywhere in them would spread.
    case = CASE.but(batch=1, kv_heads=1, heads=2)
    for dtype in dtypes(device):
        q, k, v = case.inputs(dtype, 3, device)
        ids = chunkattn.select(q, k, **case.options())
        expected = chunkattn.select_merge(q, k, v, **case.options(), indices=ids)
        for group in range(ids.shape[2]):
            begin, end = group * case.group_tokens, min(case.seqlen, (group + 1) * case.group_tokens)
            keep = torch.zeros(case.seqlen, dtype=torch.bool)
            keep[begin:end] = True
            for region in ids[0, 0, group].tolist():
                if region >= 0:
                    keep[region * case.region_size : (region + 1) * case.region_size] = True
            k_poisoned, v_poisoned = k.clone(), v.clone()
            k_poisoned[:, ~keep] = v_poisoned[:, ~keep] = torch.nan
            out = chunkattn.select_merge(q, k_poisoned, v_poisoned, **case.options(), indices=ids)
            assert torch.equal(out[:, begin:end], expected[:, begin:end])


@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen": 0}, {"heads": 0, "kv_heads": 0}, {"heads": 0}], ids=str)
def test_zero_sizes(device, empty):
    case = CASE.but(**empty)
    for dtype in dtypes(device):
        out, lse = chunkattn.select_merge(*case.inputs(dtype, 3, device), **case.options(), return_lse=True)
        assert out.shape == (case.batch, case.seqlen, case.heads, case.head_dim)
        assert lse.shape == (case.batch, case.heads, case.seqlen)
        assert lse.dtype == torch.float32


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=random_cases, dtype_index=st.integers(0, 3))
def test_random_cases(device, case, dtype_index):
    dtype = dtypes(device)[dtype_index % len(dtypes(device))]
    check_select_merge(case.inputs(dtype, 3, device), case.options())


@pytest.mark.parametrize("part", range(3))
def test_random_aligned_cases_on_cuda(device, part):
    if device.type != "cuda":
        pytest.skip("other alignments and whole tiles have kernels of their own on CUDA only")

    @seed(part)
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=aligned_cases, dtype_index=st.integers(0, 1))
    def check(case, dtype_index):
        check_select_merge(case.inputs(dtypes(device)[dtype_index], 3, device), case.options())

    check()
