"""dca against the float64 oracle, on every device, in every dtype the device has kernels for."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, check_forward, dtypes
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tolerance import assert_within_rule

import chunkattn

# c = 123: no multiple of any tile, and several tiles to a chunk.
LONG = Case(batch=1, heads=2, kv_heads=1, head_dim=64, chunk_size=200, local_size=77)


def check_all_dtypes(case: Case, device: torch.device) -> None:
    options = case.options(device)
    for dtype in dtypes(device):
        check_forward(case.inputs(device, dtype), options)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_lengths_around_chunk_boundaries(device, chunks, beyond):
    length = chunks * LONG.stride + beyond
    check_all_dtypes(LONG.but(seqlen_q=length), device)


@pytest.mark.parametrize("length", [1, 2, 3, 26, 27, 28, 53, 54, 55, 80, 81, 82, 135])
def test_lengths_of_short_chunks(device, length):
    check_all_dtypes(Case(seqlen_q=length), device)


@pytest.mark.parametrize("local_size", range(1, 17))
def test_every_local_size(device, local_size):
    # From a stride of 16 to a stride of 1, where every token is a chunk of its own.
    check_all_dtypes(Case(seqlen_q=60, chunk_size=17, local_size=local_size), device)


@pytest.mark.parametrize(
    ("chunk_size", "local_size"), [(2, 1), (64, 32), (128, 1), (129, 64), (150, 149), (190, 130), (256, 128), (300, 40)]
)
def test_chunk_sizes(device, chunk_size, local_size):
    check_all_dtypes(LONG.but(seqlen_q=331, chunk_size=chunk_size, local_size=local_size), device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (6, 2), (8, 1), (14, 2), (5, 5)])
def test_head_ratios(device, heads, kv_heads):
    check_all_dtypes(Case(heads=heads, kv_heads=kv_heads), device)


@pytest.mark.parametrize("seqlen_q", [1, 2, 16, 27, 63, 65, 130, 300])
@pytest.mark.parametrize("seqlen_k", [300, 369, 370])
def test_queries_against_a_longer_cache(device, seqlen_q, seqlen_k):
    check_all_dtypes(LONG.but(seqlen_q=seqlen_q, seqlen_k=seqlen_k), device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(32, 32), (32, 2), (32, 6), (40, 30), (64, 16), (128, 64), (7, 4)]
)
def test_partial_rotary(device, head_dim, rotary_dim, interleaved):
    check_all_dtypes(Case(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved), device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("q_rotated", [False, True])
@pytest.mark.parametrize("k_rotated", [False, True])
def test_rotated_inputs(device, interleaved, q_rotated, k_rotated):
    case = Case(seqlen_q=81, seqlen_k=90, interleaved=interleaved, q_rotated=q_rotated, k_rotated=k_rotated)
    check_all_dtypes(case, device)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_and_raw_inputs_agree(device, interleaved):
    case = Case(seqlen_q=81, seqlen_k=100, interleaved=interleaved)
    dtype = dtypes(device)[0]
    q, k, v = case.inputs(device, dtype)
    options = case.options(device)
    rows_k = torch.arange(100, device=device) % case.stride
    rows_q = rows_k[100 - 81 :]
    cos, sin = options["cos"], options["sin"]
    rotate = chunkattn.reference.rotate
    q_turned = rotate(q.double(), cos[rows_q], sin[rows_q], interleaved).to(dtype)
    k_turned = rotate(k.double(), cos[rows_k], sin[rows_k], interleaved).to(dtype)

    oracle = chunkattn.reference.dca(q.double(), k.double(), v.double(), **options)
    options.update(q_rotated=True, k_rotated=True)
    plain = chunkattn.reference.dca(q_turned, k_turned, v, **options)
    assert_within_rule(chunkattn.dca(q_turned, k_turned, v, **options), oracle, plain, "out")


@pytest.mark.parametrize("scale", [None, 0.03, 1.0])
@pytest.mark.parametrize("temperature", [None, 1.7, (0.4, 2.5)])
def test_scale_and_temperature(device, scale, temperature):
    check_all_dtypes(Case(scale=scale, temperature=temperature), device)


@pytest.mark.parametrize("head_dim", [1, 2, 3, 8, 17, 40, 63, 64, 65, 72, 80, 96, 100, 128, 160, 192, 255, 256])
def test_head_dims(device, head_dim):
    case = Case(seqlen_q=90, head_dim=head_dim)
    if head_dim == 1:
        # No pair to rotate fits: nothing is accepted.
        with pytest.raises(ValueError, match="cos must have rotary_dim / 2 columns"):
            check_all_dtypes(case.but(rotary_dim=2), device)
        return
    check_all_dtypes(case, device)
    check_all_dtypes(case.but(seqlen_q=7, seqlen_k=90, interleaved=True), device)


def transposed(x):
    """[B, S, H, D] as a view of [B, H, S, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def with_row_gaps(x):
    """Rows of a wider tensor, which start at odd offsets."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), torch.nan)
    wide[..., 3 : 3 + x.shape[-1]] = x
    return wide[..., 3 : 3 + x.shape[-1]]


def inside_larger(x):
    """A block of a tensor that is larger in every dimension but the last."""
    large = x.new_full((x.shape[0] + 1, x.shape[1] + 3, x.shape[2] + 2, x.shape[3]), torch.nan)
    large[1:, 2:-1, 1:-1] = x
    return large[1:, 2:-1, 1:-1]


def sequence_first(x):
    """[B, S, H, D] as a view of [S, B, H, D]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("view", [transposed, with_row_gaps, inside_larger, sequence_first])
@pytest.mark.parametrize("head_dim", [64, 24])
def test_strided_views(device, view, head_dim):
    case = Case(seqlen_q=81, seqlen_k=100, head_dim=head_dim)
    options = case.options(device)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        views = tuple(view(x) for x in qkv)
        assert all(torch.equal(a, b) and not b.is_contiguous() for a, b in zip(qkv, views, strict=True))
        check_forward(views, options)


def test_views_of_one_projection(device):
    case = Case(heads=4, kv_heads=4, head_dim=32)
    options = case.options(device)
    for dtype in dtypes(device):
        q, k, v = torch.stack(case.inputs(device, dtype), dim=2).unbind(2)
        check_forward((q, k, v), options)


def test_one_cache_for_the_whole_batch(device):
    case = Case(batch=3, seqlen_q=40, seqlen_k=100)
    options = case.options(device)
    for dtype in dtypes(device):
        q, k, v = case.inputs(device, dtype)
        check_forward((q, k[:1].expand_as(k), v[:1].expand_as(v)), options)


def test_table_with_more_rows_and_a_row_stride(device):
    case = Case()
    options = case.options(device)
    fused = torch.cat(chunkattn.rope_table(case.chunk_size + 9, case.head_dim, device=device), dim=-1)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        expected = check_forward(qkv, options)
        cos, sin = fused.chunk(2, dim=-1)
        assert torch.equal(chunkattn.dca(*qkv, **{**options, "cos": cos, "sin": sin}), expected)


@pytest.mark.parametrize("step", [1, 19, 64])
def test_prefill_in_pieces_equals_one_shot(device, step):
    case = Case(seqlen_q=110)
    options = case.options(device)
    for dtype in dtypes(device):
        q, k, v = case.inputs(device, dtype)
        pieces = [
            chunkattn.dca(q[:, begin : begin + step], k[:, : begin + step], v[:, : begin + step], **options)
            for begin in range(0, 110, step)
        ]
        oracle = chunkattn.reference.dca(q.double(), k.double(), v.double(), **options)
        plain = chunkattn.reference.dca(q, k, v, **options)
        assert_within_rule(torch.cat(pieces, dim=1), oracle, plain, "out")


@pytest.mark.parametrize("length", [1, 50, 123])
def test_within_one_chunk_it_is_ordinary_attention(device, length):
    assert length <= LONG.stride
    case = LONG.but(seqlen_q=length)
    options = case.options(device)
    cos, sin = options["cos"][:length], options["sin"][:length]

    def ordinary(q, k, v):
        q, k = (chunkattn.reference.rotate(x, cos, sin) for x in (q, k))
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        oracle = ordinary(*(x.double() for x in qkv))
        assert_within_rule(chunkattn.dca(*qkv, **options), oracle, ordinary(*qkv), "out")


def test_large_logits(device):
    # Logits of some thousands: the softmax is one-hot, and exponentials without the maximum taken off would overflow.
    case = Case(scale=60.0)
    options = case.options(device)
    for dtype in dtypes(device):
        out, lse = chunkattn.dca(*case.inputs(device, dtype), **options, return_lse=True)
        assert out.isfinite().all()
        assert lse.isfinite().all()
    check_forward(case.inputs(device, dtypes(device)[0]), options)


def test_equal_logits(device):
    # Zero queries weigh all visible keys alike: out is a running mean, lse the logarithm of a count.
    case = Case(head_dim=16)
    for dtype in dtypes(device):
        q, k, v = case.inputs(device, dtype)
        out, lse = chunkattn.dca(torch.zeros_like(q), k, v, **case.options(device), return_lse=True)
        counts = torch.arange(1, case.seqlen_q + 1, device=device, dtype=torch.float64)
        means = v.double().cumsum(1) / counts[:, None, None]
        means = means.repeat_interleave(case.heads // case.kv_heads, dim=2)
        assert_within_rule(out, means, means.to(dtype), "out")
        torch.testing.assert_close(lse.double(), counts.log().expand(lse.shape), rtol=1e-6, atol=1e-6)


def test_results_repeat_bitwise(device):
    case = LONG.but(seqlen_q=400, batch=2, temperature=(1.0, 1.2))
    options = case.options(device)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        first = chunkattn.dca(*qkv, **options, return_lse=True)
        for _ in range(3):
            again = chunkattn.dca(*qkv, **options, return_lse=True)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_cpu_threads(threads):
    cpu = torch.device("cpu")
    case = LONG.but(seqlen_q=300, batch=2)
    torch.set_num_threads(threads)
    try:
        check_all_dtypes(case, cpu)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_nan_stays_in_its_batch_row(device, poison, argument):
    case = Case(batch=3, seqlen_q=70)
    options = case.options(device)
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        clean = chunkattn.dca(*qkv, **options, return_lse=True)
        qkv[argument][1] = poison
        dirty = chunkattn.dca(*qkv, **options, return_lse=True)
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(before[::2], after[::2])
        assert not dirty[0][1].isfinite().all()


def test_nan_temperature_stays_in_its_batch_row(device):
    case = Case(batch=2, temperature=(1.5, math.nan))
    for dtype in dtypes(device):
        qkv = case.inputs(device, dtype)
        out = chunkattn.dca(*qkv, **case.options(device))
        clean = chunkattn.dca(*qkv, **case.but(temperature=(1.5, 1.5)).options(device))
        assert torch.equal(out[0], clean[0])
        assert out[1].isnan().all()


ZERO_SIZES = [
    {"batch": 0},
    {"seqlen_q": 0},
    {"seqlen_q": 0, "seqlen_k": 50},
    {"heads": 0, "kv_heads": 0},
    {"heads": 0},
    {"batch": 0, "seqlen_q": 0},
]


@pytest.mark.parametrize("sizes", ZERO_SIZES, ids=str)
def test_zero_sizes(device, sizes):
    case = Case().but(**sizes)
    for dtype in dtypes(device):
        out, lse = chunkattn.dca(*case.inputs(device, dtype), **case.options(device), return_lse=True)
        assert out.shape == (case.batch, case.seqlen_q, case.heads, case.head_dim)
        assert out.dtype == dtype
        assert lse.shape == (case.batch, case.heads, case.seqlen_q)
        assert lse.dtype == torch.float32


@st.composite
def random_cases(
    draw, head_dims: tuple[int, ...] = tuple(range(2, 141)), rotary_step: int = 2, longest: int = 300
) -> Case:
    chunk_size = draw(st.integers(2, longest // 2))
    seqlen_k = draw(st.integers(1, longest))
    kv_heads = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from(head_dims))
    batch = draw(st.integers(1, 3))
    temperatures = st.floats(0.25, 4, width=32)
    return Case(
        seqlen_q=draw(st.integers(1, seqlen_k)),
        seqlen_k=seqlen_k,
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_step * draw(st.integers(1, head_dim // rotary_step)),
        chunk_size=chunk_size,
        local_size=draw(st.integers(1, chunk_size - 1)),
        scale=draw(st.none() | st.floats(0.01, 1.0)),
        temperature=draw(st.none() | temperatures | st.tuples(*[temperatures] * batch)),
        interleaved=draw(st.booleans()),
        q_rotated=draw(st.booleans()),
        k_rotated=draw(st.booleans()),
    )


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=random_cases(), dtype_index=st.integers(0, 3), seed=st.integers(0, 1000))
def test_random_cases(device, case, dtype_index, seed):
    dtype = dtypes(device)[dtype_index % len(dtypes(device))]
    check_forward(case.inputs(device, dtype, seed), case.options(device))


@pytest.mark.parametrize("part", range(5))
def test_random_aligned_cases_on_cuda(device, part):
    if device.type != "cuda":
        pytest.skip("other alignments have kernels of their own on CUDA only")

    @seed(part)
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        case=random_cases(head_dims=(16, 64, 80, 128, 192, 256), rotary_step=16, longest=900),
        dtype_index=st.integers(0, 1),
        data_seed=st.integers(0, 1000),
    )
    def check(case, dtype_index, data_seed):
        check_forward(case.inputs(device, dtypes(device)[dtype_index], data_seed), case.options(device))

    check()


def test_views_whose_offsets_pass_2_31_elements(device):
    # Rows 2**20 elements apart: little is computed and, where memory is mapped on use, little is touched.
    length, row = 2100, 1 << 20
    case = Case(batch=1, seqlen_q=length, heads=2, kv_heads=1, head_dim=64, chunk_size=700, local_size=100)
    dtype = torch.bfloat16
    big = torch.empty(1, length, row, dtype=dtype, device=device)
    assert big.numel() > 1 << 31
    views, begin = [], row
    for x in case.inputs(device, dtype):
        begin -= x.shape[2] * x.shape[3]
        view = big[:, :, begin : begin + x.shape[2] * x.shape[3]].unflatten(2, x.shape[2:])
        views.append(view.copy_(x))
    check_forward(tuple(views), case.options(device))


def test_cuda_tensors_of_more_than_2_31_elements(cuda):
    length, heads, head_dim = 4099, 4096, 128
    bytes_each = 2 * length * heads * head_dim
    if torch.cuda.mem_get_info(cuda)[0] < 6 * bytes_each:
        pytest.skip(f"needs {6 * bytes_each >> 30} GiB of free GPU memory")
    case = Case(head_dim=head_dim, chunk_size=1500, local_size=217)
    options = case.options(cuda)
    generator = torch.Generator(cuda).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, head_dim, dtype=torch.bfloat16, device=cuda, generator=generator)
        for _ in range(3)
    )
    assert q.numel() > 1 << 31
    out, lse = chunkattn.dca(q, k, v, **options, return_lse=True)
    for head in (0, heads // 2, heads - 1):
        sample = tuple(x[:, :, head : head + 1] for x in (q, k, v))
        oracle, oracle_lse = chunkattn.reference.dca(*(x.double() for x in sample), **options, return_lse=True)
        plain, plain_lse = chunkattn.reference.dca(*sample, **options, return_lse=True)
        assert_within_rule(out[:, :, head : head + 1], oracle, plain, "out")
        assert_within_rule(lse[:, head : head + 1], oracle_lse, plain_lse, "lse")


@pytest.mark.parametrize("k_rotated", [False, True])
def test_cuda_launches_do_not_grow_with_chunks(cuda, k_rotated):
    for length in (100, 1000, 3000):
        case = LONG.but(seqlen_q=length, k_rotated=k_rotated)
        qkv, options = case.inputs(cuda, torch.bfloat16), case.options(cuda)
        chunkattn.dca(*qkv, **options)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            chunkattn.dca(*qkv, **options)
            torch.cuda.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        launches = [name for name in on_device if not name.startswith("Memset")]
        assert len(launches) == (1 if k_rotated else 2), launches


def test_cuda_allocates_only_results_and_rotated_keys(cuda):
    case = LONG.but(seqlen_q=2048, heads=8, kv_heads=1)
    qkv, options = case.inputs(cuda, torch.bfloat16), case.options(cuda)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(cuda)
    torch.cuda.reset_peak_memory_stats(cuda)
    out, lse = chunkattn.dca(*qkv, **options, return_lse=True)
    peak = torch.cuda.max_memory_allocated(cuda) - before
    # A block of memory is a multiple of 512 bytes; one may hold a counter.
    assert peak <= out.nbytes + lse.nbytes + qkv[1].nbytes + 4 * 512
