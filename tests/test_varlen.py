"""dca_varlen: every packed sequence is what dca makes of it alone, on every device."""

import pytest
import torch
from caches import assert_lse_within_rule
from cases import Case, assert_same_gradients, check_gradients, dtypes, gradients, skip_without_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_within_rule
from torch.library import opcheck

import chunkattn

# c = 27. Lengths of queries and of keys, around chunk boundaries, empty ones among them.
CASE = Case(batch=1, heads=4, kv_heads=2, head_dim=32)
SEQLENS = (26, 0, 27, 95, 1, 28, 54)
PREFIXED = ((5, 60), (1, 27), (0, 30), (33, 33), (0, 0), (28, 81))
# c = 123, several tiles to a chunk. Lengths around those of tiles of the CUDA kernels, for every one of which something
# ends in a whole tile and something in a partial one.
LONG = CASE.but(kv_heads=1, head_dim=64, chunk_size=200, local_size=77)
TILES = (64, (127, 127), 128, (129, 250), 192, (1, 193), (63, 320), 0, (256, 256), (65, 65))
UNSEEING = ((20, 5), (3, 0), (40, 60))


@pytest.fixture
def device(device):
    return skip_without_kernels(device, "dca_varlen", "dca_varlen_backward")


def offsets(device, lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def packed_call(case, device, dtype, lengths):
    """q, k, v and the keywords of a packed batch; lengths are pairs of queries and keys, or one number for both."""
    seqlens_q, seqlens_k = zip(*((x, x) if isinstance(x, int) else x for x in lengths), strict=True)
    q, _, _ = case.but(batch=1, seqlen_q=sum(seqlens_q), seqlen_k=1).inputs(device, dtype)
    _, k, v = case.but(batch=1, seqlen_q=1, seqlen_k=sum(seqlens_k)).inputs(device, dtype, seed=1)
    packing = {
        "cu_seqlens_q": offsets(device, seqlens_q),
        "cu_seqlens_k": offsets(device, seqlens_k),
        "max_seqlen_q": max(seqlens_q),
        "max_seqlen_k": max(seqlens_k),
    }
    return (q[0], k[0], v[0]), packing, case.options(device)


def alone(function):
    """`function` in place of dca_varlen: sequence by sequence, results packed."""

    def run(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, temperature, return_lse=False, **options
    ):
        outs, lses = [], []
        bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for row in range(len(bounds_q) - 1):
            part_q = q[None, bounds_q[row] : bounds_q[row + 1]]
            part_k, part_v = (x[None, bounds_k[row] : bounds_k[row + 1]] for x in (k, v))
            unseeing = max(0, part_q.shape[1] - part_k.shape[1])
            one = temperature[row : row + 1] if isinstance(temperature, torch.Tensor) else temperature
            out, lse = function(part_q[:, unseeing:], part_k, part_v, temperature=one, return_lse=True, **options)
            outs += [part_q.new_zeros(unseeing, *q.shape[1:]), out[0]]
            lses += [lse.new_full((q.shape[1], unseeing), -torch.inf), lse[0]]
        out, lse = torch.cat(outs), torch.cat(lses, dim=1)
        return (out, lse) if return_lse else out

    return run


def check_all_dtypes(case, device, lengths):
    for dtype in dtypes(device):
        qkv, packing, options = packed_call(case, device, dtype, lengths)
        out, lse = chunkattn.dca_varlen(*qkv, **packing, **options, return_lse=True)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert lse.is_contiguous()
        reference = alone(chunkattn.reference.dca)
        oracle, oracle_lse = reference(*(x.double() for x in qkv), **packing, **options, return_lse=True)
        plain, plain_lse = reference(*qkv, **packing, **options, return_lse=True)
        assert_within_rule(out, oracle, plain, "out")
        assert_lse_within_rule(lse, oracle_lse, plain_lse, dtype)


@pytest.mark.parametrize("lengths", [SEQLENS, PREFIXED, (300, 3, 0), (7,), (0, 0), ((5, 0), (2, 0))], ids=str)
def test_lengths(device, lengths):
    check_all_dtypes(CASE, device, lengths)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths_around_tiles(device, head_dim):
    check_all_dtypes(LONG.but(head_dim=head_dim), device, TILES)


def test_many_sequences(device):
    check_all_dtypes(CASE, device, (13,) * 140)


def test_lengths_may_be_less_than_the_maximum(device):
    (q, k, v), packing, options = packed_call(CASE, device, torch.bfloat16, PREFIXED)
    expected = chunkattn.dca_varlen(q, k, v, **packing, **options)
    packing |= {"max_seqlen_q": 10_000, "max_seqlen_k": 1_000_000}
    assert torch.equal(chunkattn.dca_varlen(q, k, v, **packing, **options), expected)


def test_queries_before_the_first_key(device):
    check_all_dtypes(CASE, device, ((20, 5), (3, 0), (40, 39), (10, 60)))


@pytest.mark.parametrize("head_dim", [17, 64, 128, 192, 256])
@pytest.mark.parametrize("heads", [(3, 3), (8, 1)])
def test_heads(device, head_dim, heads):
    check_all_dtypes(CASE.but(head_dim=head_dim, heads=heads[0], kv_heads=heads[1]), device, PREFIXED)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_options(device, interleaved, rotated):
    case = CASE.but(temperature=(0.5, 1.0, 1.5, 2.0, 0.7, 1.2), interleaved=interleaved, rotary_dim=20, scale=0.2)
    check_all_dtypes(case.but(q_rotated=rotated, k_rotated=rotated), device, PREFIXED)


def test_packed_views(device):
    for dtype in dtypes(device):
        (q, k, v), packing, options = packed_call(CASE.but(kv_heads=4), device, dtype, SEQLENS)
        expected = chunkattn.dca_varlen(q, k, v, **packing, **options)
        # Views of one projection.
        q, k, v = torch.stack((q, k, v), dim=1).unbind(1)
        assert not q.is_contiguous()
        assert_within_rule(chunkattn.dca_varlen(q, k, v, **packing, **options), expected.double(), expected, "out")


def test_sequences_do_not_see_each_other(device):
    for dtype in dtypes(device):
        qkv, packing, options = packed_call(CASE, device, dtype, SEQLENS)
        clean = chunkattn.dca_varlen(*qkv, **packing, **options)
        begin, end = packing["cu_seqlens_q"][3:5].tolist()
        for x in qkv:
            x[begin:end] = torch.nan
        dirty = chunkattn.dca_varlen(*qkv, **packing, **options)
        assert dirty[begin:end].isnan().all()
        assert torch.equal(dirty[:begin], clean[:begin])
        assert torch.equal(dirty[end:], clean[end:])


def random_dout(q, seed=2):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).to(q.device, q.dtype)


