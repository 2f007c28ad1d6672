// geometry.h against the rule written out pair by pair.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <set>
#include <utility>

#include "check.h"
#include "geometry.h"

namespace {

using chunkattn::ChunkGeometry;
using chunkattn::Mask;
using chunkattn::QueryTile;
using chunkattn::QueryTiling;
using chunkattn::Regime;
using chunkattn::regime_rows;
using chunkattn::RegimeRows;
using chunkattn::Segment;
using chunkattn::SegmentList;

// The table of arXiv 2402.17463, in 64 bits: rows of the query and the key, and the distance in chunks.
struct Pair {
  int64_t chunks;
  int64_t query_row;
  int64_t key_row;
};

Pair expected_pair(int64_t s, int64_t w, int64_t i, int64_t j) {
  const int64_t c = s - w;
  const int64_t chunks = i / c - j / c;
  if (chunks == 0) return {chunks, i % c, j % c};
  if (chunks == 1) return {chunks, std::min(i % c + c, s), j % c};
  return {chunks, std::min(2 * c - 1, s), j % c};
}

Regime expected_regime(int64_t chunks) {
  return chunks == 0 ? Regime::kIntra : chunks == 1 ? Regime::kSucc : Regime::kInter;
}

void test_pairs(const ChunkGeometry& g, int length) {
  const int s = g.chunk_size, w = g.local_size;
  for (int i = 0; i < length; ++i) {
    for (int j = 0; j <= i; ++j) {
      const Pair expected = expected_pair(s, w, i, j);
      const Regime regime = g.regime(i, j);
      const int row = g.query_row(regime, i);
      CHECK(regime == expected_regime(expected.chunks), "s ", s, " w ", w, " i ", i, " j ", j);
      CHECK(row == expected.query_row, "s ", s, " w ", w, " i ", i, " j ", j, " row ", row);
      CHECK(row >= 0 && row <= s, "s ", s, " w ", w, " i ", i, " j ", j, " row ", row);
      CHECK(g.key_row(j) == expected.key_row, "s ", s, " w ", w, " j ", j);
      CHECK(g.query_rotation(regime, i, false) == expected.query_row, "s ", s, " w ", w, " i ", i, " j ", j);
      CHECK(g.query_rotation(regime, i, true) == expected.query_row - i % (s - w), "s ", s, " w ", w, " i ", i);
    }
  }
}

// Every pair i >= j is in exactly one segment, whose rotation is the pair's; no other pair is in any.
void test_coverage(const ChunkGeometry& g, QueryTile tile, const SegmentList& list) {
  const int s = g.chunk_size, w = g.local_size;
  for (int i = tile.begin; i < tile.end; ++i) {
    for (int j = 0; j < tile.end; ++j) {
      int seen = 0;
      for (int n = 0; n < list.count; ++n) {
        const Segment& segment = list.items[n];
        const bool in_range = segment.key_begin <= j && j < segment.key_end;
        if (!in_range || (segment.mask == Mask::kCausal && j > i)) continue;
        ++seen;
        const int64_t expected = j <= i ? expected_pair(s, w, i, j).query_row : -1;
        CHECK(g.query_row(segment.regime, i) == expected, "s ", s, " w ", w, " i ", i, " j ", j, " segment ", n);
      }
      CHECK(seen == (j <= i ? 1 : 0), "s ", s, " w ", w, " i ", i, " j ", j, " seen ", seen);
    }
  }
}

// Keys in tiles of their own see the tile of queries as its segments do.
void test_tile_regimes(const ChunkGeometry& g, QueryTile tile, const SegmentList& list) {
  for (int n = 0; n < list.count; ++n) {
    const Segment& segment = list.items[n];
    for (int j = segment.key_begin; j < segment.key_end; ++j) {
      CHECK(g.tile_regime(tile.begin, j) == segment.regime, "s ", g.chunk_size, " w ", g.local_size, " tile ",
            tile.begin, " key ", j);
    }
  }
}

// No segment more than the rows of the tile's queries call for.
int expected_segment_count(const ChunkGeometry& g, QueryTile tile) {
  const int64_t s = g.chunk_size, c = g.stride();
  const int64_t chunk = tile.begin / c;
  if (chunk <= 1) return static_cast<int>(chunk) + 1;
  for (int i = tile.begin; i < tile.end; ++i) {
    if (std::min(i % c + c, s) != std::min(2 * c - 1, s)) return 3;
  }
  return 2;
}

void test_segments(const ChunkGeometry& g, QueryTile tile) {
  const int s = g.chunk_size, w = g.local_size;
  const SegmentList list = g.segments(tile);
  CHECK(list.count == expected_segment_count(g, tile), "s ", s, " w ", w, " tile ", tile.begin, "..", tile.end);
  for (int n = 0; n < list.count; ++n) {
    const Segment& segment = list.items[n];
    CHECK(segment.key_begin < segment.key_end, "s ", s, " w ", w, " tile ", tile.begin, " segment ", n);
    if (n > 0) CHECK(segment.key_end == list.items[n - 1].key_begin, "s ", s, " w ", w, " tile ", tile.begin);
  }
  test_coverage(g, tile, list);
  test_tile_regimes(g, tile, list);
}

// The queries of a tile have rows of each regime the tile can be in, one behind the other and of no other query.
void test_regime_rows(const ChunkGeometry& g, const QueryTiling& tiling) {
  const int c = g.stride();
  if (tiling.begin >= tiling.end) return;
  const RegimeRows rows = regime_rows(g, tiling.begin, tiling.size);
  CHECK(rows.near_per_chunk <= c && rows.near_per_chunk <= int64_t{g.local_size} + tiling.size - 1, "per chunk ",
        rows.near_per_chunk);
  std::set<std::pair<Regime, int>> taken;
  for (int n = 0; n < tiling.count(); ++n) {
    const QueryTile tile = tiling.tile(n);
    std::set<Regime> regimes;
    for (int key = 0; key < tile.end; key += c) regimes.insert(g.tile_regime(tile.begin, key));
    for (const Regime regime : regimes) {
      for (int i = tile.begin; i < tile.end; ++i) {
        const int row = rows.row(regime, i);
        CHECK(rows.has_row(regime, i), "s ", g.chunk_size, " w ", g.local_size, " query ", i);
        CHECK(row >= 0 && row < rows.count(regime, tiling.end), "s ", g.chunk_size, " w ", g.local_size, " query ", i,
              " row ", row);
        CHECK(row - rows.row(regime, tile.begin) == i - tile.begin, "s ", g.chunk_size, " w ", g.local_size, " query ",
              i);
        CHECK(taken.insert({regime, row}).second, "s ", g.chunk_size, " w ", g.local_size, " query ", i, " row ", row);
      }
    }
  }
  for (const Regime regime : {Regime::kSucc, Regime::kInter}) {
    for (int i = 0; i < std::min(c, tiling.end); ++i) CHECK(!rows.has_row(regime, i), "query ", i, " of chunk 0");
    for (int i = tiling.begin; i < tiling.end; ++i) {
      const int row = rows.has_row(regime, i) ? rows.row(regime, i) : 0;
      CHECK(row >= 0 && row <= rows.count(regime, tiling.end), "query ", i, " row ", row);
    }
  }
}

// The tiles follow one another from begin to end, stay in their chunks, and none is shorter than it has to be.
void test_tiling(const ChunkGeometry& g, int begin, int end, int size, bool with_segments) {
  const QueryTiling tiling{g, begin, end, size};
  const int64_t c = g.stride();
  int64_t position = begin;
  for (int n = 0; n < tiling.count(); ++n) {
    const QueryTile tile = tiling.tile(n);
    const int64_t expected_end = std::min({position + size, (position / c + 1) * c, int64_t{end}});
    CHECK(tile.begin == position, "c ", c, " ", begin, "..", end, " size ", size, " tile ", n, " begins ", tile.begin);
    CHECK(tile.end == expected_end, "c ", c, " ", begin, "..", end, " size ", size, " tile ", n, " ends ", tile.end);
    if (tile.begin != position || tile.end != expected_end) return;
    CHECK(tiling.index_of(tile.begin) == n && tiling.index_of(tile.end - 1) == n, "c ", c, " ", begin, "..", end,
          " size ", size, " tile ", n, " is said to be ", tiling.index_of(tile.begin), " and ",
          tiling.index_of(tile.end - 1));
    if (with_segments) test_segments(g, tile);
    position = expected_end;
  }
  CHECK(position == end, "c ", c, " ", begin, "..", end, " size ", size, " reached ", position);
}

void test_small_sizes() {
  for (int s = 2; s <= 9; ++s) {
    for (int w = 1; w < s; ++w) {
      const ChunkGeometry g{s, w};
      const int length = 4 * (s - w) + 2;
      test_pairs(g, length);
      for (int begin = 0; begin <= length; ++begin) {
        for (int end = begin; end <= length; ++end) {
          for (int size : {1, 2, 3, 5, 8, 64}) {
            test_tiling(g, begin, end, size, begin == 0);
            if (begin < end) CHECK(QueryTiling({g, begin, end, size}).index_of(0) == 0, "begin ", begin);
            test_regime_rows(g, {g, begin, end, size});
          }
        }
      }
    }
  }
}

// Tiles as kernels use them, and chunks that no tile divides.
void test_kernel_sizes() {
  for (const ChunkGeometry g :
       {ChunkGeometry{384, 128}, ChunkGeometry{384, 64}, ChunkGeometry{300, 37}, ChunkGeometry{200, 150}}) {
    const int c = g.stride();
    for (int length : {1, c - 1, c, c + 1, 2 * c, 3 * c + 65, 4 * c - 1}) {
      for (int size : {64, 128}) {
        test_tiling(g, 0, length, size, true);
        test_tiling(g, length / 2, length, size, true);
        test_tiling(g, length - 1, length, size, true);
        for (int begin : {0, length / 2, length - 1}) test_regime_rows(g, {g, begin, length, size});
      }
    }
  }
}

// The last positions an int can hold and the largest chunks the ops take: nothing overflows on the way.
void test_largest_positions() {
  constexpr int kLargest = 1 << 30;
  for (const ChunkGeometry g :
       {ChunkGeometry{262144, 8192}, ChunkGeometry{kLargest, 1}, ChunkGeometry{kLargest, kLargest - 1},
        ChunkGeometry{kLargest / 2, 1}, ChunkGeometry{kLargest, kLargest / 2}, ChunkGeometry{3, 2}}) {
    const int64_t s = g.chunk_size, w = g.local_size, c = s - w;
    const int i = INT_MAX - 1;
    for (int64_t back : {int64_t{0}, c - 1, c, 2 * c, int64_t{i}}) {
      if (back > i) continue;
      const int j = static_cast<int>(i - back);
      const Pair expected = expected_pair(s, w, i, j);
      const Regime regime = g.regime(i, j);
      CHECK(regime == expected_regime(expected.chunks), "s ", s, " w ", w, " j ", j);
      CHECK(g.query_row(regime, i) == expected.query_row, "s ", s, " w ", w, " j ", j, " row ", g.query_row(regime, i));
      CHECK(g.key_row(j) == expected.key_row, "s ", s, " w ", w, " j ", j);
    }
    test_tiling(g, INT_MAX - 1000, INT_MAX, 128, false);
    const SegmentList list = g.segments({INT_MAX - 1, INT_MAX});
    CHECK(list.items[list.count - 1].key_begin == 0, "s ", s, " w ", w);
  }
}

}  // namespace

int main() {
  test_small_sizes();
  test_kernel_sizes();
  test_largest_positions();
  return chunkattn::test::report();
}
