"""Gradients of select_merge against those autograd finds for the float64 oracle, on every device."""

import pytest
import torch
from cases import check_backward, dtypes, gradients, skip_without_kernels
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from select_merge_cases import CASE, HEADS, LONG, MODES, SelectMergeCase, random_cases
from test_dca_backward import random_dout
from test_dca_forward import inside_larger, transposed, with_row_gaps
from test_select_merge_forward import random_indices

import chunkattn


@pytest.fixture
def device(device):
    return skip_without_kernels(device, "select", "select_merge", "select_merge_backward")


def with_indices(qkv, case):
    return case.options() | {"indices": chunkattn.select(*qkv[:2], **case.options())}


def check_case(case, device, dtype, **others):
    qkv = case.inputs(dtype, 3, device)
    return check_backward(qkv, random_dout(qkv[0]), with_indices(qkv, case) | others, "select_merge")


def check_all_dtypes(case, device, **others):
    for dtype in dtypes(device):
        check_case(case, device, dtype, **others)


@pytest.mark.parametrize(("eligibility", "selection", "heads_mode"), MODES)
def test_modes(device, eligibility, selection, heads_mode):
    check_all_dtypes(CASE.but(eligibility=eligibility, selection=selection, heads_mode=heads_mode), device)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_heads": 4},
        {"heads": 6, "kv_heads": 1},
        {"merge": 1, "region_size": 5, "seqlen": 63},
        {"region_size": 1, "merge": 1, "seqlen": 25},
        {"top_k": 1000, "heads_mode": "q"},
        {"merge": 1000},
        {"region_size": 1000},
    ],
    ids=str,
)
def test_sizes(device, changes):
    check_all_dtypes(CASE.but(**changes), device)


@pytest.mark.parametrize("seqlen", [1, 3, 9, 10, 18, 19, 28])
def test_lengths_around_region_and_group_boundaries(device, seqlen):
    check_all_dtypes(CASE.but(seqlen=seqlen, region_size=3, merge=3, top_k=2), device)


@pytest.mark.parametrize("changes", [{}, {"region_size": 200, "merge": 2, "top_k": 2}], ids=str)
def test_long_groups_and_lists(device, changes):
    for dtype in dtypes(device)[-2:]:
        check_case(LONG.but(seqlen=1000, **changes), device, dtype)


@pytest.mark.parametrize("head_dim", [1, 7, 64, 80, 128, 256])
def test_head_dims(device, head_dim):
    check_all_dtypes(CASE.but(seqlen=70, head_dim=head_dim), device)


def test_scale(device):
    check_all_dtypes(CASE, device, scale=0.4)


# Regions and rows that the copy engine can bring: several tiles of keys and queries, the last region and group partial.
ALIGNED = SelectMergeCase(seqlen=403, heads=4, kv_heads=2, head_dim=128, region_size=16, top_k=9, merge=5)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 96])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heads_mode": "q"},
        {"seqlen": 1003, "batch": 2, "top_k": 25, "merge": 18},
        {"kv_heads": 4, "region_size": 8, "top_k": 30, "merge": 7},
        {"region_size": 24, "heads": 3, "kv_heads": 1},
        {"region_size": 128, "merge": 1, "top_k": 2},
        {"region_size": 200, "merge": 1, "top_k": 2, "heads_mode": "q", "seqlen": 501},
        {"seqlen": 17, "merge": 1},
    ],
    ids=str,
)
def test_regions_in_boxes(device, head_dim, changes):
    if device.type != "cuda":
        pytest.skip("boxes of keys are the Hopper kernel's")
    case = ALIGNED.but(head_dim=head_dim, **changes)
    for dtype in dtypes(device)[-2:]:
        check_case(case, device, dtype)


