"""select against the oracle, on every device: equal, or as good as the rounding of scores can tell."""

import itertools

import pytest
import torch
from cases import dtypes, skip_without_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from select_merge_cases import (
    BOUNDARY_LENGTHS,
    CASE,
    ELIGIBILITIES,
    HEADS,
    MODES,
    SELECTIONS,
    SelectMergeCase,
    assert_selection_is_near,
    check_selection,
    random_cases,
)
from test_dca_forward import inside_larger, sequence_first, transposed, with_row_gaps

import chunkattn


@pytest.fixture
def device(device):
    return skip_without_kernels(device, "select")


def check_all_dtypes(case, device):
    for dtype in dtypes(device):
        check_selection(*case.inputs(dtype, 2, device), case.options())


@pytest.mark.parametrize(("eligibility", "selection", "heads_mode"), MODES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 4},
        {"heads": 6, "kv_heads": 1},
        {"top_k": 1},
        {"merge": 1},
        {"region_size": 1, "seqlen": 61},
        {"region_size": 1, "merge": 1, "seqlen": 61},
        {"top_k": 1000},
        {"merge": 1000},
        {"region_size": 1000},
        {"head_dim": 1},
        {"head_dim": 130, "region_size": 16, "merge": 2},
    ],
    ids=str,
)
def test_modes(device, changes, eligibility, selection, heads_mode):
    case = CASE.but(eligibility=eligibility, selection=selection, heads_mode=heads_mode, **changes)
    check_all_dtypes(case, device)


@pytest.mark.parametrize("seqlen", BOUNDARY_LENGTHS)
def test_lengths_around_region_and_group_boundaries(device, seqlen):
    for eligibility, selection in itertools.product(ELIGIBILITIES, SELECTIONS):
        case = CASE.but(seqlen=seqlen, region_size=3, merge=3, top_k=2, eligibility=eligibility, selection=selection)
        check_all_dtypes(case, device)


@pytest.mark.parametrize(("eligibility", "selection", "heads_mode"), MODES)
def test_ties(device, eligibility, selection, heads_mode):
    # Small integers score exactly the same again and again: the lowest index decides, in every dtype.
    modes = {"eligibility": eligibility, "selection": selection, "heads_mode": heads_mode}
    for head_dim, top_k in ((1, 4), (3, 7), (3, 1)):
        case = CASE.but(head_dim=head_dim, top_k=top_k, integers=True, **modes)
        for dtype in dtypes(device):
            q, k = case.inputs(dtype, 2, device)
            expected = chunkattn.reference.select(q.double(), k.double(), **case.options())
            assert torch.equal(chunkattn.select(q, k, **case.options()), expected)


def test_zeros_of_both_signs_tie(device):
    q = torch.ones(1, 40, 1, 2, dtype=dtypes(device)[-1], device=device)
    k = torch.zeros_like(q)
    k[:, ::3] = -0.0
    ids = chunkattn.select(q, k, region_size=1, top_k=3, merge=10)
    assert ids[0, 0].tolist() == [[-1] * 3, [0, 1, 2], [0, 1, 2], [0, 1, 2]]


SCORES = {
    "rising": lambda n: torch.arange(n),
    "falling": lambda n: -torch.arange(n),
    "equal": lambda n: torch.zeros(n),
    "sawtooth": lambda n: torch.arange(n) % 37,
    "two levels": lambda n: (torch.arange(n) % 5 == 4).int(),
    "best at the end": lambda n: (torch.arange(n) > n - 40).int(),
}


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("top_k", [1, 2, 100, 600])
def test_a_long_stream_of_scores(device, scores, top_k):
    # Every region is a token that scores a small integer, exact in float16: many come and go, or tie.
    n = 2000
    k = SCORES[scores](n).to(device, torch.float16)[None, :, None, None]
    q = torch.ones_like(k)
    for dtype in dtypes(device):
        if dtype == torch.bfloat16:
            continue  # does not hold these integers
        options = {"region_size": 1, "top_k": top_k, "merge": 400}
        expected = chunkattn.reference.select(q.double(), k.double(), **options)
        assert torch.equal(chunkattn.select(q.to(dtype), k.to(dtype), **options), expected)


