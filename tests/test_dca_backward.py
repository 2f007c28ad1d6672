"""Gradients of dca against those autograd finds for the float64 oracle, on every device."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Case, assert_same_gradients, check_backward, dtypes, gradients
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_dca_forward import LONG, ZERO_SIZES, inside_larger, random_cases, transposed, with_row_gaps
from torch.utils._python_dispatch import TorchDispatchMode

import chunkattn


def random_dout(q: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q.device, q.dtype)


def check_all_dtypes(case: Case, device: torch.device) -> None:
    options = case.options(device)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        check_backward(qkv, random_dout(qkv[0]), options)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_lengths_around_chunk_boundaries(device, chunks, beyond):
    check_all_dtypes(LONG.but(seqlen_q=chunks * LONG.stride + beyond), device)


@pytest.mark.parametrize("length", [1, 2, 27, 28, 54, 55, 81, 82])
def test_lengths_of_short_chunks(device, length):
    check_all_dtypes(Case(seqlen_q=length), device)


@pytest.mark.parametrize("local_size", range(1, 17))
def test_every_local_size(device, local_size):
    check_all_dtypes(Case(seqlen_q=60, chunk_size=17, local_size=local_size), device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (8, 1)])
def test_head_ratios(device, heads, kv_heads):
    check_all_dtypes(Case(heads=heads, kv_heads=kv_heads), device)


@pytest.mark.parametrize("seqlen_q", [1, 17, 65, 130])
@pytest.mark.parametrize("seqlen_k", [130, 248])
def test_queries_against_a_longer_cache(device, seqlen_q, seqlen_k):
    check_all_dtypes(LONG.but(seqlen_q=seqlen_q, seqlen_k=seqlen_k), device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (32, 6), (40, 30), (7, 4)])
def test_partial_rotary(device, head_dim, rotary_dim, interleaved):
    check_all_dtypes(Case(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved), device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("q_rotated", [False, True])
@pytest.mark.parametrize("k_rotated", [False, True])
def test_rotated_inputs(device, interleaved, q_rotated, k_rotated):
    case = Case(seqlen_q=81, seqlen_k=90, interleaved=interleaved, q_rotated=q_rotated, k_rotated=k_rotated)
    check_all_dtypes(case, device)


@pytest.mark.parametrize(("scale", "temperature"), [(0.1, None), (None, 1.7), (0.3, (0.4, 2.5))])
def test_scale_and_temperature(device, scale, temperature):
    check_all_dtypes(Case(scale=scale, temperature=temperature), device)


@pytest.mark.parametrize("scale", [1e-35, 1e-9, 5.0])
def test_extreme_scales(device, scale):
    # Kernels may divide log-sum-exps by the scale; with the last one softmax is nearly one-hot.
    check_all_dtypes(Case(scale=scale, head_dim=128), device)


@pytest.mark.parametrize("head_dim", [2, 8, 17, 64, 72, 100, 128, 192, 256])
def test_head_dims(device, head_dim):
    check_all_dtypes(Case(seqlen_q=70, head_dim=head_dim), device)


@pytest.mark.parametrize("view", [transposed, with_row_gaps, inside_larger])
def test_strided_views(device, view):
    case = Case(seqlen_q=81, seqlen_k=100)
    options = case.options(device)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        check_backward(tuple(view(x) for x in qkv), view(random_dout(qkv[0])), options)


def test_expanded_dout(device):
    # What the gradient of sum() looks like: all strides zero.
    case = Case()
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        dout = torch.ones((), dtype=dtype, device=device).expand(qkv[0].shape)
        check_backward(qkv, dout, case.options(device))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(device, wanted):
    case = Case(deterministic=True)
    options = case.options(device)
    qkv = case.inputs(device, dtypes(device)[1])
    every = gradients(chunkattn.dca, qkv, random_dout(qkv[0]), options)
    for i in wanted:
        qkv[i].requires_grad_()
    chunkattn.dca(*qkv, **options).backward(random_dout(qkv[0]))
    for i, x in enumerate(qkv):
        if i in wanted:
            assert torch.equal(x.grad, every[i])
        else:
            assert x.grad is None


@pytest.mark.parametrize(
    "case",
    [
        Case(seqlen_q=13, batch=1, heads=2, kv_heads=1, head_dim=4, chunk_size=7, local_size=2),
        Case(seqlen_q=5, seqlen_k=13, batch=1, heads=1, kv_heads=1, head_dim=6, chunk_size=6, local_size=4),
        Case(seqlen_q=9, batch=2, heads=2, kv_heads=2, head_dim=5, rotary_dim=2, chunk_size=5, local_size=1)
        .but(temperature=(0.8, 1.4), interleaved=True),
        Case(seqlen_q=9, batch=1, heads=2, kv_heads=1, head_dim=4, chunk_size=6, local_size=2)
        .but(q_rotated=True, k_rotated=True, scale=0.9),
    ],
    ids=str,
)  # fmt: skip
def test_gradcheck(device, case):
    if torch.float64 not in dtypes(device):
        pytest.skip(f"chunkattn has no float64 on {device.type}")
    options = case.options(device)
    qkv = tuple(x.requires_grad_() for x in case.inputs(device, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: chunkattn.dca(*x, **options), qkv)


@pytest.mark.parametrize(
    "case",
    [
        LONG.but(seqlen_q=300, batch=2, heads=4, kv_heads=2),
        LONG.but(seqlen_q=1500, heads=8, head_dim=128, chunk_size=400),
        LONG.but(seqlen_q=700, seqlen_k=900, head_dim=256, q_rotated=True, k_rotated=True),
        LONG.but(seqlen_q=500, head_dim=50),
    ],
    ids=str,
)
def test_deterministic_gradients_repeat_bitwise(device, case):
    options = case.but(deterministic=True).options(device)
    for dtype in dtypes(device)[-2:]:
        qkv = case.inputs(device, dtype)
        dout = random_dout(qkv[0])
        first = check_backward(qkv, dout, options)
        for _ in range(5):
            again = gradients(chunkattn.dca, qkv, dout, options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("default", [False, True])
def test_deterministic_follows_torch_unless_said(device, asked, default):
    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function in (torch.ops.chunkattn.dca.default, torch.ops.chunkattn.dca_backward.default):
                names = [argument.name for argument in function._schema.arguments]
                called.append((function.name(), dict(zip(names, arguments, strict=False)).get("deterministic", False)))
            return function(*arguments, **(keywords or {}))

    called = []
    case = Case(seqlen_q=20)
    qkv = case.inputs(device, dtypes(device)[-1])
    options = case.options(device) | {"deterministic": asked}
    torch.use_deterministic_algorithms(default)
    try:
        with Spy():
            gradients(chunkattn.dca, qkv, random_dout(qkv[0]), options)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = default if asked is None else asked
    assert called == [("chunkattn::dca", expected), ("chunkattn::dca_backward", expected)]


def workspace_of(q, k, v, arguments, deterministic) -> int:
    """What dca_backward allocates beside the gradients, in bytes."""
    out, lse = torch.ops.chunkattn.dca(q, k, v, *arguments)
    dout = random_dout(q)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.ops.chunkattn.dca_backward(dout, q, k, v, out, lse, *arguments, deterministic)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in grads)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("heads", "dqs"), [(4, 3), (40, 1)])
def test_cuda_workspace(cuda, heads, dqs, deterministic):
    # In float32 tensors of the size of q. 40 heads are worked on in groups, unless additions to dq have an order.
    case = Case(seqlen_q=8192, batch=1, heads=heads, kv_heads=heads, head_dim=128, chunk_size=3072, local_size=512)
    arguments = (*case.options(cuda).values(),)[:-1]
    used = workspace_of(*case.inputs(cuda, torch.bfloat16), arguments, deterministic)
    assert used < (3 if deterministic else dqs) * 4 * case.seqlen_q * heads * case.head_dim


# Work and keys enough for two groups of heads.
LONG_CALLS = [
    Case(seqlen_q=8192, batch=1, heads=32, kv_heads=16, head_dim=128, chunk_size=3072, local_size=512),
    Case(seqlen_q=6000, batch=1, heads=50, kv_heads=25, head_dim=128, chunk_size=2000, local_size=300, k_rotated=True),
    Case(seqlen_q=8000, batch=3, heads=6, kv_heads=6, head_dim=128, chunk_size=3072, temperature=(0.5, 1.0, 1.5)),
    Case(seqlen_q=4096, seqlen_k=12000, batch=2, heads=16, kv_heads=8, head_dim=64, chunk_size=5000, local_size=40),
    Case(seqlen_q=8192, batch=1, heads=16, kv_heads=16, head_dim=256, chunk_size=1000, local_size=200, q_rotated=True),
]


def random_call(case: Case, device: torch.device, data_seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and dout, drawn on the device: these are large."""
    generator = torch.Generator(device).manual_seed(data_seed)
    queries = (case.batch, case.seqlen_q, case.heads, case.head_dim)
    keys = (case.batch, case.seqlen_k or case.seqlen_q, case.kv_heads, case.head_dim)
    shapes = (queries, keys, keys, queries)
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes]


