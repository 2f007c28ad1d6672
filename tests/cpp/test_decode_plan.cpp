// How decoding is launched, and how groups of thread blocks share the keys of sequences.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cuda/decode/plan.h"
#include "cuda/decode/sequences.h"

namespace {

using chunkattn::DecodeParams;
using chunkattn::DecodeWorkspace;
using chunkattn::cuda::DecodeDevice;
using chunkattn::cuda::DecodePlan;
using chunkattn::cuda::EqualShares;
using chunkattn::cuda::plan_decode;
using chunkattn::cuda::SequenceLengths;
using chunkattn::cuda::TileQueries;

constexpr DecodeDevice kDevices[] = {{80, 108, 164 * 1024}, {86, 84, 100 * 1024}, {90, 132, 228 * 1024}};

struct Shape {
  int batch, seqlen_q, heads, kv_heads, head_dim, capacity;
};

DecodeParams decode_params(const Shape& shape, bool float8 = false, int num_splits = 0) {
  DecodeParams params{};
  params.batch = shape.batch;
  params.seqlen_q = params.seqlen_new = shape.seqlen_q;
  params.heads = shape.heads;
  params.kv_heads = shape.kv_heads;
  params.head_dim = shape.head_dim;
  params.cache.capacity = shape.capacity;
  params.cache.float8 = float8;
  params.geometry = {3072, 512};
  params.num_splits = num_splits;
  return params;
}

constexpr Shape kShapes[] = {{1, 1, 32, 8, 128, 131072}, {64, 1, 32, 8, 128, 4096}, {1, 1, 32, 8, 128, 100},
                             {4, 1, 8, 8, 64, 4096},     {2, 5, 16, 1, 256, 40000}, {1, 8192, 32, 8, 128, 131072},
                             {3, 17, 40, 40, 80, 9000},  {128, 1, 512, 256, 64, 64}};

void test_plan(const Shape& shape, const DecodeDevice& device, bool float8, int num_splits) {
  const DecodeParams params = decode_params(shape, float8, num_splits);
  const DecodePlan plan = plan_decode(params, device);
  CHECK(plan.head_dim_padded >= shape.head_dim, "head_dim ", shape.head_dim);
  CHECK(plan.rows == shape.seqlen_q * shape.heads / shape.kv_heads, "rows ", plan.rows);
  CHECK(plan.row_tiles * plan.tile_rows >= plan.rows && (plan.row_tiles - 1) * plan.tile_rows < plan.rows, "row tiles ",
        plan.row_tiles, " of ", plan.tile_rows, " for ", plan.rows);
  CHECK(plan.planes == plan.row_tiles * shape.kv_heads, "planes ", plan.planes);
  CHECK(plan.shared_memory + 1024 <= 99 * 1024, "shared memory ", plan.shared_memory);
  CHECK(plan.groups >= 1, "groups ", plan.groups);
  // Whoever appends the new tokens is the only one that attends to them.
  CHECK(plan.fused_append == (plan.row_tiles == 1), "row tiles ", plan.row_tiles);
  if (plan.splits > 0) {
    CHECK(plan.groups == shape.batch * plan.splits, "groups ", plan.groups, " splits ", plan.splits);
    CHECK((plan.combine_warps > 0) == (plan.splits > 1), "splits ", plan.splits);
    CHECK(num_splits == 0 || plan.splits <= num_splits, "splits ", plan.splits, " of ", num_splits);
  } else {
    CHECK(num_splits == 0 && plan.blocks() <= 2 * device.multiprocessors, "blocks ", plan.blocks());
    CHECK((plan.combine_warps > 0) == (plan.groups > 1), "groups ", plan.groups);
  }

  constexpr uintptr_t kMemory = 1 << 20;
  size_t bytes = 0, again = 0;
  chunkattn::cuda::lay_out_workspace(params, plan, nullptr, &bytes);
  const DecodeWorkspace workspace =
      chunkattn::cuda::lay_out_workspace(params, plan, reinterpret_cast<void*>(kMemory), &again);
  CHECK(again == bytes, "bytes ", bytes, " then ", again);
  const uintptr_t rows = plan.combine_warps > 0 ? 2 * plan.blocks() * plan.tile_rows : 0;
  const auto address = [](const void* piece) { return reinterpret_cast<uintptr_t>(piece); };
  CHECK(address(workspace.out) + 4 * rows * plan.head_dim_padded <= address(workspace.states), "rows ", rows);
  CHECK(address(workspace.states) + 8 * rows <= address(workspace.groups), "rows ", rows);
  const uintptr_t sequences = plan.combine_warps > 0 ? size_t{8} * plan.row_tiles * shape.batch : 0;
  CHECK(address(workspace.groups) + sequences <= address(workspace.tile_counter), "sequences ", sequences);
  CHECK(address(workspace.tile_counter) + 4 <= kMemory + bytes, "bytes ", bytes);
}

void test_plans() {
  for (const DecodeDevice& device : kDevices) {
    for (const Shape& shape : kShapes) {
      for (const bool float8 : {false, true}) {
        for (const int num_splits : {0, 1, 3, 1 << 20}) test_plan(shape, device, float8, num_splits);
      }
    }
  }
  bool refused = false;
  try {
    plan_decode(decode_params({1, 1, 8, 8, 257, 100}), kDevices[2]);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused, "head_dim 257");
}

void test_equal_shares() {
  for (int tiles = 1; tiles <= 70; ++tiles) {
    for (int groups = 1; groups <= tiles; ++groups) {
      const EqualShares shares{tiles, groups};
      CHECK(shares.begin(0) == 0 && shares.begin(groups) == tiles, "tiles ", tiles, " groups ", groups);
      for (int tile = 0; tile < tiles; ++tile) {
        const int group = shares.group_of(tile);
        CHECK(shares.begin(group) <= tile && tile < shares.begin(group + 1), "tile ", tile, " of ", tiles, " groups ",
              groups);
      }
      for (int group = 0; group < groups; ++group) {
        const int size = shares.begin(group + 1) - shares.begin(group);
        CHECK(size == tiles / groups || size == tiles / groups + 1, "group ", group, " has ", size);
      }
    }
  }
  for (const int groups : {1, 264, 1024, (1 << 15) - 1}) {
    for (const int tiles : {INT_MAX, INT_MAX / 2, 1 << 20}) {
      const EqualShares shares{tiles, groups};
      for (int group = 0; group <= groups; ++group) {
        CHECK(shares.begin(group) == int64_t{group} * tiles / groups, "group ", group, " of ", groups);
        for (const int tile : {shares.begin(group) - 1, shares.begin(group)}) {
          if (tile < 0 || tile >= tiles) continue;
          const auto expected = ((int64_t{tile} + 1) * groups - 1) / tiles;
          CHECK(shares.group_of(tile) == expected, "tile ", tile, " of ", tiles, " groups ", groups);
        }
      }
    }
  }
}

// No two parts of sequences are left in one place, whatever lies between the sequences.
void test_partial_slots() {
  for (const int piece_cost : {0, 1, 8}) {
    for (const std::vector<int>& sequences : {std::vector<int>{40}, {1, 1, 1, 1, 9}, {7, 1, 30, 2, 2, 19}}) {
      int tiles = -piece_cost;
      for (const int n : sequences) tiles += piece_cost + n;
      for (int groups = 1; groups <= tiles; ++groups) {
        const EqualShares shares{tiles, groups};
        std::set<int> slots;
        int start = 0;
        for (const int n : sequences) {
          const int first = shares.group_of(start), last = shares.group_of(start + n - 1);
          for (int group = first; first < last && group <= last; ++group) {
            const int slot = chunkattn::cuda::partial_slot(group, group == first);
            CHECK(slot < 2 * groups && slots.insert(slot).second, "slot ", slot, " groups ", groups);
            CHECK((std::max(shares.begin(group), start) == start) == (group == first), "group ", group);
          }
          start += n + piece_cost;
        }
      }
    }
  }
}

void test_lengths() {
  DecodeParams params = decode_params({1, 2, 8, 8, 64, 100});
  struct Expected {
    int given, stored, total;
  };
  for (const auto& [given, stored, total] : {Expected{0, 0, 2},
                                             {98, 98, 100},
                                             {99, 99, 100},
                                             {100, 100, 100},
                                             {INT_MAX, 100, 100},
                                             {-7, 0, 2},
                                             {INT_MIN, 0, 2}}) {
    const SequenceLengths lengths = chunkattn::cuda::sequence_lengths(params, given);
    CHECK(lengths.stored == stored && lengths.total == total, "given ", given);
  }
  // Tiles of keys that the queries of the first and the last row tile see.
  params = decode_params({1, 40, 8, 2, 128, 1000});
  const DecodePlan plan = plan_decode(params, kDevices[2]);
  const TileQueries first = chunkattn::cuda::tile_queries(params, plan, 0);
  const TileQueries last = chunkattn::cuda::tile_queries(params, plan, plan.row_tiles - 1);
  CHECK(first.begin == 0 && first.end == 16 && last.begin == 32 && last.end == 40, "tiles of ", plan.tile_rows);
  const SequenceLengths lengths = chunkattn::cuda::sequence_lengths(params, 100);
  CHECK(chunkattn::cuda::first_query_position(params, lengths) == 100, "position");
  CHECK(chunkattn::cuda::visible_tiles(params, plan.tile_keys, first, lengths) == 2, "116 keys");
  CHECK(chunkattn::cuda::visible_tiles(params, plan.tile_keys, last, lengths) == 3, "140 keys");
  params.seqlen_new = 0;
  CHECK(chunkattn::cuda::visible_tiles(params, plan.tile_keys, last, {0, 0}) == 1, "no keys");
}

}  // namespace

int main() {
  test_plans();
  test_equal_shares();
  test_partial_slots();
  test_lengths();
  return chunkattn::test::report();
}
