// The walk of the backward kernels over the query tiles of a key tile, the order of the key tiles, and the room for
// query tiles where positions are known to the device alone.
#include <algorithm>
#include <initializer_list>
#include <set>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/backward/schedule.h"
#include "cuda/common/query_tiles.cuh"
#include "cuda/common/tile_schedule.h"

namespace {

using chunkattn::BackwardParams;
using chunkattn::BackwardWorkspace;
using chunkattn::ChunkGeometry;
using chunkattn::ForwardParams;
using chunkattn::packed_regime_rows;
using chunkattn::QueryTile;
using chunkattn::QueryTiling;
using chunkattn::Regime;
using chunkattn::regime_rows;
using chunkattn::RegimeRows;
using chunkattn::cuda::AttendingQueries;
using chunkattn::cuda::AttendingTile;
using chunkattn::cuda::ChunkKeyTile;
using chunkattn::cuda::describe_key_tile;
using chunkattn::cuda::make_key_tile_schedule;
using chunkattn::cuda::QueryTileWalk;
using chunkattn::cuda::TileSchedule;

struct Problem {
  ChunkGeometry geometry;
  QueryTiling queries;
  QueryTiling keys;
  RegimeRows rows;
  int first_position;  // of the queries
  int first_row;       // of q, where that query lies
};

// The pairs of two tiles have one rotation of Q, that of the tiles' regime, and a causal mask hides the others.
void test_pairs(const Problem& problem, const AttendingTile& tile, const QueryTile& keys,
                std::set<std::pair<int, int>>& seen) {
  const ChunkGeometry& g = problem.geometry;
  for (int i = tile.begin; i < tile.begin + tile.count; ++i) {
    for (int j = keys.begin; j < keys.end; ++j) {
      if (j > i) {
        CHECK(tile.regime == Regime::kIntra, "query ", i, " key ", j, " is not masked");
        continue;
      }
      CHECK(g.query_row(tile.regime, i) == g.query_row(g.regime(i, j), i), "s ", g.chunk_size, " w ", g.local_size,
            " query ", i, " key ", j);
      CHECK(seen.insert({i, j}).second, "query ", i, " key ", j, " is seen twice");
    }
  }
}

void test_tile(const Problem& problem, const AttendingTile& tile, int index, int key_begin) {
  const ChunkGeometry& g = problem.geometry;
  CHECK(tile.index == index, "key ", key_begin, " index ", tile.index, " expected ", index);
  const QueryTile expected = problem.queries.tile(index);
  CHECK(tile.begin == expected.begin && tile.count == expected.end - expected.begin, "s ", g.chunk_size, " w ",
        g.local_size, " key ", key_begin, " tile ", index, " begins ", tile.begin, " and has ", tile.count);
  CHECK(tile.regime == g.tile_regime(tile.begin, key_begin), "key ", key_begin, " query ", tile.begin);
  const int row = problem.rows.row(tile.regime, tile.begin);
  CHECK(tile.row == row, "s ", g.chunk_size, " w ", g.local_size, " key ", key_begin, " query ", tile.begin, " row ",
        tile.row, " expected ", row);
  CHECK(tile.query == tile.begin - problem.first_position + problem.first_row, "key ", key_begin, " query ", tile.begin,
        " has row ", tile.query);
}

// Every causal pair is met once. A query tile meets its key tiles one after the other, from the first on: that is the
// order in which blocks take turns at its dQ.
void test_walks(const Problem& problem) {
  std::set<std::pair<int, int>> seen;
  std::vector<int> turns(problem.queries.count(), 0);
  for (int n = 0; n < problem.keys.count(); ++n) {
    const QueryTile keys = problem.keys.tile(n);
    QueryTileWalk walk(problem.queries, problem.rows, keys.begin);
    int index = problem.queries.count();
    for (; !walk.done(problem.queries); walk.advance(problem.queries, problem.rows)) {
      --index;
      const AttendingTile tile = walk.tile(problem.queries, problem.rows);
      test_tile(problem, tile, index, keys.begin);
      test_pairs(problem, tile, keys, seen);
      CHECK(turns[index]++ == n, "query tile ", index, " key tile ", n);
    }
    CHECK(index == problem.queries.index_of(keys.begin), "key ", keys.begin, " stopped at ", index);
  }
  long pairs = 0;
  for (int i = problem.queries.begin; i < problem.queries.end; ++i) pairs += i + 1;
  CHECK(static_cast<long>(seen.size()) == pairs, "pairs ", seen.size(), " of ", pairs);
}

void test_small_sizes() {
  for (int s = 2; s <= 9; ++s) {
    for (int w = 1; w < s; ++w) {
      const ChunkGeometry g{s, w};
      for (int end : {1, 2, 7, 12, 23}) {
        for (int begin : {0, end / 2, end - 1}) {
          for (int size_m : {1, 2, 3, 8}) {
            for (int size_n : {1, 3, 4}) {
              const QueryTiling queries{g, begin, end, size_m}, keys{g, 0, end, size_n};
              test_walks({g, queries, keys, regime_rows(g, begin, 8), begin, 0});
              test_walks({g, queries, keys, packed_regime_rows(g, begin - 17, 8), begin, 17});
            }
          }
        }
      }
    }
  }
}

void test_kernel_sizes() {
  const ChunkGeometry g{300, 37};
  for (int begin : {0, 200, 700}) {
    test_walks({g, {g, begin, 800, 64}, {g, 0, 800, 128}, regime_rows(g, begin, 128), begin, 0});
    test_walks({g, {g, begin, 800, 128}, {g, 0, 800, 64}, regime_rows(g, begin, 128), begin, 0});
  }
}

// Every key tile of every head once; where blocks take turns at dQ, no tile before one it waits for.
void test_schedule(int batch, int kv_heads, int seqlen, bool in_turns) {
  BackwardParams params{};
  params.forward.shape = {batch, seqlen, seqlen, 4 * kv_heads, kv_heads, 128};
  params.forward.geometry = {3072, 512};
  int turns = 0;
  BackwardWorkspace workspace{};
  workspace.turns = in_turns ? &turns : nullptr;
  const TileSchedule schedule = make_key_tile_schedule(params, workspace, 128);
  std::vector<int> next(batch * kv_heads, 0);
  ChunkKeyTile own;
  AttendingQueries queries;
  for (int index = 0; index < schedule.count(); ++index) {
    CHECK(describe_key_tile(own, queries, params, workspace, schedule, index, 64, 128), "index ", index);
    int& expected = next[own.batch * kv_heads + own.kv_head];
    CHECK(own.order == expected, "index ", index, " tile ", own.order);
    expected = own.order + 1;
    if (in_turns) CHECK(own.order == index / (batch * kv_heads), "index ", index, " tile ", own.order);
  }
  CHECK(!describe_key_tile(own, queries, params, workspace, schedule, schedule.count(), 64, 128), "behind the last");
  for (int tiles : next) CHECK(tiles == schedule.tiles, "tiles ", tiles);
}

// Wherever a sequence's queries begin, the schedule has room for their tiles, and where a chunk is longer than they
// for one that is none.
void test_ragged_schedule() {
  ForwardParams params{};
  params.shape = {1, 0, 1 << 20, 1, 1, 128};
  for (const int stride : {1, 2, 27, 64, 100, 2560}) {
    params.geometry = {stride + 1, 1};
    for (const int seqlen_q : {1, 2, 26, 27, 28, 129, 700}) {
      params.shape.seqlen_q = seqlen_q;
      for (const int tile_m : {64, 128, 192}) {
        const int room = chunkattn::cuda::make_ragged_tile_schedule(params, tile_m).tiles;
        int most = 0;
        for (int begin = 0; begin < 2 * stride; ++begin) {
          most = std::max(most, QueryTiling{params.geometry, begin, begin + seqlen_q, tile_m}.count());
        }
        CHECK(most <= room && (stride < seqlen_q || room <= most + 1), "room for ", room, " of ", most,
              " tiles, stride ", stride, " queries ", seqlen_q);
      }
    }
  }
}

}  // namespace

int main() {
  test_small_sizes();
  test_ragged_schedule();
  test_kernel_sizes();
  for (bool in_turns : {false, true}) {
    test_schedule(1, 1, 100, in_turns);
    test_schedule(1, 8, 8192, in_turns);
    test_schedule(3, 5, 32768, in_turns);
  }
  return chunkattn::test::report();
}
