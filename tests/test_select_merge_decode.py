"""SelectMergeCache against the float64 oracle, on every device, in every layout of the cache."""

import pytest
import torch
from caches import assert_lse_within_rule, lengths, poison, raw_bytes
from cases import dtypes, skip_without_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from select_merge_cases import CASE, LONG, SelectMergeCase, random_sizes
from tolerance import assert_within_rule
from torch import Tensor

import chunkattn

# Pages of one region, of several, and of as many as a group has.
PAGES = [None, 1, 3, 5]


@pytest.fixture
def device(device):
    return skip_without_kernels(device, "select_merge_with_kvcache")


def cache_options(case: SelectMergeCase, selection: str = "causal") -> dict:
    names = ("region_size", "top_k", "merge", "eligibility")
    return {name: getattr(case, name) for name in names} | {"heads": case.heads_mode, "selection": selection}


def make_cache(
    case: SelectMergeCase,
    capacity: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    regions_per_page: int | None = None,
    heads_first: bool = False,
    selection: str = "causal",
) -> chunkattn.SelectMergeCache:
    """A cache with NaN and ids of no region in every slot that was never written. Pages are shuffled."""
    pages = {}
    if regions_per_page is not None:
        page_size = regions_per_page * case.region_size
        width = -(-capacity // page_size)
        order = torch.randperm(case.batch * width + 3, generator=torch.Generator().manual_seed(case.seed))
        table = order[: case.batch * width].int().reshape(case.batch, width).to(device)
        pages = {"page_size": page_size, "num_pages": len(order), "block_table": table}
    cache = chunkattn.SelectMergeCache(
        case.batch, case.kv_heads, case.head_dim, capacity, query_heads=case.heads, dtype=dtype, device=device,
        **cache_options(case, selection), **pages,
    )  # fmt: skip
    if heads_first:
        for name in ("k", "v"):
            setattr(cache, name, getattr(cache, name).transpose(1, 2).contiguous().transpose(1, 2))
    for tensor in (cache.k, cache.v, cache.region_sums, cache.query_sums):
        poison(tensor)
    cache.indices.fill_(1 << 30)
    return cache


def inputs(case: SelectMergeCase, dtype: torch.dtype, device: torch.device) -> dict:
    """Rows to attend with, and others to select on: multiples of the region size, so that means and scores are exact,
    and what ties in one dtype ties in all."""
    q, k, v = case.inputs(dtype, 3, device)
    drawn = case.but(integers=True, seed=case.seed + 1).inputs(dtype, 2, device)
    select_q, select_k = (x / 12 * case.region_size for x in drawn)
    return {"q": q, "k": k, "v": v, "select_q": select_q, "select_k": select_k}


def part(rows: dict, begin: int, end: int) -> dict:
    return {name: x[:, begin:end] for name, x in rows.items()}


def run(cache, rows: dict, ends, **options) -> tuple[Tensor, Tensor]:
    """Attends in steps that end at `ends`, and returns out and lse of all of them."""
    outs, lses = [], []
    begin = 0
    for end in ends:
        out, lse = cache.attend(**part(rows, begin, end), **options, return_lse=True)
        outs.append(out)
        lses.append(lse)
        begin = end
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def assert_is_forward(case: SelectMergeCase, rows: dict, result: tuple[Tensor, Tensor], selection: str, **options):
    """Compares out and lse with those of one call of the twin, in float64 and in the dtype of q."""
    (oracle, oracle_lse), (plain, plain_lse) = (
        chunkattn.reference.SelectMergeCache(case.batch, **cache_options(case, selection)).attend(
            **{name: x.to(dtype) for name, x in rows.items()}, **options, return_lse=True
        )
        for dtype in (torch.float64, rows["q"].dtype)
    )
    out, lse = result
    assert out.dtype == rows["q"].dtype
    assert lse.dtype == torch.float32
    assert_within_rule(out, oracle, plain, "out")
    assert_lse_within_rule(lse, oracle_lse, plain_lse, rows["q"].dtype)


def every(step: int, seqlen: int, first: int = 0) -> list[int]:
    """Ends of steps: a prompt of `first` tokens, then `step` at a time."""
    return sorted({*range(first or step, seqlen, step), seqlen})


def check_steps(case: SelectMergeCase, device, ends, *, selection="causal", capacity=None, **layout) -> None:
    for dtype in dtypes(device):
        rows = inputs(case, dtype, device)
        cache = make_cache(case, capacity or case.seqlen, device, dtype, selection=selection, **layout)
        result = run(cache, rows, ends)
        assert_is_forward(case, rows, result, selection)
        assert cache.seqlens.tolist() == [case.seqlen] * case.batch


@pytest.mark.parametrize("regions_per_page", PAGES)
@pytest.mark.parametrize("prompt", [1, 47, 100])
def test_prefill_and_steps_equal_one_forward(device, regions_per_page, prompt):
    check_steps(CASE, device, every(1, CASE.seqlen, prompt), regions_per_page=regions_per_page)


@pytest.mark.parametrize("step", [2, 4, 7, 19, 20, 21, 53, 137, 138])
@pytest.mark.parametrize("regions_per_page", [None, 2])
def test_steps_of_any_length_equal_one_forward(device, step, regions_per_page):
    check_steps(CASE, device, every(step, CASE.seqlen), regions_per_page=regions_per_page)


@pytest.mark.parametrize("heads_mode", ["kv", "q"])
@pytest.mark.parametrize("eligibility", ["group", "row"])
@pytest.mark.parametrize("selection", ["causal", "query"])
def test_modes(device, selection, eligibility, heads_mode):
    case = CASE.but(eligibility=eligibility, heads_mode=heads_mode)
    check_steps(case, device, every(1, case.seqlen, 40), selection=selection)
    check_steps(case, device, every(31, case.seqlen), selection=selection, regions_per_page=3)


@pytest.mark.parametrize("heads_mode", ["kv", "q"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (8, 1), (40, 2)])
def test_head_ratios(device, heads, kv_heads, heads_mode):
    case = CASE.but(seqlen=70, heads=heads, kv_heads=kv_heads, heads_mode=heads_mode)
    check_steps(case, device, every(1, case.seqlen, 41))
    check_steps(case, device, every(23, case.seqlen))


@pytest.mark.parametrize("head_dim", [2, 17, 64, 80, 128, 255, 256])
def test_head_dims(device, head_dim):
    check_steps(CASE.but(seqlen=90, head_dim=head_dim), device, [81, 82, 87, 90])


# Regions and groups of every size beside each other; groups of one region; lists that hold all there is.
@pytest.mark.parametrize(
    "changes",
    [
        {"merge": 1},
        {"region_size": 1, "merge": 1, "top_k": 5},
        {"region_size": 1, "merge": 17},
        {"region_size": 3},
        {"region_size": 16, "merge": 2, "top_k": 2},
        {"region_size": 20, "merge": 1, "top_k": 1},
        {"top_k": 1},
        {"top_k": 1000},
        {"merge": 1000},
        {"region_size": 1000},
        {"region_size": 1000, "merge": 2**31 - 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("selection", ["causal", "query"])
def test_sizes(device, selection, changes):
    case = CASE.but(**changes)
    check_steps(case, device, [*every(1, 50, 11), 55, 90, 91, case.seqlen], selection=selection)


def test_long_groups_and_lists(device):
    check_steps(LONG, device, [1, 639, 640, 641, 1500, *every(1, LONG.seqlen, 1600)[:20], LONG.seqlen])
    check_steps(LONG, device, every(700, LONG.seqlen), regions_per_page=4)


def test_more_regions_than_are_listed_by_far(device):
    case = SelectMergeCase(seqlen=2500, heads=2, head_dim=64, region_size=2, top_k=40, merge=150)
    check_steps(case, device, [2399, 2400, 2401, 2500])
    case = case.but(seqlen=700, merge=100)
    check_steps(case, device, [650, 651, 700], selection="query")


def test_heads_first_cache(device):
    check_steps(CASE, device, every(1, CASE.seqlen, 77), heads_first=True)


@pytest.mark.parametrize("selection", ["causal", "query"])
def test_room_to_spare(device, selection):
    check_steps(CASE, device, every(9, CASE.seqlen), selection=selection, capacity=CASE.seqlen + 203)


@pytest.mark.parametrize("heads_mode", ["kv", "q"])
def test_rows_are_selected_on_themselves_by_default(device, heads_mode):
    """In float64 no two scores are near; other dtypes are compared with the operator that takes a list for all."""
    case = CASE.but(heads_mode=heads_mode, selection="causal")
    dtype = torch.float64 if device.type == "cpu" else torch.bfloat16
    q, k, v = case.inputs(dtype, 3, device)
    if device.type == "cuda":  # integers, whose scores are exact
        q, k, _ = case.but(integers=True).inputs(dtype, 3, device)
    rows = {"q": q, "k": k, "v": v}
    cache = make_cache(case, case.seqlen, device, dtype)
    out, lse = run(cache, rows, every(1, case.seqlen, 100))
    expected, expected_lse, ids = chunkattn.select_merge(
        q, k, v, **case.options(), return_lse=True, return_indices=True
    )
    assert torch.equal(cache.indices, ids[:, :, -1])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_unrotated_rows_to_select_on(device):
    dtype = dtypes(device)[0]
    rows = inputs(CASE, dtype, device)
    cache = make_cache(CASE, CASE.seqlen, device, dtype)
    run(cache, rows, every(1, CASE.seqlen, 100))
    ids = chunkattn.select(rows["select_q"], rows["select_k"], **CASE.but(selection="causal").options())
    assert torch.equal(cache.indices, ids[:, :, -1])


@pytest.mark.parametrize("selection", ["causal", "query"])
@pytest.mark.parametrize("prompt", [1, 55, 80])
def test_append_leaves_out_the_attention_alone(device, prompt, selection):
    for dtype in dtypes(device):
        rows = inputs(CASE, dtype, device)
        ours, theirs = (make_cache(CASE, CASE.seqlen, device, dtype, selection=selection) for _ in range(2))
        assert ours.append(**part(rows, 0, prompt)) is None
        theirs.attend(**part(rows, 0, prompt))
        for begin in range(prompt, CASE.seqlen):
            step = part(rows, begin, begin + 1)
            assert torch.equal(ours.attend(**step), theirs.attend(**step)), f"token {begin}"
        for name in ("k", "v", "region_sums", "query_sums", "indices", "seqlens"):
            assert torch.equal(raw_bytes(getattr(ours, name)), raw_bytes(getattr(theirs, name))), name


@pytest.mark.parametrize("regions_per_page", [None, 3])
@pytest.mark.parametrize("selection", ["causal", "query"])
def test_sequences_of_different_lengths(device, selection, regions_per_page):
    """Each row of a batch is what it is alone."""
    case = CASE.but(batch=5)
    counts = [[0, 1, 40, 19, 77], [20, 0, 1, 61, 21], [1, 1, 1, 1, 1], [5, 21, 40, 0, 39]]
    for dtype in dtypes(device):
        rows = inputs(case, dtype, device)
        cache = make_cache(case, case.seqlen, device, dtype, selection=selection, regions_per_page=regions_per_page)
        begin = [0] * case.batch
        results = [[] for _ in range(case.batch)]
        for step in counts:
            new = {
                name: torch.stack([x[i, begin[i] :].roll(0, 0)[: max(step)] for i in range(case.batch)])
                if max(begin) + max(step) <= case.seqlen
                else torch.stack([torch.cat((x[i, begin[i] :], x[i]))[: max(step)] for i in range(case.batch)])
                for name, x in rows.items()
            }
            out, lse = cache.attend(**new, new_seqlens=lengths(device, *step), return_lse=True)
            for i, count in enumerate(step):
                assert not out[i, count:].any()
                assert (lse[i, :, count:] == -torch.inf).all()
                results[i].append((out[i, :count], lse[i, :, :count]))
                begin[i] += count
        assert cache.seqlens.tolist() == begin
        for i, end in enumerate(begin):
            one = {name: x[i : i + 1, :end] for name, x in rows.items()}
            outs, lses = zip(*results[i], strict=True)
            result = torch.cat(outs)[None], torch.cat(lses, dim=1)[None]
            assert_is_forward(case.but(batch=1), one, result, selection)


def test_no_output_depends_on_a_later_token(device):
    dtype = dtypes(device)[0]
    rows, others = inputs(CASE, dtype, device), inputs(CASE.but(seed=5), dtype, device)
    for changed_from in (1, 20, 43, 79, 137):
        mixed = {name: torch.cat((x[:, :changed_from], others[name][:, changed_from:]), 1) for name, x in rows.items()}
        outs = [make_cache(CASE, CASE.seqlen, device, dtype).attend(**x)[:, :changed_from] for x in (rows, mixed)]
        assert torch.equal(*outs)


def test_scale_and_given_output(device):
    dtype = dtypes(device)[0]
    rows = inputs(CASE, dtype, device)
    cache = make_cache(CASE, CASE.seqlen, device, dtype)
    out = torch.empty_like(rows["q"][:, 50:])
    first, first_lse = cache.attend(**part(rows, 0, 50), scale=0.3, return_lse=True)
    result, lse = cache.attend(**part(rows, 50, CASE.seqlen), scale=0.3, out=out, return_lse=True)
    assert result is out
    result = torch.cat((first, out), dim=1), torch.cat((first_lse, lse), dim=2)
    assert_is_forward(CASE, rows, result, "causal", scale=0.3)


def test_strided_rows(device):
    """Heads before tokens, as models have them; and parts of a wider tensor."""
    dtype = dtypes(device)[0]
    rows = inputs(CASE, dtype, device)
    result = run(make_cache(CASE, CASE.seqlen, device, dtype), rows, every(1, CASE.seqlen, 100))
    for view in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat((x, x, x), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
        lambda x: torch.nn.functional.pad(x, (0, 0, 1, 2))[:, :, 1:-2],
    ):
        strided = {name: view(x) for name, x in rows.items()}
        again = run(make_cache(CASE, CASE.seqlen, device, dtype), strided, every(1, CASE.seqlen, 100))
        for ours, theirs in zip(again, result, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_empty_steps(device):
    dtype = dtypes(device)[0]
    rows = inputs(CASE, dtype, device)
    cache = make_cache(CASE, CASE.seqlen, device, dtype)
    out, lse = cache.attend(**part(rows, 0, 0), return_lse=True)
    assert out.shape == (2, 0, 4, 24)
    assert lse.shape == (2, 4, 0)
    nobody = make_cache(CASE.but(batch=0), 10, device, dtype)
    assert nobody.attend(**{name: x[:0, :3] for name, x in rows.items()}).shape == (0, 3, 4, 24)
    assert cache.seqlens.tolist() == [0, 0]


def test_reset(device):
    dtype = dtypes(device)[0]
    rows = inputs(CASE, dtype, device)
    cache = make_cache(CASE, CASE.seqlen, device, dtype)
    first = run(cache, rows, [90, 138])
    cache.reset()
    for ours, theirs in zip(run(cache, rows, [90, 138]), first, strict=True):
        assert torch.equal(ours, theirs)


def test_ids_that_are_no_regions_are_ignored(device):
    """The lists are the caller's to overwrite, and may hold anything."""
    dtype = dtypes(device)[0]
    rows = inputs(CASE, dtype, device)
    cache = make_cache(CASE, CASE.seqlen, device, dtype)
    cache.attend(**part(rows, 0, 121))
    ids = torch.tensor([-1, 29, 3, 1 << 30, -(1 << 31), 30, 7], dtype=torch.int32, device=device)
    cache.indices.copy_(ids)
    out = cache.attend(**part(rows, 121, 125))
    full = {name: rows[name][:, :125] for name in ("q", "k", "v")}
    lists = torch.full((2, 2, 7, 7), -1, dtype=torch.int32, device=device)
    lists[:, :, 6] = ids
    oracle, plain = (
        chunkattn.reference.select_merge(*(x.to(kind) for x in full.values()), region_size=4, merge=5, indices=lists)[
            :, 121:
        ]
        for kind in (torch.float64, dtype)
    )
    assert_within_rule(out, oracle, plain, "out")


def test_tokens_beyond_the_capacity_are_dropped_on_cuda(cuda):
    skip_without_kernels(cuda, "select_merge_with_kvcache")
    rows = inputs(CASE, torch.bfloat16, cuda)
    for ends in (every(1, CASE.seqlen, 90), [91, 138]):
        cache = make_cache(CASE, 100, cuda, torch.bfloat16)
        out, lse = run(cache, rows, ends)
        assert cache.seqlens.tolist() == [100, 100]
        assert not out[:, 100:].any()
        assert (lse[:, :, 100:] == -torch.inf).all()
        assert_is_forward(CASE, part(rows, 0, 100), (out[:, :100], lse[:, :, :100]), "causal")


def test_pages_of_nobody_on_cuda(cuda):
    """On a GPU nobody has checked the table: what it lacks is neither read nor written."""
    skip_without_kernels(cuda, "select_merge_with_kvcache")
    rows = inputs(CASE, torch.bfloat16, cuda)
    cache = make_cache(CASE, CASE.seqlen, cuda, torch.bfloat16, regions_per_page=3)
    cache.block_table[1] = torch.tensor([-1, 1 << 30], device=cuda).repeat(6)
    out, lse = run(cache, rows, every(1, CASE.seqlen, 70))
    one = {name: x[:1] for name, x in rows.items()}
    assert_is_forward(CASE.but(batch=1), one, (out[:1], lse[:1]), "causal")
    assert out.isfinite().all()


def test_cuda_graph_replays_over_groups(cuda):
    """A captured step, replayed from an empty cache across all groups; lengths and lists live on the device."""
    skip_without_kernels(cuda, "select_merge_with_kvcache")
    for selection, heads_mode in (("causal", "kv"), ("causal", "q"), ("query", "kv")):
        case = CASE.but(heads_mode=heads_mode)
        rows = inputs(case, torch.bfloat16, cuda)
        cache = make_cache(case, case.seqlen, cuda, torch.bfloat16, selection=selection)
        step = {name: x.clone() for name, x in part(rows, 0, 1).items()}
        cache.attend(**step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, captured_lse = cache.attend(**step, return_lse=True)
        cache.reset()
        outs, lses = [], []
        for begin in range(case.seqlen):
            for name, x in part(rows, begin, begin + 1).items():
                step[name].copy_(x)
            graph.replay()
            outs.append(captured.clone())
            lses.append(captured_lse.clone())
        assert_is_forward(case, rows, (torch.cat(outs, dim=1), torch.cat(lses, dim=2)), selection)


random_decoding = st.builds(
    SelectMergeCase,
    seqlen=st.integers(1, 150),
    **random_sizes,
    eligibility=st.sampled_from(["group", "row"]),
    heads_mode=st.sampled_from(["kv", "q"]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=random_decoding,
    cuts=st.lists(st.integers(0, 150), max_size=8),
    selection=st.sampled_from(["causal", "query"]),
    regions_per_page=st.sampled_from([None, 1, 2, 7]),
    spare=st.integers(0, 40),
)
def test_random(device, case, cuts, selection, regions_per_page, spare):
    ends = sorted({*(cut for cut in cuts if cut < case.seqlen), case.seqlen})
    check_steps(
        case, device, ends, selection=selection, regions_per_page=regions_per_page, capacity=case.seqlen + spare
    )