@pytest.mark.parametrize("heads_mode", HEADS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_region_that_everybody_lists(device, head_dim, heads_mode):
    # Every group lists the same few regions, each of them several times: all add to the same rows.
    case = ALIGNED.but(head_dim=head_dim, heads_mode=heads_mode)
    shape = (case.batch, case.heads if heads_mode == "q" else case.kv_heads, 6, 20)
    ids = torch.arange(20, dtype=torch.int32, device=device).remainder(3).expand(shape).contiguous()
    for dtype in dtypes(device)[-2:]:
        check_case(case, device, dtype, indices=ids)
        first = check_case(case, device, dtype, indices=ids, deterministic=True)
        qkv = case.inputs(dtype, 3, device)
        options = case.options() | {"indices": ids, "deterministic": True}
        again = gradients(chunkattn.select_merge, qkv, random_dout(qkv[0]), options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "case", [ALIGNED, ALIGNED.but(head_dim=64, heads_mode="q"), ALIGNED.but(region_size=3)], ids=str
)
def test_ids_out_of_range_reach_no_memory(device, case):
    # Whatever lies around the tensors is NaN.
    for dtype in dtypes(device)[-2:]:
        qkv = tuple(inside_larger(x) for x in case.inputs(dtype, 3, device))
        ids = random_indices(case, 20, -3, 30).to(device)
        ids[..., :5] = torch.tensor([-(2**31), 2**31 - 1, 2**27, -(2**20), 2**30], dtype=torch.int32, device=device)
        options = case.options() | {"indices": ids}
        check_backward(qkv, inside_larger(random_dout(qkv[0])), options, "select_merge")


@pytest.mark.parametrize("heads_mode", HEADS)
@pytest.mark.parametrize("count", [0, 1, 30])
def test_given_indices(device, heads_mode, count):
    # In any order, repeated, and out of range.
    case = CASE.but(heads_mode=heads_mode)
    check_all_dtypes(case, device, indices=random_indices(case, count, -2, 40).to(device))


@pytest.mark.parametrize("view", [transposed, with_row_gaps, inside_larger])
def test_strided_views(device, view):
    for dtype in dtypes(device):
        qkv = tuple(view(x) for x in CASE.inputs(dtype, 3, device))
        check_backward(qkv, view(random_dout(qkv[0])), with_indices(qkv, CASE), "select_merge")


def test_expanded_dout(device):
    # What the gradient of sum() looks like: all strides zero.
    for dtype in dtypes(device):
        qkv = CASE.inputs(dtype, 3, device)
        dout = torch.ones((), dtype=dtype, device=device).expand(qkv[0].shape)
        check_backward(qkv, dout, with_indices(qkv, CASE), "select_merge")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(device, wanted):
    qkv = CASE.inputs(dtypes(device)[-1], 3, device)
    options = CASE.options() | {"deterministic": True}
    every = gradients(chunkattn.select_merge, qkv, random_dout(qkv[0]), options)
    for i in wanted:
        qkv[i].requires_grad_()
    chunkattn.select_merge(*qkv, **options).backward(random_dout(qkv[0]))
    for i, x in enumerate(qkv):
        if i in wanted:
            assert torch.equal(x.grad, every[i])
        else:
            assert x.grad is None


def test_no_gradient_flows_through_the_selection(device):
    q, k, v, *others = (x.requires_grad_() for x in CASE.inputs(dtypes(device)[-1], 5, device))
    options = CASE.options() | {"deterministic": True}
    ids = chunkattn.select(*others, **CASE.options())
    out = chunkattn.select_merge(q, k, v, **options, select_q=others[0], select_k=others[1])
    grads = torch.autograd.grad(out.sum(), (q, k, v, *others), allow_unused=True)
    assert grads[3:] == (None, None)
    fixed = chunkattn.select_merge(q, k, v, **options, indices=ids)
    for ours, expected in zip(grads, torch.autograd.grad(fixed.sum(), (q, k, v)), strict=False):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("heads_mode", HEADS)
@pytest.mark.parametrize(
    "case",
    [
        SelectMergeCase(15, 1, 2, 1, 3, 2, 2, 2),
        SelectMergeCase(14, 1, 4, 2, 2, 1, 3, 3),
        SelectMergeCase(13, 2, 2, 2, 3, 4, 1, 1, "row"),
    ],
    ids=str,
)
def test_gradcheck_with_fixed_indices(device, case, heads_mode):
    if torch.float64 not in dtypes(device):
        pytest.skip(f"chunkattn has no float64 on {device.type}")
    case = case.but(heads_mode=heads_mode)
    qkv = tuple(x.requires_grad_() for x in case.inputs(torch.float64, 3, device))
    options = with_indices(qkv, case)
    assert torch.autograd.gradcheck(lambda *x: chunkattn.select_merge(*x, **options), qkv)


def test_keys_that_nobody_attends_have_no_gradient(device):
    # Tokens of a group are attended by the group alone where no list names them.
    case = CASE.but(seqlen=60)
    for dtype in dtypes(device):
        qkv = case.inputs(dtype, 3, device)
        dout = random_dout(qkv[0])
        dout[:, :20] = 0
        ids = torch.full((2, 2, 3, 4), -1, dtype=torch.int32, device=device)
        ids[:, :, 1:, 1] = 3
        _, dk, dv = check_backward(qkv, dout, case.options() | {"indices": ids}, "select_merge")
        for grad in (dk, dv):
            assert (grad[:, :12] == 0).all()
            assert (grad[:, 12:16] != 0).any()
            assert (grad[:, 16:20] == 0).all()


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        LONG.but(seqlen=1000, heads=4, kv_heads=2),
        ALIGNED,
        ALIGNED.but(head_dim=64, heads_mode="q", merge=9),
        ALIGNED.but(head_dim=256, kv_heads=4),
    ],
    ids=str,
)
def test_deterministic_gradients_repeat_bitwise(device, case):
    for dtype in dtypes(device)[-2:]:
        qkv = case.inputs(dtype, 3, device)
        options = with_indices(qkv, case) | {"deterministic": True}
        dout = random_dout(qkv[0])
        first = check_backward(qkv, dout, options, "select_merge")
        for _ in range(3):
            again = gradients(chunkattn.select_merge, qkv, dout, options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_cuda_workspace(cuda):
    # What the kernels use beyond the gradients: float32 tensors of the size of q, k and v, lists and some rows.
    skip_without_kernels(cuda, "select_merge_backward")
    case = SelectMergeCase(seqlen=8192, heads=8, kv_heads=2, head_dim=128, region_size=16, top_k=96, merge=32)
    q, k, v = case.inputs(torch.bfloat16, 3, cuda)
    ids = chunkattn.select(q, k, **case.options())
    out, lse = torch.ops.chunkattn.select_merge(q, k, v, ids, case.region_size, case.merge)
    for deterministic in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = torch.ops.chunkattn.select_merge_backward(
            out, q, k, v, out, lse, ids, case.region_size, case.merge, None, deterministic
        )
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in grads)
        assert peak < 1.05 * 4 * (q.numel() + k.numel() + v.numel())


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cpu_threads(threads, dtype):
    # Queries and keys get shares of their own where KV heads are too few for the threads.
    for batch in (1, 2):
        case = CASE.but(seqlen=500, batch=batch, kv_heads=1)
        qkv = case.inputs(dtype)
        dout, options = random_dout(qkv[0]), with_indices(qkv, case)
        expected = check_backward(qkv, dout, options, "select_merge")
        torch.set_num_threads(threads)
        try:
            grads = gradients(chunkattn.select_merge, qkv, dout, options)
        finally:
            torch.set_num_threads(1)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_nan_stays_in_its_batch_row(device, argument):
    case = CASE.but(batch=3)
    for dtype in dtypes(device):
        qkv = case.inputs(dtype, 3, device)
        options = with_indices(qkv, case) | {"deterministic": True}
        dout = random_dout(qkv[0])
        clean = gradients(chunkattn.select_merge, qkv, dout, options)
        (*qkv, dout)[argument][1] = torch.nan
        dirty = gradients(chunkattn.select_merge, qkv, dout, options)
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(before[::2], after[::2])


