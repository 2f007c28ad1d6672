// The schedules of packed sequences, which the device makes from their lengths: every tile of every head once, each
// sequence's own rows and no others, and inside all tensors whatever the offsets hold.
#include <algorithm>
#include <climits>
#include <initializer_list>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/backward/schedule.h"
#include "cuda/common/packed_rows.h"
#include "cuda/common/tile_schedule.h"

namespace {

using chunkattn::BackwardParams;
using chunkattn::BackwardWorkspace;
using chunkattn::ForwardParams;
using chunkattn::QueryTile;
using chunkattn::QueryTiling;
using chunkattn::Regime;
using chunkattn::Sequence;
using chunkattn::SequenceTiles;
using chunkattn::cuda::AttendingQueries;
using chunkattn::cuda::ChunkKeyTile;
using chunkattn::cuda::describe_key_tile;
using chunkattn::cuda::make_key_tile_schedule;
using chunkattn::cuda::make_tile_schedule;
using chunkattn::cuda::PackedKeyTiles;
using chunkattn::cuda::PackedQueryTiles;
using chunkattn::cuda::room_for_packed_tiles;
using chunkattn::cuda::sequence_of_row;
using chunkattn::cuda::SequencePlace;
using chunkattn::cuda::TileSchedule;

using Lengths = std::vector<std::pair<int, int>>;  // of queries and keys

struct Packed {
  std::vector<int> cu_seqlens_q{0}, cu_seqlens_k{0};
  std::vector<SequenceTiles> places;
  BackwardParams params{};
  BackwardWorkspace workspace{};

  explicit Packed(const Lengths& lengths, int stride = 27) : places(lengths.size() + 1) {
    ForwardParams& forward = params.forward;
    forward.shape = {static_cast<int>(lengths.size()), 0, 0, 6, 2, 64};
    for (const auto& [seqlen_q, seqlen_k] : lengths) {
      cu_seqlens_q.push_back(cu_seqlens_q.back() + seqlen_q);
      cu_seqlens_k.push_back(cu_seqlens_k.back() + seqlen_k);
      forward.shape.seqlen_q = std::max(forward.shape.seqlen_q, seqlen_q);
      forward.shape.seqlen_k = std::max(forward.shape.seqlen_k, seqlen_k);
    }
    forward.total_q = cu_seqlens_q.back();
    forward.total_k = cu_seqlens_k.back();
    forward.cu_seqlens_q = cu_seqlens_q.data();
    forward.cu_seqlens_k = cu_seqlens_k.data();
    forward.geometry = {stride + 13, 13};
    forward.sequence_tiles = workspace.sequence_tiles = places.data();
  }
  Packed(const Packed&) = delete;