@pytest.mark.parametrize("case", LONG_CALLS, ids=str)
def test_groups_of_heads_do_not_meet(device, case):
    if device.type == "cpu":
        pytest.skip("groups are worked on at once on a GPU")
    options = case.options(device)
    q, k, v, dout = random_call(case, device)
    together = gradients(chunkattn.dca, (q, k, v), dout, options)
    ratio = case.heads // case.kv_heads
    temperature = options.pop("temperature")
    for batch in range(case.batch):
        for head in range(case.kv_heads):
            rows, own, shared = slice(batch, batch + 1), slice(ratio * head, ratio * (head + 1)), slice(head, head + 1)
            alone = gradients(
                chunkattn.dca,
                (q[rows, :, own], k[rows, :, shared], v[rows, :, shared]),
                dout[rows, :, own],
                {**options, "temperature": None if temperature is None else temperature[rows]},
            )
            parts = [x[rows, :, heads] for x, heads in zip(together, (own, shared, shared), strict=True)]
            assert_same_gradients(parts, alone)


def test_groups_of_heads_in_a_cuda_graph(cuda):
    case = LONG_CALLS[0]
    arguments = (*case.options(cuda).values(),)[:-1]
    inputs = random_call(case, cuda)

    def run():
        q, k, v, dout = inputs
        out, lse = torch.ops.chunkattn.dca(q, k, v, *arguments)
        return torch.ops.chunkattn.dca_backward(dout, q, k, v, out, lse, *arguments)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for data_seed in (1, 2):
        for x, fresh in zip(inputs, random_call(case, cuda, data_seed), strict=True):
            x.copy_(fresh)
        graph.replay()
        assert_same_gradients(captured, run())


