// The order in which the backward kernels work on key tiles. Host and device read the same rule.
#pragma once

#include "cuda/common/tile_schedule.h"

namespace chunkattn::cuda {

struct KeyTileItem {
  int tile;
  int plane;  // batch * kv_heads + KV head
};

// A tile has the more queries the earlier its keys are: TileSchedule's longest first, seen from the keys.
CHUNKATTN_HOST_DEVICE KeyTileItem key_tile_item(const TileSchedule& schedule, int index) {
  const TileSchedule::Item item = schedule.item(index);
  return {schedule.tiles - 1 - item.tile, item.plane};
}

// Heads go in groups whose Q, dO and dQ fit the L2 cache together. Where blocks add to dQ in turns, a key tile's waits
// for the one before: then the tiles of all heads follow one another, and few of one head are in work at a time.
inline TileSchedule make_key_tile_schedule(const BackwardParams& params, int tile_n, bool in_turns) {
  constexpr int64_t kCacheBytes = 32 << 20;
  constexpr int64_t kElementBytes = 2 + 2 + 4;
  const AttentionShape& shape = params.forward.shape;
  const QueryTiling tiling{params.forward.geometry, 0, shape.seqlen_k, tile_n};
  const int planes = shape.batch * shape.kv_heads;
  const int64_t plane_bytes = kElementBytes * shape.seqlen_q * shape.head_dim * (shape.heads / shape.kv_heads);
  const int64_t fitting = plane_bytes < kCacheBytes ? kCacheBytes / plane_bytes : 1;
  const int64_t groups = in_turns ? 1 : (planes + fitting - 1) / fitting;
  return {tiling.count(), planes, static_cast<int>((planes + groups - 1) / groups)};
}

}  // namespace chunkattn::cuda
