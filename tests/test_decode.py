"""dca_with_kvcache against the float64 oracle, on every device, for every layout of the cache."""

import math
import random

import pytest
import torch
from caches import (
    FLOAT8,
    LAYOUTS,
    Layout,
    assert_lse_within_rule,
    check_decode,
    decode_options,
    fill,
    lengths,
    poison,
    raw_bytes,
)
from cases import Case, dtypes, skip_without_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_within_rule

import chunkattn

# c = 27: 95 tokens are three and a half chunks.
CASE = Case(batch=3)
LONG = Case(batch=2, heads=4, kv_heads=2, head_dim=64, chunk_size=200, local_size=77)


@pytest.fixture
def device(device):
    return skip_without_kernels(device, "dca_with_kvcache")


def check_all_dtypes(case, device, seqlens, *, layout=Layout(48), seqlen_new=1, **arguments):  # noqa: B008
    """One call on a filled cache, of seqlen_new new tokens and case.seqlen_q queries, in every dtype."""
    options = decode_options(case, device)
    seqlens = lengths(device, *seqlens)
    capacity = int(seqlens.max()) + seqlen_new
    for dtype in dtypes(device):
        q, k, v = case.but(seqlen_k=capacity).inputs(device, dtype)
        cache = layout.make(case, capacity, device, dtype)
        fill(cache, case, k, v, seqlens, options)
        new = {"k": k[:, -seqlen_new:], "v": v[:, -seqlen_new:]} if seqlen_new else {}
        check_decode(q, cache, {**options, **new, "cache_seqlens": seqlens, **arguments})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("prompt", [1, 30])
def test_prefill_and_steps_equal_one_forward(device, layout, prompt):
    case = CASE.but(batch=2)
    options = case.options(device)
    call = decode_options(case, device)
    for dtype in dtypes(device):
        q, k, v = case.inputs(device, dtype)
        cache = layout.make(case, case.seqlen_q, device, dtype)
        outs, lses = [], []
        begin = 0
        while begin < case.seqlen_q:
            end = begin + (1 if begin else prompt)
            new = {"k": k[:, begin:end], "v": v[:, begin:end]}
            seqlens = lengths(device, begin, begin)
            out, lse = chunkattn.dca_with_kvcache(
                q[:, begin:end], **cache, **call, **new, cache_seqlens=seqlens, return_lse=True
            )
            outs.append(out)
            lses.append(lse)
            begin = end
        oracle, oracle_lse = chunkattn.reference.dca(*(x.double() for x in (q, k, v)), **options, return_lse=True)
        plain, plain_lse = chunkattn.reference.dca(q, k, v, **options, return_lse=True)
        assert_within_rule(torch.cat(outs, dim=1), oracle, plain, "out")
        assert_lse_within_rule(torch.cat(lses, dim=2), oracle_lse, plain_lse, dtype)


@pytest.mark.parametrize("step", [2, 19, 27, 64])
@pytest.mark.parametrize("layout", [Layout(), Layout(16)], ids=str)
def test_chunked_prefill_equals_one_forward(device, layout, step):
    case = CASE.but(seqlen_q=110)
    options = case.options(device)
    for dtype in dtypes(device):
        q, k, v = case.inputs(device, dtype)
        cache = layout.make(case, case.seqlen_q, device, dtype)
        outs = []
        for begin in range(0, case.seqlen_q, step):
            part = slice(begin, begin + step)
            outs.append(
                chunkattn.dca_with_kvcache(
                    q[:, part], **cache, **decode_options(case, device), k=k[:, part], v=v[:, part], cache_seqlens=begin
                )
            )
        oracle = chunkattn.reference.dca(*(x.double() for x in (q, k, v)), **options)
        assert_within_rule(torch.cat(outs, dim=1), oracle, chunkattn.reference.dca(q, k, v, **options), "out")


# Chunks that the Hopper forward kernel takes where pages and chunks have a divisor that suits it.
@pytest.mark.parametrize("layout", [Layout(), *(Layout(page_size) for page_size in (16, 17, 24, 64))], ids=str)
@pytest.mark.parametrize("seqlen_new", [0, 20, 256])
def test_long_chunks(device, layout, seqlen_new):
    case = CASE.but(heads=12, kv_heads=4, head_dim=128, chunk_size=192, local_size=64, seqlen_q=256)
    check_all_dtypes(case, device, (300, 10, 131), layout=layout, seqlen_new=seqlen_new)


