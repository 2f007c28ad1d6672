// The tiles of keys of select-and-merge attention's backward: together they have every pair of a query and a key that
// attend to each other once, and where they add in turns everybody's turn comes.
#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/backward/region_tiles.h"
#include "cuda/common/query_tiles.cuh"

namespace {

using chunkattn::ChunkGeometry;
using chunkattn::QueryTile;
using chunkattn::QueryTiling;
using chunkattn::Regime;
using chunkattn::cuda::AttendingTile;
using chunkattn::cuda::GroupTileWalk;
using chunkattn::cuda::RegionTile;
using chunkattn::cuda::RegionTiling;

struct Problem {
  RegionTiling keys;
  QueryTiling queries;
  std::vector<int> listed_keys;  // [groups, lists]
};

// How often a query attends a key of a list (counted in the list), and of its own group.
struct Pairs {
  std::map<std::pair<int, int>, int> listed;
  std::map<std::pair<int, int>, int> own;
};

void count_pairs(const Problem& problem, const RegionTile& tile, const AttendingTile& queries, Pairs& pairs) {
  const bool listed = problem.keys.is_listed(tile);
  CHECK(queries.regime == (listed ? Regime::kInter : Regime::kIntra), "group ", tile.group, " within ", tile.within);
  for (int i = queries.begin; i < queries.begin + queries.count; ++i) {
    for (int j = tile.keys.begin; j < tile.keys.end; ++j) {
      if (listed) {
        ++pairs.listed[{i, j}];
      } else if (j <= i) {
        ++pairs.own[{i, j}];
      }
    }
  }
}

void check_pairs(const Problem& problem, int list, const Pairs& pairs) {
  size_t listed = 0, own = 0;
  for (int i = 0; i < problem.keys.seqlen; ++i) {
    const int group = i / problem.keys.group_size;
    const int keys = problem.listed_keys[group * problem.keys.lists + list];
    const int first = group * problem.keys.group_size;
    listed += keys;
    own += i + 1 - first;
    for (int j = 0; j < keys; ++j) {
      const auto found = pairs.listed.find({i, j});
      CHECK(found != pairs.listed.end() && found->second == 1, "query ", i, " listed key ", j);
    }
    for (int j = first; j <= i; ++j) {
      const auto found = pairs.own.find({i, j});
      CHECK(found != pairs.own.end() && found->second == 1, "query ", i, " own key ", j);
    }
  }
  CHECK(pairs.listed.size() == listed, pairs.listed.size(), " of ", listed);
  CHECK(pairs.own.size() == own, pairs.own.size(), " of ", own);
}

void test_problem(const Problem& problem) {
  const RegionTiling& keys = problem.keys;
  const int groups = (keys.seqlen + keys.group_size - 1) / keys.group_size;
  const auto listed_keys = [&](int group, int list) { return problem.listed_keys[group * keys.lists + list]; };
  std::vector<Pairs> pairs(keys.lists);
  std::map<std::pair<int, int>, int> added;  // by list and query tile
  int turn = 0;
  for (int index = 0; index < groups * keys.lists * keys.per_list(); ++index) {
    const RegionTile tile = keys.tile(index, listed_keys);
    if (tile.keys.begin >= tile.keys.end) continue;
    CHECK(keys.turn(tile) == turn, "turn ", keys.turn(tile), " at ", turn, ", group ", tile.group, " within ",
          tile.within);
    turn += keys.turns(tile);
    const QueryTile group = keys.queries(tile.group);
    const int from = keys.is_listed(tile) ? group.begin : tile.keys.begin;
    GroupTileWalk walk(problem.queries, group, from, keys.is_listed(tile) ? Regime::kInter : Regime::kIntra);
    CHECK(!walk.done(problem.queries), "group ", tile.group, " within ", tile.within);
    for (; !walk.done(problem.queries); walk.advance(problem.queries, {})) {
      const AttendingTile queries = walk.tile(problem.queries, chunkattn::RegimeRows{});
      const QueryTile expected = problem.queries.tile(queries.index);
      CHECK(queries.begin == expected.begin && queries.begin + queries.count == expected.end, "query tile ",
            queries.index, " begins ", queries.begin);
      int& before = added[{tile.list, queries.index}];
      CHECK(tile.order == before, "order ", tile.order, " at ", before, ", query tile ", queries.index);
      ++before;
      count_pairs(problem, tile, queries, pairs[tile.list]);
    }
  }
  for (int list = 0; list < keys.lists; ++list) check_pairs(problem, list, pairs[list]);
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  const auto draw = [&](int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); };
  for (int i = 0; i < 300; ++i) {
    const int region_size = draw(1, 9), seqlen = draw(1, 90), capacity = draw(0, 8);
    const int group_size = std::min(region_size * draw(1, 9), seqlen);
    const int groups = (seqlen + group_size - 1) / group_size;
    const int size = draw(1, 12), lists = draw(1, 3);
    const int longest = groups > 1 ? capacity * region_size : 0;
    Problem problem{{lists, (longest + size - 1) / size, (group_size + size - 1) / size, size, group_size, seqlen},
                    {ChunkGeometry{group_size, 0}, 0, seqlen, draw(1, 12)},
                    {}};
    for (int group = 0; group < groups; ++group) {
      for (int list = 0; list < lists; ++list) {
        problem.listed_keys.push_back(group == 0 ? 0 : draw(0, capacity) * region_size);
      }
    }
    test_problem(problem);
  }
  return chunkattn::test::report();
}