def check_packed_gradients(case, device, lengths):
    """Those of each sequence are within the rule of its own, and those of what sees nothing or is not seen are 0."""
    for dtype in dtypes(device):
        qkv, packing, options = packed_call(case, device, dtype, lengths)
        dout = random_dout(qkv[0])
        ours = gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options})
        bounds = [packing[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k")]
        for row in range(len(lengths)):
            q, k, v = (x[None, b[row] : b[row + 1]] for x, b in zip(qkv, bounds, strict=True))
            dq, dk, dv = (x[None, b[row] : b[row + 1]] for x, b in zip(ours, bounds, strict=True))
            unseeing = max(0, q.shape[1] - k.shape[1])
            assert not dq[:, :unseeing].any()
            q, dq, part = (x[:, unseeing:] for x in (q, dq, dout[None, bounds[0][row] : bounds[0][row + 1]]))
            temperature = options["temperature"]
            one = temperature[row : row + 1] if isinstance(temperature, torch.Tensor) else temperature
            if q.shape[1] == 0:
                assert not dk.any()
                assert not dv.any()
                continue
            check_gradients((dq, dk, dv), (q, k, v), part, {**options, "temperature": one})


@pytest.mark.parametrize("lengths", [SEQLENS, PREFIXED, UNSEEING, ((5, 0), (2, 0)), ((0, 4), (0, 0))], ids=str)
def test_gradients(device, lengths):
    check_packed_gradients(CASE, device, lengths)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_around_tiles(device, head_dim, deterministic):
    if deterministic and device.type == "cpu":
        pytest.skip("the CPU always is")
    check_packed_gradients(LONG.but(head_dim=head_dim, deterministic=deterministic), device, TILES)


def test_gradients_with_options(device):
    case = CASE.but(temperature=(0.5, 1.0, 1.5, 2.0, 0.7, 1.2), interleaved=True, q_rotated=True, k_rotated=True)
    check_packed_gradients(case.but(deterministic=True), device, PREFIXED)


def test_gradients_of_packed_views(device):
    for dtype in dtypes(device):
        (q, k, v), packing, options = packed_call(CASE.but(kv_heads=4, deterministic=True), device, dtype, SEQLENS)
        dout = random_dout(q)
        expected = gradients(chunkattn.dca_varlen, (q, k, v), dout, {**packing, **options})
        views = torch.stack((q, k, v), dim=1).unbind(1)
        for ours, other in zip(
            gradients(chunkattn.dca_varlen, views, dout, {**packing, **options}), expected, strict=True
        ):
            assert torch.equal(ours, other)


def test_deterministic_gradients_repeat(device):
    for dtype in dtypes(device):
        qkv, packing, options = packed_call(LONG.but(deterministic=True), device, dtype, TILES)
        dout = random_dout(qkv[0])
        first, *others = (gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options}) for _ in range(4))
        for again in others:
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_behind_the_last_sequence(device, head_dim):
    # Tensors may have room for more than the offsets promise: what is there reaches nothing.
    if device.type != "cuda":
        pytest.skip("refused on the CPU")
    case = LONG.but(head_dim=head_dim, deterministic=True)
    lengths, behind = ((70, 70), (33, 150)), 40
    for dtype in dtypes(device):
        qkv, packing, options = packed_call(case, device, dtype, lengths)
        dout = random_dout(qkv[0])
        expected = gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options})
        *longer, longer_dout = (torch.cat((x, torch.full_like(x[:behind], torch.nan))) for x in (*qkv, dout))
        ours = gradients(chunkattn.dca_varlen, longer, longer_dout, {**packing, **options})
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a[: len(b)], b)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("argument", ["q", "k", "v", "dout", "all"])
def test_gradients_of_sequences_do_not_mix(device, head_dim, argument):
    # NaN in one sequence leaves all others bit by bit as they were.
    lengths = ((70, 70), (33, 150), (200, 200), (77, 77), (150, 150))
    case = LONG.but(head_dim=head_dim, deterministic=True)
    for dtype in dtypes(device)[-2:]:
        qkv, packing, options = packed_call(case, device, dtype, lengths)
        dout = random_dout(qkv[0])
        clean = gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options})
        offsets_q, offsets_k = (packing[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
        rows_q, rows_k = (slice(offsets[2], offsets[3]) for offsets in (offsets_q, offsets_k))
        for name, x, rows in zip(("q", "k", "v", "dout"), (*qkv, dout), (rows_q, rows_k, rows_k, rows_q), strict=True):
            if argument in (name, "all"):
                x[rows] = torch.nan
        dirty = gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options})
        for before, after, rows in zip(clean, dirty, (rows_q, rows_k, rows_k), strict=True):
            assert torch.equal(before[: rows.start], after[: rows.start])
            assert torch.equal(before[rows.stop :], after[rows.stop :])


