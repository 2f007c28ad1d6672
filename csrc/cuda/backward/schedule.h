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

// Planes go in groups of which what is read and added to again and again fits the L2 cache together: Q, dO and dQ, or dK
// and dV where those are sums, all of them 8 bytes for each row and dimension. Where blocks add to dQ in turns, a key
// tile's waits for the one before: then the tiles of all planes follow one another, and few of one plane are in work at a
// time.
inline int planes_at_once(int planes, int64_t rows, int head_dim, bool in_turns) {
  constexpr int64_t kCacheBytes = 32 << 20;
  constexpr int64_t kElementBytes = 2 + 2 + 4;
  const int64_t plane_bytes = kElementBytes * rows * head_dim;
  const int64_t fitting = plane_bytes < kCacheBytes ? kCacheBytes / plane_bytes : 1;
  const int64_t groups = in_turns ? 1 : (planes + fitting - 1) / fitting;
  return static_cast<int>((planes + groups - 1) / groups);
}

inline TileSchedule make_key_tile_schedule(const BackwardParams& params, int tile_n, bool in_turns) {
  const AttentionShape& shape = params.forward.shape;
  const QueryTiling tiling{params.forward.geometry, 0, shape.seqlen_k, tile_n};
  const int planes = shape.batch * shape.kv_heads;
  const int64_t queries = static_cast<int64_t>(shape.seqlen_q) * (shape.heads / shape.kv_heads);
  return {tiling.count(), planes, planes_at_once(planes, queries, shape.head_dim, in_turns)};
}

}  // namespace chunkattn::cuda