@pytest.mark.parametrize("beyond", [-2, -1, 0, 1])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_lengths_around_chunk_boundaries(device, beyond, seqlen_q):
    stride = LONG.stride
    case = LONG.but(batch=4, seqlen_q=seqlen_q)
    check_all_dtypes(case, device, [chunks * stride + beyond for chunks in (1, 2, 3, 4)], seqlen_new=seqlen_q)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mixed_lengths(device, layout):
    check_all_dtypes(CASE.but(seqlen_q=1, batch=6), device, (0, 1, 26, 27, 53, 200), layout=layout)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (8, 1), (14, 2), (40, 1)])
@pytest.mark.parametrize("seqlen_q", [1, 33])
def test_head_ratios(device, heads, kv_heads, seqlen_q):
    case = CASE.but(heads=heads, kv_heads=kv_heads, seqlen_q=seqlen_q)
    check_all_dtypes(case, device, (40, 90, 131), seqlen_new=seqlen_q)


@pytest.mark.parametrize("head_dim", [2, 17, 64, 80, 96, 128, 192, 255, 256])
def test_head_dims(device, head_dim):
    check_all_dtypes(CASE.but(head_dim=head_dim, seqlen_q=2), device, (20, 70, 130), seqlen_new=2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 6), (40, 30), (64, 16)])
def test_partial_rotary(device, head_dim, rotary_dim, interleaved):
    case = CASE.but(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, seqlen_q=3)
    check_all_dtypes(case, device, (20, 70, 130), seqlen_new=3)


@pytest.mark.parametrize("q_rotated", [False, True])
@pytest.mark.parametrize("temperature", [None, 1.7, (0.4, 1.0, 2.5)])
@pytest.mark.parametrize("scale", [None, 0.03])
def test_scale_temperature_and_rotated_queries(device, scale, temperature, q_rotated):
    case = CASE.but(scale=scale, temperature=temperature, q_rotated=q_rotated, seqlen_q=4)
    check_all_dtypes(case, device, (20, 70, 130), seqlen_new=4)


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 7, 128, 1000])
def test_splits(device, num_splits):
    check_all_dtypes(LONG.but(seqlen_q=1), device, (3, 900), num_splits=num_splits)
    check_all_dtypes(LONG.but(seqlen_q=30), device, (3, 900), seqlen_new=30, num_splits=num_splits)


@pytest.mark.parametrize("seqlen_new", [0, 1, 3, 12])
def test_queries_and_new_tokens_of_different_counts(device, seqlen_new):
    for seqlen_q in (1, 7):
        check_all_dtypes(CASE.but(seqlen_q=seqlen_q), device, (30, 60, 8), seqlen_new=seqlen_new)


@pytest.mark.parametrize("seqlen_new", [0, 2])
def test_queries_before_the_first_token(device, seqlen_new):
    # Sequences shorter than the queries, empty ones among them.
    case = CASE.but(batch=5, seqlen_q=40)
    check_all_dtypes(case, device, (0, 1, 37, 0, 90), seqlen_new=seqlen_new)