def test_graph_replays_with_other_lengths(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs")
    # Sums of 400 queries and 500 keys, in sequences of at most 300 of either.
    batches = (((100, 100), (100, 150), (200, 250)), ((300, 300), (0, 0), (100, 200)), ((1, 200), (299, 300), (100, 0)))
    case = LONG.but(head_dim=128, deterministic=True)
    qkv, packing, options = packed_call(case, device, torch.bfloat16, batches[0])
    packing |= {"max_seqlen_q": 300, "max_seqlen_k": 300}
    dout = random_dout(qkv[0])
    cos, sin, *rest = options.values()
    arguments = (cos, sin, *packing.values(), *rest)

    def run():
        out, lse = torch.ops.chunkattn.dca_varlen(*qkv, *arguments)
        return out, lse, *torch.ops.chunkattn.dca_varlen_backward(dout, *qkv, out, lse, *arguments)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    for lengths in batches:
        for name, lengths_of in zip(("cu_seqlens_q", "cu_seqlens_k"), zip(*lengths, strict=True), strict=True):
            packing[name].copy_(offsets(device, lengths_of))
        graph.replay()
        torch.cuda.synchronize()
        for replayed, now in zip(results, run(), strict=True):
            assert torch.equal(replayed, now)


def test_groups_of_heads_do_not_meet(device):
    if device.type == "cpu":
        pytest.skip("groups are worked on at once on a GPU")
    # Work and keys enough for two groups of heads.
    case = Case(batch=1, heads=20, kv_heads=10, head_dim=128, chunk_size=3072, local_size=512)
    qkv, packing, options = packed_call(case, device, torch.bfloat16, (9000, 1, (1000, 4000), 2999))
    dout = random_dout(qkv[0])
    together = gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options})
    for head in range(case.kv_heads):
        own, shared = slice(2 * head, 2 * (head + 1)), slice(head, head + 1)
        parts = [x[:, heads] for x, heads in zip(qkv, (own, shared, shared), strict=True)]
        alone = gradients(chunkattn.dca_varlen, parts, dout[:, own], {**packing, **options})
        same = [x[:, heads] for x, heads in zip(together, (own, shared, shared), strict=True)]
        assert_same_gradients(same, alone)