def test_groups_of_heads_wait_for_the_callers_stream(cuda):
    case = LONG_CALLS[0]
    options = case.options(cuda)
    q, k, v, dout = random_call(case, cuda)
    expected = gradients(chunkattn.dca, (q, k, v), dout * 2, options)
    streams = [torch.cuda.Stream() for _ in range(2)]

    def run(stream, repeats=3):
        with torch.cuda.stream(stream):
            for _ in range(repeats):
                torch.cuda._sleep(20_000_000)
                # dout is late, and gone when the op returns; its memory is written by what follows.
                results = gradients(chunkattn.dca, (q, k, v), dout * 2, options)
                torch.full_like(dout, float("nan"))
        return results

    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    with ThreadPoolExecutor() as pool:
        for results in pool.map(run, streams):
            torch.cuda.synchronize()
            assert_same_gradients(results, expected)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_cpu_threads(device, threads):
    if device.type != "cpu":
        pytest.skip("the CPU's threads")
    torch.set_num_threads(threads)
    try:
        check_all_dtypes(LONG.but(seqlen_q=300, batch=2), device)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_nan_stays_in_its_batch_row(device, argument):
    case = Case(batch=3, seqlen_q=70, deterministic=True)
    options = case.options(device)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        dout = random_dout(qkv[0])
        clean = gradients(chunkattn.dca, qkv, dout, options)
        (*qkv, dout)[argument][1] = torch.nan
        dirty = gradients(chunkattn.dca, qkv, dout, options)
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(before[::2], after[::2])


@pytest.mark.parametrize("sizes", ZERO_SIZES, ids=str)
def test_zero_sizes(device, sizes):
    case = Case().but(**sizes)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        grads = gradients(chunkattn.dca, qkv, torch.ones_like(qkv[0]), case.options(device))
        for x, grad in zip(qkv, grads, strict=True):
            assert grad.shape == x.shape
            assert grad.dtype == dtype
            assert (grad == 0).all()


def test_lse_is_not_differentiable(device):
    case = Case()
    qkv = tuple(x.requires_grad_() for x in case.inputs(device, dtypes(device)[1]))
    out, lse = chunkattn.dca(*qkv, **case.options(device), return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_second_derivative_is_refused(device):
    case = Case()
    qkv = tuple(x.requires_grad_() for x in case.inputs(device, dtypes(device)[1]))
    out = chunkattn.dca(*qkv, **case.options(device))
    (dq,) = torch.autograd.grad(out.square().sum(), qkv[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=random_cases(), dtype_index=st.integers(0, 3), seed=st.integers(0, 1000))
def test_random_cases(device, case, dtype_index, seed):
    dtype = dtypes(device)[dtype_index % len(dtypes(device))]
    qkv = case.inputs(device, dtype, seed)
    check_backward(qkv, random_dout(qkv[0]), case.options(device))


@pytest.mark.parametrize("part", range(4))
def test_random_aligned_cases_on_cuda(device, part):
    if device.type != "cuda":
        pytest.skip("other alignments have kernels of their own on CUDA only")

    @seed(part)
    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        case=random_cases(head_dims=(16, 64, 80, 128, 192, 256), rotary_step=16),
        deterministic=st.booleans(),
        dtype_index=st.integers(0, 1),
        data_seed=st.integers(0, 1000),
    )
    def check(case, deterministic, dtype_index, data_seed):
        qkv = case.inputs(device, dtypes(device)[dtype_index], data_seed)
        check_backward(qkv, random_dout(qkv[0]), case.but(deterministic=deterministic).options(device))

    check()