  // As the kernels that run before do.
  template <typename Tiles>
  void place(const Tiles& tiles) {
    const int batch = params.forward.shape.batch;
    const auto cut = [](int64_t item) { return static_cast<int>(std::min<int64_t>(item, INT_MAX)); };
    for (int b = 0; b < batch; ++b) {
      SequencePlace own{};
      for (int other = 0; other < batch; ++other) own.meet(tiles, b, other);
      places[own.rank] = {cut(own.first_item), b, tiles.count(b), tiles.group(b)};
      const int64_t end = own.first_item + int64_t{tiles.count(b)} * tiles.planes();
      if (own.rank == batch - 1) places[batch] = {cut(end), 0, 0, 0};
    }
  }
};

const std::initializer_list<Lengths> kBatches = {
    {{1, 1}},
    {{0, 0}},
    {{0, 0}, {7, 7}, {300, 300}, {0, 5}, {5, 0}, {64, 64}},
    {{20, 5}, {3, 0}, {40, 39}, {10, 60}, {1, 200}, {0, 33}},
    Lengths(40, {13, 13}),
};

void test_query_tiles(const Lengths& lengths, int stride, int tile_m) {
  Packed packed(lengths, stride);
  const ForwardParams& params = packed.params.forward;
  packed.place(PackedQueryTiles{params, tile_m});
  const TileSchedule schedule = make_tile_schedule(params, tile_m);
  std::set<std::tuple<int, int, int>> seen;  // batch, head, position
  int longest = INT_MAX;
  for (int64_t index = 0; schedule.has(index); ++index) {
    const TileSchedule::Item item = schedule.item(static_cast<int>(index));
    const int batch = item.plane / params.shape.heads;
    const Sequence sequence = params.sequence(batch);
    CHECK(sequence.seqlen_k <= longest, "index ", index, " comes after a shorter sequence");
    longest = sequence.seqlen_k;
    const QueryTiling tiling = sequence.query_tiling(params.geometry, tile_m);
    CHECK(item.tile < tiling.count(), "index ", index, " tile ", item.tile, " of ", tiling.count());
    const QueryTile tile = tiling.tile(item.tile);
    for (int position = tile.begin; position < tile.end; ++position) {
      CHECK(seen.insert({batch, item.plane % params.shape.heads, position}).second, "index ", index);
    }
  }
  size_t queries = 0;
  for (const auto& [seqlen_q, seqlen_k] : lengths) queries += std::min(seqlen_q, seqlen_k);
  CHECK(seen.size() == queries * params.shape.heads, "queries ", seen.size(), " of ", queries);
  CHECK(schedule.count() >= packed.places.back().first_item, "room for ", schedule.count());
}

// Also: nobody's rows of a regime, and turns, are another's.
void test_key_tiles(const Lengths& lengths, int stride, bool in_turns) {
  constexpr int kTileM = 64, kTileN = 128;
  Packed packed(lengths, stride);
  const ForwardParams& params = packed.params.forward;
  int turns = 0;
  packed.workspace.turns = in_turns ? &turns : nullptr;
  packed.place(PackedKeyTiles{packed.params, kTileN, in_turns});
  const TileSchedule schedule = make_key_tile_schedule(packed.params, packed.workspace, kTileN);
  const int64_t room = room_for_packed_tiles(params.total_q, params.shape.batch, params.geometry,
                                             chunkattn::cuda::kBackwardSmallestTileM);
  std::set<std::pair<int, int>> seen;         // KV head, row of k
  std::map<int, int> turn_owners;             // by turn
  std::map<std::pair<int, int>, int> owners;  // by regime and row
  ChunkKeyTile own;
  AttendingQueries attending;
  for (int64_t index = 0; index < schedule.count(); ++index) {
    if (!describe_key_tile(own, attending, packed.params, packed.workspace, schedule, index, kTileM, kTileN)) continue;
    const Sequence sequence = params.sequence(own.batch);
    for (int key = 0; key < own.keys.end - own.keys.begin; ++key) {
      CHECK(seen.insert({own.kv_head, own.first_key + key}).second, "index ", index);
    }
    CHECK(own.first_key >= sequence.first_k && own.keys.end <= sequence.seqlen_k, "index ", index);
    for (int tile = 0; tile < attending.tiling.count(); ++tile) {
      const int turn = attending.first_turn + tile;
      CHECK(turn >= 0 && turn < room, "turn ", turn, " of ", room);
      CHECK(turn_owners.try_emplace(turn, own.batch).first->second == own.batch, "turn ", turn);
    }
    for (int position = attending.tiling.begin; position < attending.tiling.end; ++position) {
      for (const Regime regime : {Regime::kIntra, Regime::kSucc, Regime::kInter}) {
        const int row = attending.rows.row(regime, position);
        CHECK(row == sequence.first_q + position - sequence.first_position(), "row ", row);
        CHECK(owners.try_emplace({static_cast<int>(regime), row}, own.batch).first->second == own.batch, "row ", row);
      }
    }
  }
  size_t keys = 0;
  for (const auto& [seqlen_q, seqlen_k] : lengths) keys += seqlen_q > 0 ? seqlen_k : 0;
  CHECK(seen.size() == keys * params.shape.kv_heads, "keys ", seen.size(), " of ", keys);
}

void test_rows() {
  for (const Lengths& lengths : kBatches) {
    const Packed packed(lengths);
    const std::vector<int>& offsets = packed.cu_seqlens_q;
    for (int row = 0; row < offsets.back(); ++row) {
      const int batch = sequence_of_row(offsets.data(), static_cast<int>(lengths.size()), row);
      CHECK(offsets[batch] <= row && row < offsets[batch + 1], "row ", row, " batch ", batch);
    }
  }
}

// Offsets that are none: nothing outside the tensors, however many items they promise.
void test_any_offsets() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    Packed packed({{70, 70}, {1, 300}, {200, 200}, {0, 1}});
    ForwardParams& params = packed.params.forward;
    for (auto* offsets : {&packed.cu_seqlens_q, &packed.cu_seqlens_k}) {
      for (int& offset : *offsets) offset = static_cast<int>(random()) >> random() % 32;
    }
    packed.place(PackedQueryTiles{params, 64});
    const TileSchedule queries = make_tile_schedule(params, 64);
    for (int64_t index = 0; index < queries.count() && queries.has(index); ++index) {
      const TileSchedule::Item item = queries.item(static_cast<int>(index));
      const int batch = item.plane / params.shape.heads;
      CHECK(batch >= 0 && batch < params.shape.batch && item.tile >= 0, "index ", index);
      const QueryTiling tiling = params.sequence(batch).query_tiling(params.geometry, 64);
      CHECK(item.tile < tiling.count(), "index ", index);
    }
    packed.place(PackedKeyTiles{packed.params, 128, false});
    const TileSchedule keys = make_key_tile_schedule(packed.params, packed.workspace, 128);
    const int64_t room =
        room_for_packed_tiles(params.total_q, 4, params.geometry, chunkattn::cuda::kBackwardSmallestTileM);
    ChunkKeyTile own;
    AttendingQueries attending;
    for (int64_t index = 0; index < keys.count(); ++index) {
      if (!describe_key_tile(own, attending, packed.params, packed.workspace, keys, index, 64, 128)) continue;
      const int count = own.keys.end - own.keys.begin;
      CHECK(own.first_key >= 0 && count > 0 && own.first_key + count <= params.total_k, "index ", index);
      const QueryTile last = attending.tiling.tile(attending.tiling.count() - 1);
      CHECK(attending.rows.row(Regime::kSucc, attending.tiling.begin) >= 0, "index ", index);
      CHECK(attending.rows.row(Regime::kSucc, last.end - 1) < params.total_q, "index ", index);
      CHECK(attending.first_turn + attending.tiling.count() <= room, "index ", index);
    }
  }
}

}  // namespace

int main() {
  for (const Lengths& lengths : kBatches) {
    for (const int stride : {1, 2, 27, 100, 1000}) {
      for (const int tile_m : {64, 128, 192}) test_query_tiles(lengths, stride, tile_m);
      for (const bool in_turns : {false, true}) test_key_tiles(lengths, stride, in_turns);
    }
  }
  test_rows();
  test_any_offsets();
  return chunkattn::test::report();
}