@pytest.mark.parametrize("eligibility", ELIGIBILITIES)
@pytest.mark.parametrize(
    ("seqlen", "top_k", "merge"),
    [(1500, 3, 64), (1500, 300, 300), (1500, 725, 730), (4400, 4150, 4200)],
)
def test_many_regions_and_rows(device, seqlen, top_k, merge, eligibility):
    case = SelectMergeCase(seqlen, 1, 2, 1, 16, 1, top_k, merge, eligibility)
    q, k = case.inputs(dtypes(device)[-2], 2, device)
    check_selection(q, k, case.options())


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 0.99, 1.0, "by group"])
@pytest.mark.parametrize("eligibility", ELIGIBILITIES)
def test_rows_of_a_group_that_agree(device, agreement, eligibility):
    # The more they do, the more ranks the merge has to walk: CUDA tries short lists first.
    case = SelectMergeCase(1450, 1, 2, 1, 64, 1, 130, 48, eligibility)
    for dtype in dtypes(device)[-2:]:
        q, k = case.inputs(torch.float32, 2)
        group = torch.arange(case.seqlen) // case.merge
        share = group / group[-1] if agreement == "by group" else torch.full_like(group, agreement, dtype=torch.float32)
        share = share[:, None, None]
        common = torch.randn(len(group.unique()), *q.shape[2:], generator=torch.Generator().manual_seed(1))
        q = (1 - share).sqrt() * q + share.sqrt() * common[group]
        check_selection(q.to(device, dtype), k.to(device, dtype), case.options())


def test_sizes_up_to_the_limit(device):
    largest = (1 << 31) - 1
    q, k = CASE.inputs(dtypes(device)[-1], 2, device)
    for sizes in ({"region_size": largest}, {"merge": largest}, {"region_size": largest, "merge": largest}):
        ids = chunkattn.select(q, k, **({"region_size": 4, "top_k": 3, "merge": 5} | sizes))
        assert ids.tolist() == [[[[-1] * 3]] * 2] * 2


def test_ranks_come_before_rows_in_the_merge(device):
    # One token a region. The key of region j picks what query row r scores it: rows list [0, 1, 2] and [3, 2, 1].
    q, k = (torch.zeros(1, 6, 1, 2, dtype=dtypes(device)[-1], device=device) for _ in range(2))
    k[0, :4, 0] = torch.tensor([[9.0, 8, 7, 1], [0, 5, 6, 9]]).T
    q[0, 4, 0, 0] = q[0, 5, 0, 1] = 1
    for top_k, expected in {1: [0], 2: [0, 3], 3: [0, 1, 3], 4: [0, 1, 2, 3]}.items():
        assert chunkattn.select(q, k, region_size=1, merge=2, top_k=top_k)[0, 0, 2].tolist() == expected


@pytest.mark.parametrize("eligibility", ELIGIBILITIES)
def test_a_causal_prefix_is_the_whole_of_a_shorter_sequence(device, eligibility):
    case = CASE.but(eligibility=eligibility, selection="causal", integers=True, head_dim=3)
    for dtype in dtypes(device):
        q, k = case.inputs(dtype, 2, device)
        ids = chunkattn.select(q, k, **case.options())
        for length in (1, 19, 20, 21, 100, 117, 137):
            prefix = chunkattn.select(q[:, :length], k[:, :length], **case.options())
            assert torch.equal(prefix, ids[:, :, : prefix.shape[2]])


@pytest.mark.parametrize("view", [transposed, with_row_gaps, inside_larger, sequence_first])
def test_strided_views(device, view):
    for dtype in dtypes(device):
        q, k = CASE.inputs(dtype, 2, device)
        expected = chunkattn.select(q, k, **CASE.options())
        assert torch.equal(chunkattn.select(view(q), view(k), **CASE.options()), expected)


