// What the thread blocks of the backward kernels work on, and in which order. Host and device read the same rule.
#pragma once

#include "cuda/backward/tile_sizes.h"
#include "cuda/common/tile_schedule.h"

namespace chunkattn::cuda {

// What a thread block works on.
struct KeyTileWork {
  int batch;
  int kv_head;
  int tile;             // of its KV head
  QueryTile keys;       // positions
  int first_key;        // row of k, v, dk and dv of the first
  int box_batch;        // what the copy engine calls the batch
  QueryTiling queries;  // of the sequence
  RegimeRows rows;      // of the sequence
  int first_turn;       // of the sequence's first query tile, among those of a plane
  bool packed;
};

// Heads go in groups whose Q, dO and dQ fit the L2 cache together.
CHUNKATTN_HOST_DEVICE int64_t query_gradient_bytes(const AttentionShape& shape, int seqlen_q) {
  return int64_t{2 + 2 + 4} * seqlen_q * shape.head_dim * (shape.heads / shape.kv_heads);
}

// Where blocks add to dQ in turns, a key tile's waits for the one before: then the tiles of all heads follow one
// another, and few of one head are in work at a time. A tile has the more queries the earlier its keys are, so what
// TileSchedule calls a head's last tile is the first here.
inline TileSchedule make_key_tile_schedule(const BackwardParams& params, const BackwardWorkspace& workspace,
                                           int tile_n) {
  const ForwardParams& forward = params.forward;
  const AttentionShape& shape = forward.shape;
  if (forward.packed()) {
    return schedule_packed_tiles(forward, workspace.sequence_tiles, forward.total_k, shape.kv_heads, tile_n);
  }
  const int planes = shape.batch * shape.kv_heads;
  const int64_t group =
      workspace.turns != nullptr ? planes : kv_planes_of_group(planes, query_gradient_bytes(shape, shape.seqlen_q));
  return {forward.sequence(0).key_tiling(forward.geometry, tile_n).count(), planes, static_cast<int>(group)};
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
    if (in_turns) return shape.kv_heads;
    const int64_t bytes = query_gradient_bytes(shape, params.forward.sequence(batch).seqlen_q);
    return static_cast<int>(kv_planes_of_group(shape.kv_heads, bytes));
  }
};

// Fills in what thread block `index` works on; false where that is nothing.
CHUNKATTN_HOST_DEVICE bool describe_key_tile(KeyTileWork& work, const BackwardParams& params,
                                             const BackwardWorkspace& workspace, const TileSchedule& schedule,
                                             int64_t index, int tile_m, int tile_n) {
  if (!schedule.has(index)) return false;
  const ForwardParams& forward = params.forward;
  const ChunkGeometry& geometry = forward.geometry;
  const TileSchedule::Item item = schedule.item(static_cast<int>(index));
  work.batch = item.plane / forward.shape.kv_heads;
  work.kv_head = item.plane % forward.shape.kv_heads;
  const Sequence sequence = forward.sequence(work.batch);
  const QueryTiling keys = sequence.key_tiling(geometry, tile_n);
  work.tile = keys.count() - 1 - item.tile;
  if (work.tile < 0) return false;
  work.keys = keys.tile(work.tile);
  work.first_key = static_cast<int>(sequence.first_k) + work.keys.begin;
  work.queries = sequence.query_tiling(geometry, tile_m);
  work.packed = forward.packed();
  work.box_batch = work.packed ? 0 : work.batch;
  work.rows = workspace.rows;
  work.first_turn = 0;
  if (work.packed) {
    const int origin = sequence.first_position() - static_cast<int>(sequence.first_q);
    work.rows = packed_regime_rows(geometry, origin, kBackwardLargestTileM);
    work.first_turn =
        static_cast<int>(room_for_packed_tiles(sequence.first_q, work.batch, geometry, kBackwardSmallestTileM));
  }
  return true;
}

}  // namespace chunkattn::cuda
