"""Rotary rows, NTK bases and CRD NTK, and the logit temperature, against formulas in float64."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

import chunkattn
from chunkattn import CRDNTK, dynamic_ntk_base, ntk_base, rope_rows, temperature
from chunkattn.rotary import CyclicRotary

LLAMA = {"base": 10000.0, "rotary_dim": 128, "original_length": 4096}
SMALL = CRDNTK(500.0, 8, 32, base_period=64, period_start=16, period_max=100, grow_every=10, factor=1.5, factor_max=4.0)
STEPS, LENGTH = 3000, 50


def seeded(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def exact(base):
    return pytest.approx(base, rel=1e-14, abs=0)


def test_rows_of_any_positions():
    positions = torch.tensor([[0, 1, 17], [2**24 + 1, 40, 3]], dtype=torch.int32)
    cos, sin = rope_rows(positions, 6, base=777.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (2, 3, 3)
    for row in range(2):
        for column in range(3):
            for d in range(3):
                angle = positions[row, column].item() * 777.0 ** (-2 * d / 6)
                assert cos[row, column, d].item() == pytest.approx(math.cos(angle), abs=1e-7)
                assert sin[row, column, d].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_table_holds_rows():
    table = chunkattn.rope_table(40, 12, 300.0)
    rows = rope_rows(torch.arange(41), 12, 300.0)
    torch.testing.assert_close(table, rows, rtol=0, atol=0)


@pytest.mark.parametrize("rotary_dim", [4, 64, 128])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 31.7])
def test_ntk_base_divides_the_lowest_frequency(rotary_dim, scale):
    base = ntk_base(10000.0, rotary_dim, scale)
    lowest = -(rotary_dim - 2) / rotary_dim
    assert base**lowest == exact(10000.0**lowest / scale)
    assert base == exact(10000.0 * math.exp(math.log(scale) * rotary_dim / (rotary_dim - 2)))


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 8])
@pytest.mark.parametrize("length", [4097, 8192, 1 << 20])
def test_dynamic_ntk_base(length, factor):
    scale = factor * length / 4096 - (factor - 1)
    assert dynamic_ntk_base(1e4, 128, length, 4096, factor) == exact(1e4 * scale ** (128 / 126))
    assert dynamic_ntk_base(1e4, 128, length, 4096, factor) > 1e4


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 8])
@pytest.mark.parametrize("length", [1, 2048, 4096])
def test_dynamic_ntk_keeps_the_base_up_to_the_trained_length(length, factor):
    assert dynamic_ntk_base(1e4, 128, length, 4096, factor) == 1e4


@pytest.mark.parametrize(
    ("step", "period", "factor"),
    [(0, 16, 1.5), (9, 16, 1.5), (10, 32, 3.0), (19, 32, 3.0), (20, 64, 4.0), (29, 64, 4.0), (30, 100, 4.0)],
)
def test_period_and_factor_double(step, period, factor):
    assert SMALL.period_at(step) == period
    assert SMALL.factor_at(step) == factor


def test_growth_ends():
    assert (SMALL.period_at(10**18), SMALL.factor_at(10**18)) == (100, 4.0)
    recorded = CRDNTK(**LLAMA)
    steps = (0, 1999, 2000, 4000, 9999, 10000, 10**18)
    assert [recorded.period_at(step) >> 10 for step in steps] == [32, 32, 64, 128, 512, 1024, 1024]
    assert {recorded.factor_at(step) for step in steps} == {1.0}
    constant = CRDNTK(**LLAMA, period_start=64, period_max=64, factor=3.0, factor_max=3.0)
    assert (constant.period_at(10**6), constant.factor_at(10**6)) == (64, 3.0)


@pytest.mark.parametrize("step", [0, 10, 30, 31])
def test_draw_is_its_formula(step):
    draw = SMALL.draw(step, LENGTH, seeded())
    factor = min(1.5 * 2 ** (step // 10), 4.0)
    scale = factor * draw.cycle / 32 - (factor - 1)
    assert draw.rotary_dim == 8
    assert draw.base == exact(500.0 * scale ** (8 / 6))


@pytest.mark.parametrize(("period", "values"), [(2, 1), (3, 1), (4, 2), (16, 8), (17, 8)])
def test_truncation_takes_every_value_of_its_range(period, values):
    settings = dataclasses.replace(SMALL, period_start=period, period_max=period)
    drawn = {settings.draw(step, LENGTH, seeded()).cycle for step in range(300)}
    assert drawn == set(range(64 + LENGTH, 64 + LENGTH + values))


def test_truncation_and_offset_are_uniform():
    settings = CRDNTK(**LLAMA, grow_every=10**6)
    draws = [settings.draw(step, LENGTH, seeded()) for step in range(STEPS)]
    offsets = [draw.offset / 2**22 for draw in draws]
    truncations = [(draw.cycle - 32768 - LENGTH) / 16384 for draw in draws]
    for values in (offsets, truncations):
        assert 0 <= min(values) < 0.01
        assert 0.99 < max(values) < 1
        counts = torch.histc(torch.tensor(values), bins=16, min=0, max=1)
        expected = STEPS / 16
        # The 0.9999 quantile of chi-squared with 15 degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < 44.3
    # Neither predicts the other, nor the next step's; 4 standard errors.
    bound = 4 / math.sqrt(STEPS)
    for first, second in ((offsets, truncations), (offsets[:-1], offsets[1:]), (truncations[:-1], truncations[1:])):
        assert abs(torch.corrcoef(torch.tensor([first, second]))[0, 1]) < bound


def test_draw_depends_on_its_arguments_alone():
    generator = seeded()
    state = generator.get_state()
    draw = SMALL.draw(7, LENGTH, generator)
    torch.manual_seed(5)
    SMALL.draw(8, LENGTH, generator)
    torch.rand(3)
    assert SMALL.draw(7, LENGTH, generator) == draw
    assert torch.equal(generator.get_state(), state)
    assert dataclasses.replace(SMALL).draw(7, LENGTH, seeded()) == draw

    assert SMALL.draw(8, LENGTH, generator).offset != draw.offset
    assert SMALL.draw(7, LENGTH, seeded(1)).offset != draw.offset
    longer = SMALL.draw(7, LENGTH + 5, generator)
    assert (longer.offset, longer.cycle) == (draw.offset, draw.cycle + 5)
    torch.rand((), generator=generator)
    assert SMALL.draw(7, LENGTH, generator).offset != draw.offset


def test_draw_reads_a_generator_of_any_device(device):
    generator = torch.Generator(device).manual_seed(3)
    state = generator.get_state()
    draw = SMALL.draw(7, LENGTH, generator)
    assert SMALL.draw(7, LENGTH, torch.Generator(device).manual_seed(3)) == draw
    assert torch.equal(generator.get_state(), state)


def test_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    SMALL.draw(7, LENGTH, seeded())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_at_the_ends_of_the_cycle(dtype):
    rotary = CyclicRotary(rotary_dim=8, base=500.0, offset=97, cycle=100)
    positions = torch.tensor([[0, 1, 2], [3, 102, 103]], dtype=dtype)
    wrapped = rotary.positions(positions)
    assert wrapped.dtype == torch.int64
    assert wrapped.tolist() == [[97, 98, 99], [0, 99, 0]]


def test_positions_do_not_overflow_narrow_integers():
    rotary = CyclicRotary(rotary_dim=8, base=500.0, offset=2**22 - 1, cycle=1000)
    assert rotary.positions(torch.tensor([127], dtype=torch.int8)).item() == (127 + 2**22 - 1) % 1000
    assert rotary.positions(torch.tensor([2**31 - 1], dtype=torch.int32)).item() == (2**31 + 2**22 - 2) % 1000


def test_positions_of_a_sequence_are_distinct_and_contiguous_on_the_circle():
    for step in random.Random(0).sample(range(10**6), 20):
        draw = SMALL.draw(step, LENGTH, seeded())
        wrapped = draw.positions(torch.arange(LENGTH)).tolist()
        assert len(set(wrapped)) == LENGTH
        assert all((b - a) % draw.cycle == 1 for a, b in itertools.pairwise(wrapped))


def test_rows_of_a_draw():
    settings = CRDNTK(**LLAMA)
    draw = settings.draw(12345, 20000, seeded())
    positions = torch.tensor([0, 1, 9999, 19999])
    cos, sin = draw.rows(positions)
    assert cos.shape == sin.shape == (4, 64)
    for row, position in enumerate(positions.tolist()):
        for d in (0, 1, 31, 63):
            angle = ((position + draw.offset) % draw.cycle) * draw.base ** (-2 * d / 128)
            assert cos[row, d].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[row, d].item() == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_temperature_is_its_formula(make):
    lengths = [1001, 2000, 8000, 1_000_000, 2**31 - 1]
    result = temperature(make(lengths), 1000)
    assert result.dtype == torch.float32
    assert result.shape == (5,)
    for value, length in zip(result.tolist(), lengths, strict=True):
        assert value == pytest.approx((0.1 * math.log(length / 1000) + 1) ** 2, rel=2**-24, abs=0)


def test_temperature_is_one_up_to_the_original_length():
    assert temperature([0, 1, 262143, 262144], 262144).tolist() == [1, 1, 1, 1]
    assert temperature([262145], 262144).item() > 1
    assert temperature([], 262144).shape == (0,)


def test_temperature_stays_on_its_device(device):
    lengths = torch.tensor([10, 100], dtype=torch.int32, device=device)
    assert temperature(lengths, 10).device == lengths.device
    assert temperature(torch.empty(3, dtype=torch.int64, device="meta"), 10).device.type == "meta"


def test_temperature_is_ready_for_dca(device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = torch.randn(3, 2, 30, 2, 16, generator=seeded()).to(device, dtype)
    settings = {"chunk_size": 12, "local_size": 4}
    table = chunkattn.rope_table(12, 16, device=device)
    both = chunkattn.dca(q, k, v, *table, **settings, temperature=temperature(torch.tensor([3, 30], device=device), 4))
    for row, factor in enumerate((1.0, (0.1 * math.log(30 / 4) + 1) ** 2)):
        alone = chunkattn.dca(q[row, None], k[row, None], v[row, None], *table, **settings, temperature=factor)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(both[row], alone[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rope_rows([1, 2], 8), TypeError, "positions must be a tensor, got list"),
        (lambda: rope_rows(torch.ones(2), 8), TypeError, r"positions must have an integer dtype, got torch\.float32"),
        (lambda: rope_rows(torch.arange(2), 7), ValueError, "rotary_dim must be even and at least 2, got 7"),
        (lambda: rope_rows(torch.arange(2), 8, -1.0), ValueError, "base must be positive, got -1.0"),
        (lambda: ntk_base("a", 8, 2.0), TypeError, "base must be a number, got 'a'"),
        (lambda: ntk_base(0.0, 8, 2.0), ValueError, "base must be positive and finite, got 0.0"),
        (lambda: ntk_base(math.inf, 8, 2.0), ValueError, "base must be positive and finite, got inf"),
        (lambda: ntk_base(1e4, 2, 2.0), ValueError, "rotary_dim must be at least 4, got 2"),
        (lambda: ntk_base(1e4, 5, 2.0), ValueError, "rotary_dim must be even and at least 4, got 5"),
        (lambda: ntk_base(1e4, 8.0, 2.0), TypeError, "rotary_dim must be an int, got 8.0"),
        (lambda: ntk_base(1e4, 8, 0), ValueError, "scale must be positive and finite, got 0"),
        (lambda: ntk_base(1e4, 8, math.nan), ValueError, "scale must be positive and finite, got nan"),
        (lambda: dynamic_ntk_base(1e4, 8, 0, 5), ValueError, "length must be at least 1, got 0"),
        (lambda: dynamic_ntk_base(1e4, 8, 9, 0), ValueError, "original_length must be at least 1, got 0"),
        (lambda: dynamic_ntk_base(1e4, 8, 9, 5, -1.0), ValueError, "factor must be positive and finite, got -1.0"),
        (lambda: SMALL.period_at(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: SMALL.factor_at(0.5), TypeError, "step must be an int, got 0.5"),
        (lambda: SMALL.draw(-1, 8, seeded()), ValueError, "step must be at least 0, got -1"),
        (lambda: SMALL.draw(True, 8, seeded()), TypeError, "step must be an int, got True"),
        (lambda: SMALL.draw(0, 0, seeded()), ValueError, "length must be at least 1, got 0"),
        (lambda: SMALL.draw(0, 8, 42), TypeError, r"generator must be a torch\.Generator, got int"),
        (lambda: SMALL.draw(0, 8, None), TypeError, r"generator must be a torch\.Generator, got NoneType"),
        (lambda: SMALL.draw(0, 8, seeded()).positions([1]), TypeError, "positions must be a tensor, got list"),
        (lambda: SMALL.draw(0, 8, seeded()).rows(torch.ones(2)), TypeError, "positions must have an integer dtype"),
        (lambda: temperature(8, 4), TypeError, "seqlens must be a tensor or a sequence of ints, got int"),
        (lambda: temperature("8", 4), TypeError, "seqlens must be a tensor or a sequence of ints, got str"),
        (lambda: temperature([8, 9.0], 4), TypeError, r"seqlens\[1\] must be an int, got 9\.0"),
        (lambda: temperature([-1], 4), ValueError, r"seqlens\[0\] must be at least 0, got -1"),
        (lambda: temperature(torch.ones(2), 4), TypeError, r"seqlens must have an integer dtype, got torch\.float32"),
        (lambda: temperature(torch.tensor(8), 4), ValueError, r"seqlens must have 1 dimension .* got shape \[\]"),
        (lambda: temperature([8], 0), ValueError, "original_length must be at least 1, got 0"),
        (lambda: temperature([8], 4.0), TypeError, "original_length must be an int, got 4.0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"base": -1.0}, ValueError, "base must be positive and finite, got -1.0"),
        ({"rotary_dim": 2}, ValueError, "rotary_dim must be at least 4, got 2"),
        ({"original_length": 0}, ValueError, "original_length must be at least 1, got 0"),
        ({"base_period": -1}, ValueError, "base_period must be at least 0, got -1"),
        ({"period_start": 1}, ValueError, "period_start must be at least 2, got 1"),
        ({"period_max": 15}, ValueError, "period_max must be at least 16, got 15"),
        ({"period_max": 1e6}, TypeError, r"period_max must be an int, got 1000000\.0"),
        ({"grow_every": 0}, ValueError, "grow_every must be at least 1, got 0"),
        ({"factor": 0.0}, ValueError, "factor must be positive and finite, got 0.0"),
        ({"factor_max": math.inf}, ValueError, "factor_max must be positive and finite, got inf"),
        ({"factor_max": 1.0}, ValueError, r"factor_max must be at least factor, 1\.5, got 1\.0"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **settings)