def test_wrong_offsets_on_cuda_stay_inside(device):
    # compute-sanitizer sees accesses outside the tensors; here the device only has to survive.
    if device.type != "cuda":
        pytest.skip("checked on the CPU")
    generator = torch.Generator().manual_seed(0)
    qkv, packing, options = packed_call(LONG, device, torch.bfloat16, (70, 1, 200, 33))
    expected = gradients(chunkattn.dca_varlen, qkv, random_dout(qkv[0]), {**packing, **options})
    good = {name: packing[name].clone() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    for _ in range(20):
        for name in good:
            bits = torch.randint(0, 31, (5,), generator=generator)
            wrong = torch.randint(-(2**31), 2**31 - 1, (5,), generator=generator) // 2**bits
            packing[name].copy_(wrong)
        gradients(chunkattn.dca_varlen, qkv, random_dout(qkv[0]), {**packing, **options})
    for name, values in good.items():
        packing[name].copy_(values)
    again = gradients(chunkattn.dca_varlen, qkv, random_dout(qkv[0]), {**packing, **options})
    for a, b in zip(again, expected, strict=True):
        assert_within_rule(a, b.double(), b, "gradient", ulps=8)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("lengths", [(500, 26, 0, 54, 30, 90), (60,) * 12], ids=["one long", "all short"])
def test_cpu_threads(threads, lengths):
    # All threads share a sequence with most of the work; others get a thread each.
    qkv, packing, options = packed_call(CASE, torch.device("cpu"), torch.float64, lengths)
    dout = torch.randn_like(qkv[0])
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            out, lse = chunkattn.dca_varlen(*qkv, **packing, **options, return_lse=True)
            results.append((out, lse, *gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options})))
        finally:
            torch.set_num_threads(1)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-10)


