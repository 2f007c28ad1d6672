"""chunkattn._core: the position rules against the definition, build information and launch plans."""

from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkattn import _core
from chunkattn._core import ChunkGeometry, Mask, QueryTiling, Regime

ARCHITECTURES = Path(__file__).parents[1] / "cmake" / "cuda_architectures.txt"


@st.composite
def chunk_sizes(draw, largest: int = 40) -> tuple[int, int]:
    chunk_size = draw(st.integers(2, largest))
    return chunk_size, draw(st.integers(1, chunk_size - 1))


def expected_regime(c: int, i: int, j: int) -> Regime:
    return (Regime.INTRA, Regime.SUCC)[i // c - j // c] if i // c - j // c < 2 else Regime.INTER


def expected_row(s: int, w: int, i: int, j: int) -> int:
    """The query's row for the key at j, arXiv 2402.17463."""
    c = s - w
    rows = {Regime.INTRA: i % c, Regime.SUCC: min(i % c + c, s), Regime.INTER: min(2 * c - 1, s)}
    return rows[expected_regime(c, i, j)]


@settings(deadline=None)
@given(chunk_sizes(), st.integers(0, 200), st.data())
def test_rows(sizes, i, data):
    s, w = sizes
    c = s - w
    j = data.draw(st.integers(0, i))
    geometry = ChunkGeometry(s, w)
    regime = geometry.regime(i, j)
    row = expected_row(s, w, i, j)
    assert (geometry.chunk_size, geometry.local_size, geometry.stride) == (s, w, c)
    assert regime == expected_regime(c, i, j)
    assert geometry.query_row(regime, i) == row
    assert geometry.query_rotation(regime, i, already_rotated=False) == row
    assert geometry.query_rotation(regime, i, already_rotated=True) == row - i % c
    assert geometry.key_row(j) == j % c
    assert geometry.chunk_begin(i) == i // c * c


@settings(deadline=None)
@given(chunk_sizes(), st.integers(0, 100), st.integers(0, 60), st.integers(1, 33))
def test_tiles_and_segments_cover_the_causal_pairs(sizes, begin, length, tile_size):
    s, w = sizes
    geometry = ChunkGeometry(s, w)
    tiles = list(QueryTiling(geometry, begin, begin + length, tile_size))
    assert [i for tile in tiles for i in range(*tile)] == list(range(begin, begin + length))
    for tile_begin, tile_end in tiles:
        assert 0 < tile_end - tile_begin <= tile_size
        segments = geometry.segments(tile_begin, tile_end)
        for i in range(tile_begin, tile_end):
            rows = [
                (j, geometry.query_row(segment.regime, i))
                for segment in segments
                for j in range(segment.key_begin, segment.key_end)
                if segment.mask == Mask.NONE or j <= i
            ]
            assert sorted(rows) == [(j, expected_row(s, w, i, j)) for j in range(i + 1)]


def test_far_segments_merge_where_their_rows_agree():
    geometry = ChunkGeometry(chunk_size=384, local_size=128)
    near = [(s.key_begin, s.key_end, s.regime, s.mask) for s in geometry.segments(768, 832)]
    assert near == [
        (768, 832, Regime.INTRA, Mask.CAUSAL),
        (512, 768, Regime.SUCC, Mask.NONE),
        (0, 512, Regime.INTER, Mask.NONE),
    ]
    far = [(s.key_begin, s.key_end, s.regime, s.mask) for s in geometry.segments(896, 960)]
    assert far == [(768, 960, Regime.INTRA, Mask.CAUSAL), (0, 768, Regime.INTER, Mask.NONE)]


GEOMETRY = ChunkGeometry(8, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ChunkGeometry(8, 0), ValueError, "local_size is 0; they take 0 < local_size < chunk_size"),
        (lambda: ChunkGeometry(8, 8), ValueError, "local_size is 8; they take 0 < local_size < chunk_size"),
        (lambda: ChunkGeometry(2**30 + 1, 1), ValueError, r"chunk_size is 1073741825 .* <= 2\*\*30"),
        (lambda: GEOMETRY.key_row(-1), ValueError, "position is -1; it takes an index from 0 on"),
        (lambda: GEOMETRY.chunk_begin(-1), ValueError, "position is -1; it takes an index from 0 on"),
        (lambda: GEOMETRY.query_row(Regime.SUCC, -3), ValueError, "position is -3; it takes an index from 0 on"),
        (lambda: GEOMETRY.regime(3, 4), ValueError, "query_position is 3; it takes key_position, 4, or a later"),
        (lambda: GEOMETRY.regime(3, -1), ValueError, "key_position is -1; it takes an index from 0 on"),
        (lambda: GEOMETRY.segments(5, 7), ValueError, r"queries \[5, 7\) are no tile: .* all in one chunk of 6"),
        (lambda: GEOMETRY.segments(5, 5), ValueError, r"queries \[5, 5\) are no tile: it takes at least one query"),
        (lambda: QueryTiling(GEOMETRY, 4, 3, 2), ValueError, "end is 3; it takes begin, 4, or a later position"),
        (lambda: QueryTiling(GEOMETRY, 0, 3, 0), ValueError, "size is 0; it takes at least 1"),
        (lambda: QueryTiling(GEOMETRY, 0, 8, 4)[3], IndexError, "index is 3; it takes 0 to 2"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_build_info():
    info = _core.build_info()
    assert set(info) == {"version", "torch", "compiler", "cuda", "cuda_architectures"}
    assert info["version"] == version("chunkattn")
    lines = [line for line in ARCHITECTURES.read_text().splitlines() if line and not line.startswith("#")]
    assert info["cuda_architectures"] == (lines if info["cuda"] else [])


def test_compiled_kernels():
    kernels = _core.compiled_kernels()
    assert bool(kernels) == (_core.build_info()["cuda"] is not None)
    assert len({(kernel.name, kernel.head_dim_padded) for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize(("head_dim", "padded"), [(1, 64), (64, 64), (80, 128), (128, 128), (129, 256), (256, 256)])
@pytest.mark.parametrize("find_plan", [_core.plan_forward, _core.plan_backward])
def test_plan_pads_head_dim(find_plan, head_dim, padded):
    shape = {"batch": 1, "seqlen_q": 100, "seqlen_k": 200, "heads": 8, "kv_heads": 2}
    plan = find_plan(**shape, head_dim=head_dim, compute_capability=80)
    assert plan.head_dim_padded == padded


@pytest.mark.parametrize("find_plan", [_core.plan_forward, _core.plan_backward])
def test_plan_refuses_what_no_kernel_takes(find_plan):
    shape = {"batch": 1, "seqlen_q": 100, "seqlen_k": 200, "heads": 8, "kv_heads": 2}
    with pytest.raises(ValueError, match=r"head_dim .*257"):
        find_plan(**shape, head_dim=257, compute_capability=90)