@pytest.mark.parametrize("layout", [Layout(), Layout(16)], ids=str)
def test_empty_sequences_read_nothing(device, layout):
    case = CASE.but(seqlen_q=2)
    for dtype in dtypes(device):
        q = case.inputs(device, dtype)[0]
        cache = layout.make(case, 16, device, dtype)
        if cache["block_table"] is not None:
            cache["block_table"].fill_(2**30)
        seqlens = lengths(device, 0, 0, 0)
        out, lse = chunkattn.dca_with_kvcache(
            q, **cache, **decode_options(case, device), cache_seqlens=seqlens, return_lse=True
        )
        assert not out.any()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nothing_beyond_a_sequence_is_read_or_written(device, layout):
    # Poison in every slot without a token, page ids out of range in every table entry without one.
    case = CASE.but(seqlen_q=1, batch=4)
    options = decode_options(case, device)
    seqlens = lengths(device, 0, 15, 16, 70)
    for dtype in dtypes(device):
        q, k, v = case.but(seqlen_k=100).inputs(device, dtype)
        cache = layout.make(case, 100, device, dtype)
        fill(cache, case, k, v, seqlens, options)
        table = cache["block_table"]
        if table is not None:
            for row, length in enumerate(seqlens.tolist()):
                table[row, length // layout.page_size + 1 :] = 2**31 - 1 if row % 2 else -5
        before = {name: raw_bytes(cache[name]) for name in ("k_cache", "v_cache")}
        new = {"k": k[:, -1:], "v": v[:, -1:]}
        out = chunkattn.dca_with_kvcache(q, **cache, **options, **new, cache_seqlens=seqlens)
        assert out.isfinite().all()
        for name, old in before.items():
            changed = (raw_bytes(cache[name]) != old).flatten(2).any(2)
            assert changed.sum() == case.batch, f"{name}: {int(changed.sum())} rows written for {case.batch} new tokens"


def test_prefix_sharing(device):
    # Three sequences of one prefix of two pages, each going on in a page of its own.
    case = LONG.but(batch=3, seqlen_q=1)
    options = decode_options(case, device)
    page, prefix = 64, 128
    for dtype in dtypes(device):
        q, k, v = case.but(seqlen_k=prefix + 40).inputs(device, dtype)
        k[:, :prefix], v[:, :prefix] = k[:1, :prefix].clone(), v[:1, :prefix].clone()
        shared, own = (Layout(page).make(case, prefix + 40, device, dtype) for _ in range(2))
        shared["block_table"][:, : prefix // page] = shared["block_table"][:1, : prefix // page].clone()
        seqlens = lengths(device, prefix, prefix + 1, prefix + 39)
        for cache in (shared, own):
            fill(cache, case, k, v, seqlens, options)
        arguments = {**options, "k": k[:, -1:], "v": v[:, -1:], "cache_seqlens": seqlens}
        expected = chunkattn.dca_with_kvcache(q, **own, **arguments)
        assert torch.equal(chunkattn.dca_with_kvcache(q, **shared, **arguments), expected)


# An element of float8 stands for everything within half a unit in its last place, of 4 bits; subnormals start at 2^-6.
def assert_rounded_to_float8(stored, exact):
    exact = exact.clamp(-448, 448)
    half_ulp = torch.maximum(exact.abs(), torch.tensor(2.0**-6)).log2().floor().exp2() / 16
    assert ((stored.double() - exact).abs() <= half_ulp * (1 + 1e-5)).all()


def float8_dtypes(device):
    return (dtype for dtype in dtypes(device) if dtype != torch.float64)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("layout", [Layout(), Layout(heads_first=True), Layout(16), Layout(80)], ids=str)
def test_float8_cache(device, layout, per_head):
    case = CASE.but(seqlen_q=3)
    options = decode_options(case, device)
    scales = torch.tensor([0.02, 0.003] if per_head else 0.01, device=device)
    seqlens = lengths(device, 0, 40, 131)
    for dtype in float8_dtypes(device):
        q, k, v = case.but(seqlen_k=134).inputs(device, dtype)
        cache = layout.make(case, 134, device, FLOAT8)
        arguments = {**options, "k_scale": scales, "v_scale": scales * 0.5}
        fill(cache, case, k, v, seqlens, arguments)
        new = {"k": k[:, -3:], "v": v[:, -3:]}
        check_decode(q, cache, {**arguments, **new, "cache_seqlens": seqlens})
        for row, length in enumerate(seqlens.tolist()):
            stored_k, stored_v = (
                chunkattn.reference.cached_rows(cache[name], row, length + 3, cache["block_table"])[length:]
                for name in ("k_cache", "v_cache")
            )
            rows = torch.arange(length, length + 3, device=device) % case.stride
            exact = chunkattn.reference.rotate(k[row, -3:].double(), options["cos"][rows], options["sin"][rows])
            assert_rounded_to_float8(stored_k, exact / scales.double().reshape(-1, 1))
            assert_rounded_to_float8(stored_v, v[row, -3:].double() / (scales * 0.5).double().reshape(-1, 1))


def test_every_float8_number_is_read(device):
    # One key: the output is its value.
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    numbers = numbers[~numbers.float().isnan()]
    case = Case(batch=1, heads=2, kv_heads=1, head_dim=numbers.numel(), seqlen_q=1)
    for dtype in float8_dtypes(device):
        q = case.inputs(device, dtype)[0]
        v_cache = numbers.to(device).reshape(1, 1, 1, -1)
        out = chunkattn.dca_with_kvcache(
            q, torch.zeros_like(v_cache), v_cache, **decode_options(case, device), cache_seqlens=1
        )
        assert torch.equal(out, numbers.to(device, dtype).expand_as(out))


def test_float8_append_saturates_and_keeps_nan(device):
    case = Case(batch=1, heads=1, kv_heads=1, head_dim=8, seqlen_q=1)
    values = [500.0, -math.inf, math.inf, math.nan, 464.0, -(2.0**-10), 2.0**-9 * 1.5, 0.0]
    expected = torch.tensor([448.0, -448.0, 448.0, math.nan, 448.0, -0.0, 2.0**-8, 0.0])
    for dtype in float8_dtypes(device):
        cache = Layout().make(case, 1, device, FLOAT8)
        q = torch.zeros(1, 1, 1, 8, dtype=dtype, device=device)
        v = torch.tensor(values, dtype=dtype, device=device).reshape(q.shape)
        chunkattn.dca_with_kvcache(q, **cache, **decode_options(case, device), k=q, v=v, cache_seqlens=0)
        torch.testing.assert_close(cache["v_cache"].float().flatten().cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_float8_stays_near_the_exact_cache(device):
    # Standard normal values at half an ulp of relative 2^-4 each: errors average over the keys attended.
    case = LONG.but(seqlen_q=1)
    options = decode_options(case, device)
    for dtype in float8_dtypes(device):
        q, k, v = case.but(seqlen_k=500).inputs(device, dtype)
        cache = Layout(64).make(case, 500, device, FLOAT8)
        scale = torch.tensor(0.02, device=device)
        out = chunkattn.dca_with_kvcache(q, **cache, **options, k=k, v=v, k_scale=scale, v_scale=scale, cache_seqlens=0)
        exact = chunkattn.reference.dca(q.double(), k.double(), v.double(), **case.options(device))
        assert (out.double() - exact).abs().max() < 0.03
        assert (out.double() - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("layout", [Layout(), Layout(16)], ids=str)
def test_out_is_written_and_returned(device, layout):
    case = CASE.but(seqlen_q=3)
    options = decode_options(case, device)
    seqlens = lengths(device, 0, 40, 90)
    for dtype in dtypes(device):
        q, k, v = case.but(seqlen_k=90).inputs(device, dtype)
        cache = layout.make(case, 90, device, dtype)
        fill(cache, case, k, v, seqlens, options)
        expected = chunkattn.dca_with_kvcache(q, **cache, **options, cache_seqlens=seqlens, return_lse=True)
        wide = poison(q.new_empty(*q.shape[:2], 2 * case.heads, case.head_dim))
        into = wide[:, :, 1::2]
        out, lse = chunkattn.dca_with_kvcache(q, **cache, **options, cache_seqlens=seqlens, out=into, return_lse=True)
        assert out is into
        assert torch.equal(into, expected[0])
        assert torch.equal(lse, expected[1])
        assert wide[:, :, ::2].isnan().all()


def test_one_length_for_all(device):
    case = CASE.but(seqlen_q=1)
    options = decode_options(case, device)
    for dtype in dtypes(device):
        q, k, v = case.but(seqlen_k=50).inputs(device, dtype)
        cache = Layout().make(case, 50, device, dtype)
        fill(cache, case, k, v, lengths(device, 50, 50, 50), options)
        by_int = chunkattn.dca_with_kvcache(q, **cache, **options, cache_seqlens=50)
        by_tensor = chunkattn.dca_with_kvcache(q, **cache, **options, cache_seqlens=lengths(device, 50, 50, 50))
        assert torch.equal(by_int, by_tensor)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"heads": 0}, {"heads": 0, "kv_heads": 0}], ids=str)
def test_zero_sizes(device, sizes):
    case = CASE.but(batch=2, seqlen_q=1).but(**sizes)
    for dtype in dtypes(device):
        q, k, v = case.but(seqlen_k=2).inputs(device, dtype)
        cache = Layout(16).make(case, 20, device, dtype)
        seqlens = torch.zeros(case.batch, dtype=torch.int32, device=device)
        out, lse = chunkattn.dca_with_kvcache(
            q, **cache, **decode_options(case, device), k=k, v=v, cache_seqlens=seqlens, return_lse=True
        )
        assert out.shape == q.shape
        assert lse.shape == (case.batch, case.heads, case.seqlen_q)
        if case.batch and case.kv_heads:  # tokens are appended all the same
            assert (~cache["k_cache"].isnan()).flatten(2).any(2).sum() == 2 * case.batch


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_cpu_threads(threads, seqlen_q):
    # Long enough for splits of more than 1024 keys.
    cpu = torch.device("cpu")
    case = CASE.but(seqlen_q=seqlen_q)
    options = decode_options(case, cpu)
    seqlens = lengths(cpu, 3, 2500, 40)
    q, k, v = case.but(seqlen_k=2600).inputs(cpu, torch.float64)
    cache = Layout(16).make(case, 2600, cpu, torch.float64)
    fill(cache, case, k, v, seqlens, options)
    arguments = {**cache, **options, "k": k[:, -seqlen_q:], "v": v[:, -seqlen_q:], "cache_seqlens": seqlens}
    alone = chunkattn.dca_with_kvcache(q, **arguments, num_splits=1)
    torch.set_num_threads(threads)
    try:
        together = chunkattn.dca_with_kvcache(q, **arguments)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_results_repeat_bitwise(device):
    case = LONG.but(seqlen_q=1)
    options = decode_options(case, device)
    seqlens = lengths(device, 700, 130)
    for dtype in dtypes(device):
        q, k, v = case.but(seqlen_k=700).inputs(device, dtype)
        cache = Layout(64).make(case, 700, device, dtype)
        fill(cache, case, k, v, seqlens, options)
        first, *others = (
            chunkattn.dca_with_kvcache(q, **cache, **options, cache_seqlens=seqlens, num_splits=4) for _ in range(4)
        )
        assert all(torch.equal(first, other) for other in others)


@st.composite
def decode_calls(draw):
    chunk_size = draw(st.integers(2, 90))
    kv_heads = draw(st.integers(1, 3))
    head_dim = draw(st.integers(2, 70))
    batch = draw(st.integers(1, 4))
    case = Case(
        seqlen_q=draw(st.integers(1, 40)),
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        chunk_size=chunk_size,
        local_size=draw(st.integers(1, chunk_size - 1)),
        temperature=draw(st.none() | st.tuples(*[st.floats(0.25, 4, width=32)] * batch)),
        interleaved=draw(st.booleans()),
        q_rotated=draw(st.booleans()),
    )
    return case, {
        "seqlens": draw(st.lists(st.integers(0, 260), min_size=batch, max_size=batch)),
        "layout": Layout(draw(st.none() | st.integers(16, 70)), draw(st.booleans())),
        "seqlen_new": draw(st.integers(0, 40)),
        "num_splits": draw(st.integers(0, 6)),
    }


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=decode_calls())
def test_random_calls(device, call):
    case, arguments = call
    check_all_dtypes(case, device, **arguments)