@st.composite
def packed_cases(draw, head_dims=None, longest=120):
    chunk_size = draw(st.integers(2, 90))
    kv_heads = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.tuples(st.integers(0, longest), st.integers(0, longest)), min_size=1, max_size=6))
    case = Case(
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(head_dims or st.integers(2, 70)),
        chunk_size=chunk_size,
        local_size=draw(st.integers(1, chunk_size - 1)),
        temperature=draw(st.none() | st.tuples(*[st.floats(0.25, 4, width=32)] * len(lengths))),
        interleaved=draw(st.booleans()),
        q_rotated=draw(st.booleans()),
        k_rotated=draw(st.booleans()),
    )
    return case, lengths


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=packed_cases())
def test_random_cases(device, call):
    check_all_dtypes(call[0], device, call[1])


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=packed_cases(), deterministic=st.booleans())
def test_random_gradients(device, call, deterministic):
    check_packed_gradients(call[0].but(deterministic=deterministic), device, call[1])


def test_random_aligned_cases_on_cuda(device):
    if device.type != "cuda":
        pytest.skip("other alignments have kernels of their own on CUDA only")

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(call=packed_cases(st.sampled_from((16, 64, 80, 128, 192, 256)), 300), deterministic=st.booleans())
    def check(call, deterministic):
        case, lengths = call
        check_all_dtypes(case, device, lengths)
        check_packed_gradients(case.but(deterministic=deterministic), device, lengths)

    check()


