// What the thread blocks of the backward kernels work on, and in which order. Host and device read the same rule.
#pragma once

#include "cuda/backward/tile_sizes.h"
#include "cuda/common/tile_schedule.h"

namespace chunkattn::cuda {

struct KeyTileItem {
  int tile;
  int plane;  // batch * kv_heads + KV head
};

// Of a plain batch. A tile has the more queries the earlier its keys are: TileSchedule's longest first, seen from the
// keys.
CHUNKATTN_HOST_DEVICE KeyTileItem key_tile_item(const TileSchedule& schedule, int index) {
  const TileSchedule::Item item = schedule.plain_item(index);
  return {schedule.tiles - 1 - item.tile, item.plane};
}

// Keys of dual chunk attention that a thread block owns, or a cluster.
struct ChunkKeyTile {
  int batch;
  int kv_head;
  int order;       // how many tiles add to dq of the same queries before this one, where they take turns
  QueryTile keys;  // positions
  int first_key;   // row of k, v, dk and dv of the first
};

// The queries that may attend to them, those of the sequence.
struct AttendingQueries {
  QueryTiling tiling;
  RegimeRows rows;
  int first_turn;  // of the first tile, among those of a plane
};

// Of a plain batch.
CHUNKATTN_HOST_DEVICE AttendingQueries attending_queries(const ForwardParams& forward,
                                                         const BackwardWorkspace& workspace, int tile_m) {
  return {forward.sequence(0).query_tiling(forward.geometry, tile_m), workspace.rows, 0};
}

CHUNKATTN_HOST_DEVICE AttendingQueries packed_attending_queries(const ForwardParams& forward, int batch, int tile_m) {
  const Sequence sequence = forward.sequence(batch);
  const int origin = sequence.first_position() - static_cast<int>(sequence.first_q);
  const int64_t first_turn = room_for_packed_tiles(sequence.first_q, batch, forward.geometry, kBackwardSmallestTileM);
  return {sequence.query_tiling(forward.geometry, tile_m),
          packed_regime_rows(forward.geometry, origin, kBackwardLargestTileM), static_cast<int>(first_turn)};
}

CHUNKATTN_HOST_DEVICE ChunkKeyTile plain_key_tile(const ForwardParams& forward, const KeyTileItem& item, int tile_n) {
  const int kv_heads = forward.shape.kv_heads;
  const QueryTile keys = QueryTiling{forward.geometry, 0, forward.shape.seqlen_k, tile_n}.tile(item.tile);
  return {item.plane / kv_heads, item.plane % kv_heads, item.tile, keys, keys.begin};
}

// Fills in what thread block, or cluster, `index` works on; false where that is nothing.
CHUNKATTN_HOST_DEVICE bool describe_key_tile(ChunkKeyTile& own, AttendingQueries& queries, const BackwardParams& params,
                                             const BackwardWorkspace& workspace, const TileSchedule& schedule,
                                             int64_t index, int tile_m, int tile_n) {
  if (!schedule.has(index)) return false;
  const ForwardParams& forward = params.forward;
  if (!forward.packed()) {
    own = plain_key_tile(forward, key_tile_item(schedule, static_cast<int>(index)), tile_n);
    queries = attending_queries(forward, workspace, tile_m);
    return true;
  }
  const TileSchedule::Item item = schedule.item(static_cast<int>(index));
  const int kv_heads = forward.shape.kv_heads;
  const Sequence sequence = forward.sequence(item.plane / kv_heads);
  const QueryTiling tiling = sequence.key_tiling(forward.geometry, tile_n);
  const int tile = tiling.count() - 1 - item.tile;
  if (tile < 0) return false;
  const QueryTile keys = tiling.tile(tile);
  own = {item.plane / kv_heads, item.plane % kv_heads, tile, keys, static_cast<int>(sequence.first_k) + keys.begin};
  queries = packed_attending_queries(forward, own.batch, tile_m);
  return true;
}

// Planes go in groups of which what is read and added to again and again fits the L2 cache together: Q, dO and dQ, or
// dK and dV where those are sums, all of them 8 bytes for each row and dimension. Where blocks add to dQ in turns, a
// key tile's waits for the one before: then the tiles of all planes follow one another, and few of one plane are in
// work at a time.
CHUNKATTN_HOST_DEVICE int planes_at_once(int planes, int64_t rows, int head_dim, bool in_turns) {
  constexpr int64_t kElementBytes = 2 + 2 + 4;
  return in_turns ? planes : static_cast<int>(planes_of_group(planes, kElementBytes * rows * head_dim));
}

inline TileSchedule make_key_tile_schedule(const BackwardParams& params, const BackwardWorkspace& workspace,
                                           int tile_n) {
  const ForwardParams& forward = params.forward;
  const AttentionShape& shape = forward.shape;
  if (forward.packed()) {
    return schedule_packed_tiles(forward, workspace.sequence_tiles, forward.total_k, shape.kv_heads, tile_n);
  }
  const int planes = shape.batch * shape.kv_heads;
  const int64_t queries = static_cast<int64_t>(shape.seqlen_q) * (shape.heads / shape.kv_heads);
  return {forward.sequence(0).key_tiling(forward.geometry, tile_n).count(), planes,
          planes_at_once(planes, queries, shape.head_dim, workspace.turns != nullptr)};
}

// The key tiles of a packed sequence.
struct PackedKeyTiles {
  const BackwardParams& params;
  int tile_size;
  bool in_turns;

  // The queries of its longest tile; 0 where it has none.
  CHUNKATTN_HOST_DEVICE int longest(int batch) const {
    const Sequence sequence = params.forward.sequence(batch);
    return sequence.seqlen_q < sequence.seqlen_k ? sequence.seqlen_q : sequence.seqlen_k;
  }

  CHUNKATTN_HOST_DEVICE int count(int batch) const {
    return params.forward.sequence(batch).key_tiling(params.forward.geometry, tile_size).count();
  }

  CHUNKATTN_HOST_DEVICE int planes() const { return params.forward.shape.kv_heads; }

  CHUNKATTN_HOST_DEVICE int group(int batch) const {
    const AttentionShape& shape = params.forward.shape;
    const int64_t queries =
        static_cast<int64_t>(params.forward.sequence(batch).seqlen_q) * (shape.heads / shape.kv_heads);
    return planes_at_once(shape.kv_heads, queries, shape.head_dim, in_turns);
  }
};

}  // namespace chunkattn::cuda