class Engine:
    """A batch of sequences that join and leave, over one pool of pages whose free ones hold NaN.

    Some share a prefix: their tables name the same pages, as many as the prefix fills.
    """

    def __init__(self, case: Case, device, dtype, *, page_size: int, pages: int, width: int, seed: int):
        self.case, self.device, self.dtype, self.page_size, self.width = case, device, dtype, page_size, width
        self.options = decode_options(case, device)
        self.k_cache, self.v_cache = (
            torch.full((pages, page_size, case.kv_heads, case.head_dim), torch.nan, dtype=dtype, device=device)
            for _ in "kv"
        )
        self.free = list(range(pages))
        self.random = random.Random(seed)
        self.random.shuffle(self.free)
        self.generator = torch.Generator().manual_seed(seed)
        self.active: list[dict] = []
        self.users = [0] * pages  # sequences that have the page

    def tokens(self, heads: int, count: int) -> torch.Tensor:
        shape = (1, count, heads, self.case.head_dim)
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def step(self, sequences: list[dict], count: int) -> None:
        """`count` new tokens for each of some sequences, in one call."""
        heads = (self.case.heads, self.case.kv_heads, self.case.kv_heads)
        q, k, v = (torch.cat([self.tokens(h, count) for _ in sequences]) for h in heads)
        seqlens = lengths(self.device, *(s["k"].shape[1] for s in sequences))
        table = torch.full((len(sequences), self.width), -1, dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            needed = -(-(sequence["k"].shape[1] + count) // self.page_size)
            while len(sequence["pages"]) < needed:
                self.use(sequence, [self.free.pop()])
            table[row, :needed] = torch.tensor(sequence["pages"], dtype=torch.int32)
        out = chunkattn.dca_with_kvcache(
            q,
            self.k_cache,
            self.v_cache,
            **self.options,
            cache_seqlens=seqlens,
            block_table=table.to(self.device),
            k=k,
            v=v,
        )
        for row, sequence in enumerate(sequences):
            part = slice(row, row + 1)
            sequence.update(q=q[part], out=out[part])
            sequence["k"], sequence["v"] = (
                torch.cat((sequence[name], new[part]), dim=1) for name, new in (("k", k), ("v", v))
            )

    def use(self, sequence: dict, pages: list[int]) -> None:
        sequence["pages"] += pages
        for page in pages:
            self.users[page] += 1

    def join(self) -> None:
        """A sequence whose prompt is read in pieces, behind a prefix that it shares with another or none."""
        empty = self.tokens(self.case.kv_heads, 0)
        sequence = {"k": empty, "v": empty, "pages": []}
        if self.active and self.random.random() < 0.5:
            other = self.random.choice(self.active)
            pages = self.random.randint(0, other["k"].shape[1] // self.page_size)
            self.use(sequence, other["pages"][:pages])
            sequence["k"], sequence["v"] = (other[name][:, : pages * self.page_size] for name in "kv")
        self.active.append(sequence)
        for _ in range(self.random.randint(1, 3)):
            self.step([sequence], self.random.randint(1, 30))

    def leave(self) -> None:
        sequence = self.active.pop(self.random.randrange(len(self.active)))
        for page in sequence["pages"]:
            self.users[page] -= 1
        freed = [page for page in sequence["pages"] if self.users[page] == 0]
        for cache in (self.k_cache, self.v_cache):
            cache[freed] = torch.nan
        self.free += freed
        self.random.shuffle(self.free)

    def check(self, sequence: dict) -> None:
        qkv = [sequence[name] for name in "qkv"]
        oracle = chunkattn.reference.dca(*(x.double() for x in qkv), **self.options)
        assert_within_rule(sequence["out"], oracle, chunkattn.reference.dca(*qkv, **self.options), "out")


def test_soak(device):
    """Random joins, leaves and steps of mixed lengths, prefixes shared, checked at random moments."""
    steps, longest = (400, 150) if device.type == "cpu" else (10_000, 600)
    case = Case(heads=4, kv_heads=2, head_dim=32, chunk_size=60, local_size=19)
    dtype = torch.bfloat16
    width = -(-(longest + 100) // 16)
    engine = Engine(case, device, dtype, page_size=16, pages=8 * width, width=width, seed=1)
    for _ in range(steps):
        if len(engine.active) < 7 and engine.random.random() < 0.1:
            engine.join()
        too_long = any(s["k"].shape[1] >= longest for s in engine.active)
        while engine.active and (too_long or engine.random.random() < 0.05):
            engine.leave()
            too_long = any(s["k"].shape[1] >= longest for s in engine.active)
        if engine.active:
            engine.step(engine.active, engine.random.choice((1, 1, 1, 4)))
            if engine.random.random() < 0.1:
                engine.check(engine.random.choice(engine.active))
    for sequence in engine.active:
        engine.check(sequence)
    while engine.active:
        engine.leave()
    assert sorted(engine.free) == list(range(8 * width))