def test_opcheck(device):
    case = CASE.but(temperature=(1.0,) * len(PREFIXED))
    qkv, packing, options = packed_call(case, device, torch.bfloat16, PREFIXED)
    cos, sin, *rest = options.values()
    arguments = (cos, sin, *packing.values(), *rest)
    opcheck(torch.ops.chunkattn.dca_varlen.default, (*(x.requires_grad_() for x in qkv), *arguments))
    q, k, v = (x.detach() for x in qkv)
    out, lse = torch.ops.chunkattn.dca_varlen(q, k, v, *arguments)
    dout = torch.randn_like(out)
    opcheck(torch.ops.chunkattn.dca_varlen_backward.default, (dout, q, k, v, out, lse, *arguments))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_with_gradients(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(chunkattn.dca_varlen, fullgraph=True, dynamic=dynamic)
    for lengths in ((30, 5, 61), (31, 4, 70)):
        qkv, packing, options = packed_call(CASE, device, torch.bfloat16, lengths)
        options["deterministic"] = True
        dout = torch.randn_like(qkv[0])
        ours = gradients(compiled, qkv, dout, {**packing, **options})
        for a, b in zip(ours, gradients(chunkattn.dca_varlen, qkv, dout, {**packing, **options}), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast(device):
    qkv, packing, options = packed_call(CASE, device, torch.float32, SEQLENS)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = chunkattn.dca_varlen(*qkv, **packing, **options)
    expected = chunkattn.dca_varlen(*(x.bfloat16() for x in qkv), **packing, **options)
    assert torch.equal(result, expected)


def test_second_derivatives_are_refused(device):
    qkv, packing, options = packed_call(CASE, device, torch.bfloat16, SEQLENS)
    q = qkv[0].requires_grad_()
    out = chunkattn.dca_varlen(q, *qkv[1:], **packing, **options)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


def plus(*values):
    return lambda x: x + torch.tensor(values, dtype=x.dtype, device=x.device)


BAD_CALLS = {
    "q has 4 dimensions": (
        {"q": lambda x: x[None]},
        r"q must have 3 dimensions \[total_q, heads, head_dim\], got shape",
    ),
    "k has 2 dimensions": ({"k": lambda x: x[0]}, r"k must have 3 dimensions \[total_k, kv_heads, head_dim\]"),
    "k is float16": ({"k": lambda x: x.half()}, "k must have the dtype of q, bfloat16, got float16"),
    "k has another head dim": ({"k": lambda x: x[..., :8]}, "k must have the head dimension of q, 32, got 8"),
    "v is shorter": ({"v": lambda x: x[1:]}, "v must have the shape of k"),
    "heads are no multiple": ({"q": lambda x: x[:, :3]}, "q must have .* multiple of the heads of k, got 3 and 2"),
    "cu_seqlens_q is None": ({"cu_seqlens_q": None}, "cu_seqlens_q must be a tensor, got NoneType"),
    "cu_seqlens_q is int64": ({"cu_seqlens_q": lambda x: x.long()}, "cu_seqlens_q must be int32, got Long"),
    "cu_seqlens_q is empty": (
        {"cu_seqlens_q": lambda x: x[:0]},
        r"cu_seqlens_q must have batch \+ 1 elements, got none",
    ),
    "cu_seqlens_q and cu_seqlens_k name no sequence": (
        {"cu_seqlens_q": lambda x: x[:1], "cu_seqlens_k": lambda x: x[:1]},
        "cu_seqlens_q must have more than one element unless q is empty, got 1 element and 96 rows",
    ),
    "cu_seqlens_k has 2 dimensions": ({"cu_seqlens_k": lambda x: x[None]}, "cu_seqlens_k must have 1 dimensions"),
    "cu_seqlens_k is shorter": (
        {"cu_seqlens_k": lambda x: x[1:]},
        "cu_seqlens_k must have the length of cu_seqlens_q, 4, got 3",
    ),
    "max_seqlen_q is negative": ({"max_seqlen_q": -1}, r"max_seqlen_q must lie in 0 .. 2\*\*31 - 1, got -1"),
    "temperature has 4 elements": (
        {"temperature": lambda _: torch.ones(4)},
        "temperature must have one element per batch row, 3, got 4",
    ),
    "cos lacks the last row": ({"cos": lambda x: x[:40]}, r"cos must have at least chunk_size \+ 1 = 41 rows, got 40"),
}

BAD_CONTENTS = {
    "cu_seqlens_q starts at 1": ({"cu_seqlens_q": plus(1, 0, 0, 0)}, r"cu_seqlens_q\[0\] must be 0, got 1"),
    "cu_seqlens_q falls": ({"cu_seqlens_q": plus(0, 60, 0, 0)}, "max_seqlen_q must be .* got 61 and a length of 90"),
    "cu_seqlens_k falls": ({"cu_seqlens_k": plus(0, 0, -6, 0)}, "cu_seqlens_k must not fall, got 30 and then 29"),
    "cu_seqlens_q ends early": (
        {"cu_seqlens_q": plus(0, 0, 0, -1)},
        "cu_seqlens_q must end with the rows of q, 96, got 95",
    ),
    "cu_seqlens_k ends late": (
        {"cu_seqlens_k": plus(0, 0, 0, 1), "max_seqlen_k": 100},
        "cu_seqlens_k must end with the rows of k, 96, got 97",
    ),
    "max_seqlen_k is too small": ({"max_seqlen_k": 60}, "max_seqlen_k must be .* got 60 and a length of 61"),
}


def bad_call(device, edits):
    (q, k, v), packing, options = packed_call(CASE, device, torch.bfloat16, (30, 5, 61))
    values = {"q": q, "k": k, "v": v, **packing, **options}
    return values | {name: edit(values[name]) if callable(edit) else edit for name, edit in edits.items()}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(device, name):
    edits, message = BAD_CALLS[name]
    values = bad_call(device, edits)
    if name.startswith("temperature"):
        values["temperature"] = values["temperature"].to(device)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        chunkattn.dca_varlen(**values)


@pytest.mark.parametrize("name", BAD_CONTENTS)
def test_bad_contents_on_the_cpu(name):
    edits, message = BAD_CONTENTS[name]
    with pytest.raises(ValueError, match=message):
        chunkattn.dca_varlen(**bad_call(torch.device("cpu"), edits))


def test_bad_backward_calls(device):
    values = bad_call(device, {})
    out, lse = chunkattn.dca_varlen(**values, return_lse=True)
    values |= {"dout": out, "out": out, "softmax_lse": lse}
    torch.ops.chunkattn.dca_varlen_backward(**values)
    for edits, message in (
        ({"dout": out[1:]}, "dout must have the shape of q"),
        ({"softmax_lse": lse.t()}, r"softmax_lse must have shape \[4, 96\], got \[96, 4\]"),
        ({"softmax_lse": lse[None]}, r"softmax_lse must have 2 dimensions \[heads, total_q\]"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.chunkattn.dca_varlen_backward(**{**values, **edits})