@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen": 0}, {"heads": 0, "kv_heads": 0}, {"heads": 0}], ids=str)
def test_zero_sizes(device, empty):
    case = CASE.but(**empty)
    for dtype in dtypes(device):
        qkv = case.inputs(dtype, 3, device)
        grads = gradients(chunkattn.select_merge, qkv, torch.ones_like(qkv[0]), case.options())
        for x, grad in zip(qkv, grads, strict=True):
            assert grad.shape == x.shape
            assert grad.dtype == dtype
            assert (grad == 0).all()


def test_lse_is_not_differentiable(device):
    qkv = tuple(x.requires_grad_() for x in CASE.inputs(dtypes(device)[-1], 3, device))
    out, lse = chunkattn.select_merge(*qkv, **CASE.options(), return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_second_derivative_is_refused(device):
    qkv = tuple(x.requires_grad_() for x in CASE.inputs(dtypes(device)[-1], 3, device))
    out = chunkattn.select_merge(*qkv, **CASE.options())
    (dq,) = torch.autograd.grad(out.square().sum(), qkv[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="select_merge has no second derivative"):
        dq.sum().backward()


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=random_cases, dtype_index=st.integers(0, 3))
def test_random_cases(device, case, dtype_index):
    check_case(case, device, dtypes(device)[dtype_index % len(dtypes(device))])


# What the Hopper kernel takes.
aligned_cases = st.builds(
    SelectMergeCase,
    seqlen=st.integers(1, 900),
    batch=st.integers(1, 2),
    heads=st.just(6),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    head_dim=st.sampled_from([16, 64, 96, 128, 192, 256]),
    region_size=st.sampled_from([8, 16, 24, 32, 64, 128]),
    top_k=st.integers(1, 40),
    merge=st.integers(1, 30),
    heads_mode=st.sampled_from(HEADS),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("part", range(3))
def test_random_aligned_cases_on_cuda(device, part):
    if device.type != "cuda":
        pytest.skip("other alignments have kernels of their own on CUDA only")

    @seed(part)
    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=aligned_cases, deterministic=st.booleans(), wild=st.booleans(), dtype_index=st.integers(0, 1))
    def check(case, deterministic, wild, dtype_index):
        others = {"indices": random_indices(case, case.top_k, -2, 60).to(device)} if wild else {}
        check_case(case, device, dtypes(device)[dtype_index], deterministic=deterministic, **others)

    check()