@pytest.mark.parametrize("threads", [2, 5])
def test_cpu_threads(threads):
    q, k = CASE.inputs(torch.float32, 2)
    expected = chunkattn.select(q, k, **CASE.options())
    torch.set_num_threads(threads)
    try:
        assert torch.equal(chunkattn.select(q, k, **CASE.options()), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("argument", [0, 1])
def test_nan_and_infinity_stay_in_their_batch_row(device, poison, argument):
    for dtype in dtypes(device):
        qk = CASE.but(batch=3).inputs(dtype, 2, device)
        clean = chunkattn.select(*qk, **CASE.options())
        qk[argument][1, ::7] = poison
        dirty = chunkattn.select(*qk, **CASE.options())
        assert torch.equal(clean[::2], dirty[::2])
        # What is chosen is still a list of regions.
        for group, ids in enumerate(dirty[1, 0].tolist()):
            kept = [i for i in ids if i != -1]
            assert kept == sorted(set(kept)) == ids[: len(kept)]
            assert len(kept) == min(group * CASE.merge, CASE.top_k)
            assert all(0 <= i < group * CASE.merge for i in kept)


@pytest.mark.parametrize("eligibility", ELIGIBILITIES)
@pytest.mark.parametrize("top_k", [1, 3, 30, 100, 600, 2100])
@pytest.mark.parametrize("highest", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_have_a_place(device, highest, top_k, eligibility):
    # NaN and inf are listed first, -inf last, and each of them ties. Every region is a token.
    n = max(600, top_k + 80)
    k = (torch.arange(n) % 37 - 20).to(device, torch.float16)[None, :, None, None]
    k[:, ::3] = -torch.inf
    k[:, 1::41] = highest
    for sign in (1, 2, 0):  # a query of zeros scores infinities NaN
        q = torch.full_like(k, sign)
        options = {"region_size": 1, "top_k": top_k, "merge": top_k + 20, "eligibility": eligibility}
        expected = chunkattn.reference.select(q.double(), k.double(), **options)
        for dtype in dtypes(device):
            assert torch.equal(chunkattn.select(q.to(dtype), k.to(dtype), **options), expected)


def test_the_largest_top_k_on_cuda(cuda):
    skip_without_kernels(cuda, "select")
    largest = 1 << 20
    q = torch.zeros(1, largest + 2, 1, 1, dtype=torch.float16, device=cuda)
    message = r"top_k must be at most 1048576 on CUDA, or at least the number of regions, 1048578; got 1048577"
    with pytest.raises(ValueError, match=message):
        chunkattn.select(q, q, region_size=1, top_k=largest + 1, merge=1)
    # Where all regions are kept there is no limit.
    ids = chunkattn.select(q, q, region_size=1, top_k=largest + 2, merge=largest)
    assert ids[0, 0, 1, :largest].equal(torch.arange(largest, dtype=torch.int32, device=cuda))
    assert ids[0, 0, 1, largest:].tolist() == [-1, -1]


@pytest.mark.parametrize("heads_mode", HEADS)
@pytest.mark.parametrize("empty", [{"seqlen": 0}, {"batch": 0}, {"heads": 0, "kv_heads": 0}], ids=str)
def test_zero_sizes(device, empty, heads_mode):
    case = CASE.but(heads_mode=heads_mode, **empty)
    for dtype in dtypes(device):
        ids = chunkattn.select(*case.inputs(dtype, 2, device), **case.options())
        index_heads = case.heads if heads_mode == "q" else case.kv_heads
        assert ids.shape == (case.batch, index_heads, -(-case.seqlen // 20), case.top_k)
        assert ids.dtype == torch.int32


def test_no_gradient_flows(device):
    q, k = (x.requires_grad_() for x in CASE.inputs(dtypes(device)[-1], 2, device))
    for ids in (chunkattn.select(q, k, **CASE.options()), torch.ops.chunkattn.select(q, k, 4, 7, 5)):
        assert not ids.requires_grad


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=random_cases, dtype_index=st.integers(0, 3))
def test_random_cases(device, case, dtype_index):
    dtype = dtypes(device)[dtype_index % len(dtypes(device))]
    check_selection(*case.inputs(dtype, 2, device), case.options())


def test_what_a_near_selection_is():
    # One row votes for two of three regions, of which two score within rounding of each other.
    q = torch.ones(1, 4, 1, 1)
    k = torch.tensor([1.0, 2.0, 1.0 + 1e-7, 0.0]).view(1, 4, 1, 1)
    options = {"region_size": 1, "top_k": 2, "merge": 1, "eligibility": "group", "selection": "lookahead"}
    ids = chunkattn.reference.select(q.double(), k.double(), **options)
    assert ids[0, 0, 3].tolist() == [1, 2]

    def judge(*chosen):
        changed = ids.clone()
        changed[0, 0, 3] = torch.tensor(chosen)
        assert_selection_is_near(changed, q, k, **options, heads="kv")

    judge(1, 2)
    judge(0, 1)
    for wrong in ((0, 2), (2, 1), (1, 1), (1, 3), (1, -1), (-1, 1)):
        with pytest.raises(AssertionError):
            judge(*wrong)
