"""The oracle against a second formulation: one pair of tokens at a time, rotations as complex numbers."""

import cmath
import itertools
import math
import sys

import pytest
import torch
from cases import Case

import chunkattn


def rotate_pairs(vector, cos, sin, interleaved):
    """A head's vector, a list of floats, turned by one row of the table."""
    half = len(cos)
    turned = list(vector)
    for d in range(half):
        a, b = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
        pair = complex(vector[a], vector[b]) * complex(cos[d], sin[d])
        turned[a], turned[b] = pair.real, pair.imag
    return turned


def rows_of_pair(i, j, s, w):
    """The table rows of a query at i and a key at j, straight from the table of the paper."""
    c = s - w
    chunks_apart = i // c - j // c
    if chunks_apart == 0:
        return i % c, j % c
    if chunks_apart == 1:
        return min(i % c + c, s), j % c
    return min(2 * c - 1, s), j % c


def dca_by_pairs(q, k, v, *, cos, sin, chunk_size, local_size, scale, temperature, interleaved, q_rotated, k_rotated):
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    c = chunk_size - local_size
    out = torch.zeros_like(q)
    lse = q.new_zeros(batch, heads, seqlen_q)
    queries, keys, cos, sin = (tensor.tolist() for tensor in (q, k, cos, sin))
    for b, h, n in itertools.product(range(batch), range(heads), range(seqlen_q)):
        g = h * kv_heads // heads
        i = seqlen_k - seqlen_q + n
        factor = 1 / math.sqrt(head_dim) if scale is None else scale
        if temperature is not None:
            factor *= temperature[b].item() if isinstance(temperature, torch.Tensor) else temperature
        logits = []
        for j in range(i + 1):
            row, key_row = rows_of_pair(i, j, chunk_size, local_size)
            row -= i % c if q_rotated else 0
            query = rotate_pairs(queries[b][n][h], cos[row], sin[row], interleaved)
            key = keys[b][j][g] if k_rotated else rotate_pairs(keys[b][j][g], cos[key_row], sin[key_row], interleaved)
            logits.append(factor * sum(x * y for x, y in zip(query, key, strict=True)))
        largest = max(logits)
        weights = [math.exp(x - largest) for x in logits]
        lse[b, h, n] = largest + math.log(sum(weights))
        for j, weight in enumerate(weights):
            out[b, n, h] += weight / sum(weights) * v[b, j, g]
    return out, lse


TINY = Case(seqlen_q=14, batch=1, heads=2, kv_heads=1, head_dim=6, chunk_size=7, local_size=3)


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        TINY.but(local_size=1),
        TINY.but(local_size=4),
        TINY.but(local_size=6),
        TINY.but(seqlen_q=3, seqlen_k=14),
        TINY.but(seqlen_q=1, seqlen_k=9),
        TINY.but(heads=6, kv_heads=3, seqlen_q=9),
        TINY.but(rotary_dim=4),
        TINY.but(rotary_dim=2, head_dim=5),
        TINY.but(interleaved=True),
        TINY.but(interleaved=True, rotary_dim=4),
        TINY.but(q_rotated=True),
        TINY.but(k_rotated=True),
        TINY.but(q_rotated=True, k_rotated=True, interleaved=True),
        TINY.but(scale=0.7),
        TINY.but(temperature=1.3),
        TINY.but(batch=2, seqlen_q=9, temperature=(0.5, 2.0)),
    ],
    ids=str,
)
def test_oracle_equals_pairs(case):
    cpu = torch.device("cpu")
    qkv = case.inputs(cpu, torch.float64)
    options = case.options(cpu)
    out, lse = chunkattn.reference.dca(*qkv, **options, return_lse=True)
    del options["deterministic"]
    pairs_out, pairs_lse = dca_by_pairs(*qkv, **options)
    torch.testing.assert_close(out, pairs_out, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, pairs_lse, rtol=0, atol=1e-13)


def test_oracle_in_blocks_equals_oracle_at_once(monkeypatch):
    cpu = torch.device("cpu")
    case = Case(temperature=(1.0, 1.5))
    qkv, options = case.inputs(cpu, torch.float64), case.options(cpu)
    at_once = chunkattn.reference.dca(*qkv, **options, return_lse=True)
    # 13 queries at a time: no divisor of the length or of the stride.
    monkeypatch.setattr(
        sys.modules["chunkattn.reference.dca"], "_LOGITS_PER_BLOCK", 13 * case.batch * case.heads * case.seqlen_q
    )
    in_blocks = chunkattn.reference.dca(*qkv, **options, return_lse=True)
    torch.testing.assert_close(in_blocks, at_once, rtol=0, atol=1e-14)


def test_oracle_has_the_right_gradients():
    cpu = torch.device("cpu")
    case = TINY.but(seqlen_q=10, seqlen_k=12, temperature=1.2)
    qkv, options = case.inputs(cpu, torch.float64), case.options(cpu)
    qkv = tuple(x.requires_grad_() for x in qkv)
    assert torch.autograd.gradcheck(lambda *x: chunkattn.reference.dca(*x, **options), qkv)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_oracle_runs_in_any_dtype(dtype):
    cpu = torch.device("cpu")
    case = Case()
    out, lse = chunkattn.reference.dca(*case.inputs(cpu, dtype), **case.options(cpu), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = chunkattn.reference.dca(*case.inputs(cpu, torch.float64), **case.options(cpu))
    assert (out.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps


def test_rows_of_the_table_are_rotations():
    cos, sin = chunkattn.rope_table(50, 8, base=500.0)
    assert cos.shape == sin.shape == (51, 4)
    assert cos.dtype == sin.dtype == torch.float32
    for row in (0, 1, 17, 50):
        for d in range(4):
            exact = cmath.exp(1j * row * 500.0 ** (-2 * d / 8))
            assert cos[row, d].item() == pytest.approx(exact.real, abs=1e-7)
            assert sin[row, d].item() == pytest.approx(exact.imag, abs=1e-7)


def test_table_stays_exact_at_large_rows():
    # A float32 product of row and frequency is off by about 0.01 rad here.
    cos, sin = chunkattn.rope_table(1 << 18, 4, base=1e7)
    for row in ((1 << 18) - 1, 1 << 18):
        for d in range(2):
            angle = row * 1e7 ** (-2 * d / 4)
            assert cos[row, d].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[row, d].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_table_takes_frequencies():
    inv_freq = torch.tensor([1.0, 0.25, 0.03])
    cos, sin = chunkattn.rope_table(20, 6, base=77.0, inv_freq=inv_freq)
    angles = torch.arange(21, dtype=torch.float64)[:, None] * inv_freq.double()
    torch.testing.assert_close(cos, angles.cos().float(), rtol=0, atol=0)
    torch.testing.assert_close(sin, angles.sin().float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0, "rotary_dim": 8}, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 8, "rotary_dim": 7}, "rotary_dim must be even .* got 7"),
        ({"chunk_size": 8, "rotary_dim": 0}, "rotary_dim must be even .* got 0"),
        ({"chunk_size": 8, "rotary_dim": 8, "base": 0.0}, "base must be positive, got 0.0"),
        ({"chunk_size": 8, "rotary_dim": 8, "inv_freq": torch.ones(3)}, r"inv_freq must have shape \[4\], got \[3\]"),
    ],
)
def test_table_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        chunkattn.rope_table(**arguments)
