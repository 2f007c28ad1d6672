"""The operators inside torch: opcheck, torch.compile, autocast, checkpointing, streams and CUDA graphs."""

import pytest
import torch
from caches import FLOAT8, LAYOUTS, Layout, decode_options, fill, lengths
from cases import Case, dtypes, gradients, skip_without_kernels
from select_merge_cases import SelectMergeCase
from tolerance import assert_within_rule
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import chunkattn

CASE = Case(seqlen_q=40, seqlen_k=70, head_dim=16, chunk_size=24, local_size=7)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Other tests compile the same functions: together they would reach the limit on recompilations."""
    torch._dynamo.reset()


def call(device, dtype, case=CASE):
    """q, k, v that require gradients, and the remaining arguments."""
    return tuple(x.requires_grad_() for x in case.inputs(device, dtype)), case.options(device)


def operator_arguments(device, dtype, case=CASE):
    (q, k, v), options = call(device, dtype, case)
    return q, k, v, *options.values()


VARIANTS = [
    CASE,
    CASE.but(temperature=(1.0, 1.5), scale=0.3, interleaved=True),
    CASE.but(q_rotated=True, k_rotated=True, rotary_dim=8, deterministic=True),
    CASE.but(seqlen_q=0),
]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_opcheck_forward(device, case):
    for dtype in dtypes(device):
        opcheck(torch.ops.chunkattn.dca.default, operator_arguments(device, dtype, case))


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_opcheck_backward(device, case):
    for dtype in dtypes(device):
        q, k, v, *rest = (
            x.detach() if isinstance(x, torch.Tensor) else x for x in operator_arguments(device, dtype, case)
        )
        out, lse = torch.ops.chunkattn.dca(q, k, v, *rest)
        opcheck(torch.ops.chunkattn.dca_backward.default, (torch.randn_like(out), q, k, v, out, lse, *rest))


def test_fake_results_have_the_strides_of_real_ones(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v, *rest = operator_arguments(device, dtypes(device)[0])
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    real = torch.ops.chunkattn.dca(q, k, v, *rest)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.chunkattn.dca(*(mode.from_tensor(x) for x in (q, k, v)), *rest)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_forward(device, dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(q, k, v, **options):
        out, lse = chunkattn.dca(q * 2, k, v, **options, return_lse=True)
        return out + 1, lse

    for seqlen_k in (70, 71):
        case = CASE.but(seqlen_k=seqlen_k)
        (q, k, v), options = call(device, dtypes(device)[0], case)
        with torch.no_grad():
            out, lse = compiled(q, k, v, **options)
            expected, expected_lse = chunkattn.dca(q * 2, k, v, **options, return_lse=True)
        torch.testing.assert_close(out, expected + 1, rtol=0, atol=0)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.25, (1.0, 1.5)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_with_gradients(device, dynamic, temperature):
    compiled = torch.compile(chunkattn.dca, fullgraph=True, dynamic=dynamic)
    for seqlen_q in (40, 41):
        qkv, options = call(device, dtypes(device)[1], CASE.but(seqlen_q=seqlen_q, temperature=temperature))
        dout = torch.randn_like(qkv[0])
        ours = gradients(compiled, qkv, dout, options)
        for a, b in zip(ours, gradients(chunkattn.dca, qkv, dout, options), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_refuses_what_eager_refuses(device):
    compiled = torch.compile(chunkattn.dca, fullgraph=True)
    (q, k, v), options = call(device, dtypes(device)[0])
    with torch.no_grad(), pytest.raises(ValueError, match="local_size must lie in"):
        compiled(q, k, v, **{**options, "local_size": 24})


@pytest.mark.parametrize("through", [chunkattn.dca, torch.ops.chunkattn.dca])
def test_autocast_casts_q_k_and_v_alone(device, through):
    (q, k, v), options = call(device, torch.float32, CASE.but(temperature=(1.0, 1.5)))
    # Temperature and table would be rounded visibly: nothing but q, k and v may be.
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            expected = through(*(x.to(dtype) for x in (q, k, v)), **options)
            with torch.autocast(device.type, dtype=dtype):
                result = through(q, k, v, **options)
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_autocast_of_mixed_inputs(device):
    # As a cache in half precision and queries from an operator that autocast keeps in float32.
    (q, k, v), options = call(device, torch.float32)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        result = chunkattn.dca(q, k.bfloat16(), v.bfloat16(), **options)
        assert torch.equal(result, chunkattn.dca(q, k, v, **options))


def test_autocast_leaves_float64(device):
    if torch.float64 not in dtypes(device):
        pytest.skip(f"chunkattn has no float64 on {device.type}")
    (q, k, v), options = call(device, torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert chunkattn.dca(q, k, v, **options).dtype == torch.float64


def test_autocast_gradients_have_the_dtype_of_the_inputs(device):
    (q, k, v), options = call(device, torch.float32, CASE.but(deterministic=True))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = chunkattn.dca(q, k, v, **options)
    assert out.dtype == torch.bfloat16
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), dout)
    half = gradients(chunkattn.dca, tuple(x.bfloat16() for x in (q, k, v)), dout, options)
    for a, b in zip(ours, half, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_under_autocast(device, dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(q, k, v, options):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return chunkattn.dca(q, k, v, **options)

    (q, k, v), options = call(device, torch.float32)
    result = compiled(q, k, v, options)
    expected = chunkattn.dca(*(x.bfloat16() for x in (q, k, v)), **options)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(device, use_reentrant):
    qkv, options = call(device, dtypes(device)[1], CASE.but(deterministic=True))
    dout = torch.randn_like(qkv[0])
    for x in qkv:
        x.grad = None
    checkpoint(lambda *x: chunkattn.dca(*x, **options), *qkv, use_reentrant=use_reentrant).backward(dout)
    for x, expected in zip(qkv, gradients(chunkattn.dca, qkv, dout, options), strict=True):
        assert torch.equal(x.grad, expected)


def test_inference_mode(device):
    (q, k, v), options = call(device, dtypes(device)[0])
    with torch.no_grad():
        expected = chunkattn.dca(q, k, v, **options)
    with torch.inference_mode():
        assert torch.equal(chunkattn.dca(q, k, v, **options), expected)


def test_operator_and_function_agree(device):
    (q, k, v), options = call(device, dtypes(device)[0], CASE.but(temperature=(1.0, 1.5), interleaved=True))
    with torch.no_grad():
        function = chunkattn.dca(q, k, v, **options, return_lse=True)
        operator = torch.ops.chunkattn.dca(q, k, v, **options)
        alone = chunkattn.dca(q, k, v, **options)
    assert all(torch.equal(a, b) for a, b in zip(function, operator, strict=True))
    assert torch.equal(alone, function[0])


def test_a_float_temperature_is_one_for_every_row(device):
    case = CASE.but(temperature=1.5)
    (q, k, v), options = call(device, dtypes(device)[0], case)
    with torch.no_grad():
        one = chunkattn.dca(q, k, v, **options)
        rows = chunkattn.dca(q, k, v, **case.but(temperature=(1.5, 1.5)).options(device))
    assert_within_rule(one, rows.double(), rows, "out")


def test_cuda_follows_the_current_stream(cuda):
    (q, k, v), options = call(cuda, torch.bfloat16, Case(seqlen_q=512, chunk_size=200, local_size=77))
    expected = chunkattn.dca(q * 2, k, v, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # q is late: a launch on another stream would miss it
        late = q * 2
        result = chunkattn.dca(late, k, v, **options)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("k_rotated", [False, True])
def test_cuda_graph_replays(cuda, k_rotated):
    case = Case(seqlen_q=300, chunk_size=100, local_size=37, k_rotated=k_rotated)
    inputs, options = call(cuda, torch.bfloat16, case)
    q, k, v = (x.detach() for x in inputs)
    chunkattn.dca(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunkattn.dca(q, k, v, **options)
    for seed in (1, 2):
        for x, fresh in zip((q, k, v), case.inputs(cuda, torch.bfloat16, seed), strict=True):
            x.copy_(fresh)
        graph.replay()
        assert torch.equal(captured, chunkattn.dca(q, k, v, **options))


def test_cuda_tensors_of_a_device_that_is_not_current(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    (q, k, v), options = call(other, torch.bfloat16)
    with torch.cuda.device(0):
        result = chunkattn.dca(q, k, v, **options)
    with torch.cuda.device(other):
        assert torch.equal(result, chunkattn.dca(q, k, v, **options))


# 24 - 7 = 17 tokens to a chunk; the cache has room for 70.
DECODE = CASE.but(seqlen_q=1, seqlen_k=70, temperature=(1.0, 1.5))


def decode_call(device, dtype, layout=Layout(16), case=DECODE, float8=False):  # noqa: B008
    """Arguments of dca_with_kvcache, one new token each, on a filled cache."""
    skip_without_kernels(device, "dca_with_kvcache")
    options = decode_options(case, device)
    q, k, v = case.inputs(device, dtype)
    cache = layout.make(case, 70, device, FLOAT8 if float8 else dtype)
    seqlens = lengths(device, 33, 16)
    scales = {name: torch.tensor([0.02, 0.01], device=device) if float8 else None for name in ("k_scale", "v_scale")}
    fill(cache, case, k, v, seqlens, {**options, **scales})
    return {"q": q, **cache, **options, **scales, "k": k[:, -1:], "v": v[:, -1:], "cache_seqlens": seqlens}


DECODE_ORDER = (
    "q", "k_cache", "v_cache", "cos", "sin", "cache_seqlens", "chunk_size", "local_size", "block_table", "k", "v",
    "k_scale", "v_scale", "num_splits", "scale", "temperature", "interleaved", "q_rotated",
)  # fmt: skip


@pytest.mark.parametrize("layout", [Layout(), Layout(16)], ids=str)
@pytest.mark.parametrize("float8", [False, True])
def test_opcheck_decode(device, layout, float8):
    values = {"num_splits": 0, **decode_call(device, torch.bfloat16, layout, float8=float8)}
    arguments = tuple(values[name] for name in DECODE_ORDER)
    # The schema check compares inputs before and after: NaN would not equal itself.
    for name in ("k_cache", "v_cache"):
        values[name].copy_(values[name].float().nan_to_num().to(values[name].dtype))
    # It also adds and multiplies, which torch does not do in float8.
    checks = {"test_utils": ("test_faketensor", "test_aot_dispatch_dynamic")} if float8 else {}
    opcheck(torch.ops.chunkattn.dca_with_kvcache.default, arguments, **checks)
    opcheck(torch.ops.chunkattn.dca_with_kvcache.out, (*arguments, torch.zeros_like(values["q"])), **checks)


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("given_out", [True, False])
def test_compile_decode(device, layout, dynamic, given_out):
    """The cache that a compiled call was given is the one it writes to, step after step."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(q, out, **arguments):
        out, lse = chunkattn.dca_with_kvcache(q * 2, **arguments, out=out, return_lse=True)
        return out + 1, lse, arguments["cache_seqlens"] + 1

    dtype = dtypes(device)[0]
    ours, theirs = (decode_call(device, dtype, layout) for _ in range(2))
    out = torch.empty_like(ours["q"]) if given_out else None
    for _ in range(3):
        result, lse, ours["cache_seqlens"] = step(out=out, **ours)
        q = theirs["q"] * 2
        expected, expected_lse = chunkattn.dca_with_kvcache(**{**theirs, "q": q}, return_lse=True)
        theirs["cache_seqlens"] = theirs["cache_seqlens"] + 1
        torch.testing.assert_close(result, expected + 1, rtol=0, atol=0)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
        for name in ("k_cache", "v_cache"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


def test_decode_in_inference_mode(device):
    values, again = (decode_call(device, dtypes(device)[0]) for _ in range(2))
    expected = chunkattn.dca_with_kvcache(**values)
    with torch.inference_mode():
        assert torch.equal(chunkattn.dca_with_kvcache(**again), expected)


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
@pytest.mark.parametrize("float8", [False, True])
def test_cuda_graph_of_decoding_replays_over_growing_lengths(cuda, layout, float8):
    # From an empty cache across four chunk boundaries, in steps captured once; lengths live on the device.
    values, eager = (decode_call(cuda, torch.bfloat16, layout, float8=float8) for _ in range(2))
    _, k, v = DECODE.inputs(cuda, torch.bfloat16)
    for x in (values, eager):
        x["cache_seqlens"].zero_()
    chunkattn.dca_with_kvcache(**values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunkattn.dca_with_kvcache(**values)
        values["cache_seqlens"] += 1
    values["cache_seqlens"].zero_()
    for step in range(70):
        q = DECODE.inputs(cuda, torch.bfloat16, seed=step)[0]
        for x in (values, eager):
            for name, fresh in (("q", q), ("k", k[:, step : step + 1]), ("v", v[:, step : step + 1])):
                x[name].copy_(fresh)
        graph.replay()
        assert torch.equal(captured, chunkattn.dca_with_kvcache(**eager)), f"step {step}"
        eager["cache_seqlens"] += 1


@pytest.mark.parametrize("layout", [Layout(), Layout(16), Layout(17)], ids=str)
def test_cuda_graph_of_prefill_replays_over_growing_lengths(cuda, layout):
    # Chunks long enough for the Hopper forward kernel where pages suit it, each sequence's own way across c = 128.
    case = Case(seqlen_q=256, heads=12, kv_heads=4, head_dim=128, chunk_size=192, local_size=64)
    options = decode_options(case, skip_without_kernels(cuda, "dca_with_kvcache"))
    q, k, v = case.inputs(cuda, torch.bfloat16)
    replayed, eager = (layout.make(case, 1100, cuda, torch.bfloat16) for _ in range(2))
    arguments = {**options, "k": k, "v": v, "cache_seqlens": lengths(cuda, 0, 0)}
    chunkattn.dca_with_kvcache(q, **replayed, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunkattn.dca_with_kvcache(q, **replayed, **arguments)
    for seed, seqlens in enumerate([(0, 0), (256, 1), (500, 127), (756, 128), (833, 384)]):
        arguments["cache_seqlens"].copy_(lengths(cuda, *seqlens))
        for x, fresh in zip((q, k, v), case.inputs(cuda, torch.bfloat16, seed=seed), strict=True):
            x.copy_(fresh)
        graph.replay()
        assert captured.isfinite().all()
        assert torch.equal(captured, chunkattn.dca_with_kvcache(q, **eager, **arguments)), str(seqlens)


SELECT_MERGE_CASE = SelectMergeCase(70, 2, 4, 2, 16, 4, 3, 4)


def select_merge_call(device, dtype, case=SELECT_MERGE_CASE):
    """q, k, v that require gradients, and the sizes and words."""
    skip_without_kernels(device, "select", "select_merge", "select_merge_backward")
    return tuple(x.requires_grad_() for x in case.inputs(dtype, 3, device)), case.options()


@pytest.mark.parametrize("changes", [{}, {"heads_mode": "q", "selection": "causal"}, {"seqlen": 0}], ids=str)
def test_opcheck_select_merge(device, changes):
    case = SELECT_MERGE_CASE.but(**changes)
    for dtype in (dtypes(device)[0], dtypes(device)[-1]):
        (q, k, v), options = select_merge_call(device, dtype, case)
        opcheck(torch.ops.chunkattn.select.default, (q, k, *options.values()))
        sizes = (case.region_size, case.merge, 0.3)
        ids = chunkattn.select(q, k, **options)
        opcheck(torch.ops.chunkattn.select_merge.default, (q, k, v, ids, *sizes))
        q, k, v = (x.detach() for x in (q, k, v))
        out, lse = torch.ops.chunkattn.select_merge(q, k, v, ids, *sizes)
        arguments = (torch.randn_like(out), q, k, v, out, lse, ids, *sizes, True)
        opcheck(torch.ops.chunkattn.select_merge_backward.default, arguments)


def select_merge_cache(device, dtype, case, selection="causal", page_size=None):
    """A cache with 41 tokens, and rows of one token to go on with; its next but six begins a group."""
    skip_without_kernels(device, "select_merge_with_kvcache")
    q, k, v = case.inputs(dtype, 3, device)
    options = case.options() | {"selection": selection, "query_heads": case.heads, "page_size": page_size}
    cache = chunkattn.SelectMergeCache(
        case.batch, case.kv_heads, case.head_dim, case.seqlen, **options, dtype=dtype, device=device
    )
    cache.append(q[:, :41], k[:, :41], v[:, :41])
    return cache, (q[:, 41:], k[:, 41:], v[:, 41:])


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("selection", ["causal", "query"])
def test_opcheck_select_merge_cache(device, selection, page_size):
    for heads_mode in ("kv", "q"):
        for dtype in (dtypes(device)[0], dtypes(device)[-1]):
            case = SELECT_MERGE_CASE.but(heads_mode=heads_mode)
            cache, rows = select_merge_cache(device, dtype, case, selection, page_size)
            arguments = cache._arguments(*(x[:, :9] for x in rows), None, rows[1][:, :9], None)
            opcheck(torch.ops.chunkattn.select_merge_append.default, arguments)
            opcheck(torch.ops.chunkattn.select_merge_with_kvcache.default, (*arguments, 0.3))
            out = torch.zeros_like(rows[0][:, :9])
            opcheck(torch.ops.chunkattn.select_merge_with_kvcache.out, (*arguments, None, out))


@pytest.mark.parametrize("given_out", [True, False])
@pytest.mark.parametrize("page_size", [None, 8])
def test_compile_select_merge_cache(device, page_size, given_out):
    """The cache is an object that the compiled function closes over, and is written to step after step."""
    dtype = dtypes(device)[0]
    (ours, rows), (theirs, _) = (
        select_merge_cache(device, dtype, SELECT_MERGE_CASE, page_size=page_size) for _ in range(2)
    )
    out = torch.empty_like(rows[0][:, :1]) if given_out else None

    @torch.compile(fullgraph=True)
    def step(q, k, v):
        out_, lse = ours.attend(q * 2, k, v, out=out, return_lse=True)
        return out_ + 1, lse

    for n in range(12):
        q, k, v = (x[:, n : n + 1].contiguous() for x in rows)
        result, lse = step(q, k, v)
        expected, expected_lse = theirs.attend(q * 2, k, v, return_lse=True)
        torch.testing.assert_close(result, expected + 1, rtol=0, atol=0)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
    for name in ("k", "v", "region_sums", "query_sums", "indices", "seqlens"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_select_merge_with_gradients(device, dynamic):
    compiled = torch.compile(chunkattn.select_merge, fullgraph=True, dynamic=dynamic)
    for seqlen in (70, 71):
        case = SELECT_MERGE_CASE.but(seqlen=seqlen)
        qkv, options = select_merge_call(device, dtypes(device)[1], case)
        dout = torch.randn_like(qkv[0])
        ours = gradients(compiled, qkv, dout, options)
        for a, b in zip(ours, gradients(chunkattn.select_merge, qkv, dout, options), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_casts_what_select_merge_reads(device):
    (q, k, v), options = select_merge_call(device, torch.float32)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            half = tuple(x.to(dtype) for x in (q, k, v))
            ids = chunkattn.select(*half[:2], **options)
            expected = chunkattn.select_merge(*half, **options)
            with torch.autocast(device.type, dtype=dtype):
                assert torch.equal(chunkattn.select(q, k, **options), ids)
                assert torch.equal(chunkattn.select(half[0], k, **options), ids)
                assert torch.equal(chunkattn.select_merge(q, k, v, **options), expected)
                assert torch.equal(chunkattn.select_merge(q, half[1], v, **options), expected)


def test_checkpoint_of_select_merge(device):
    qkv, options = select_merge_call(device, dtypes(device)[1])
    options["deterministic"] = True
    dout = torch.randn_like(qkv[0])
    out = checkpoint(lambda *x: chunkattn.select_merge(*x, **options), *qkv, use_reentrant=False)
    grads = torch.autograd.grad(out, qkv, dout)
    for ours, expected in zip(grads, gradients(chunkattn.select_merge, qkv, dout, options), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("default", [False, True])
def test_deterministic_of_select_merge_follows_torch_unless_said(device, asked, default):
    (q, k, v), options = select_merge_call(device, dtypes(device)[-1])
    calls = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            calls.append((function, arguments))
            return function(*arguments, **(keywords or {}))

    torch.use_deterministic_algorithms(default)
    try:
        with Spy():
            out = chunkattn.select_merge(q, k, v, **options, deterministic=asked)
            torch.autograd.grad(out.sum(), (q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    names = ("select_merge", "select_merge_backward")
    found = {str(f): arguments[len(f._schema.arguments) - 1 :] for f, arguments in calls if "select_merge" in str(f)}
    expected = default if asked is None else asked
    # A trailing default is left out of the arguments.
    assert found == {f"chunkattn.{name}.default": ((True,) if expected else ()) for name in names}
