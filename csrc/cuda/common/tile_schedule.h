// The order in which query tiles are worked on. No CUDA types; host and device read the same rule.
#pragma once

#include <cstdint>

#include "params.h"

namespace chunkattn::cuda {

// Longest tiles first, so that the short ones fill the end. Heads go in groups whose K and V fit the L2 cache together:
// within a group the same tile of every head follows the other, and heads that share a KV head are neighbours.
struct TileSchedule {
  int tiles;   // query tiles of a head
  int planes;  // batch * heads
  int group;   // planes of a group

  struct Item {
    int tile;
    int plane;  // batch * heads + head
  };

  CHUNKATTN_HOST_DEVICE int64_t count() const { return static_cast<int64_t>(tiles) * planes; }

  CHUNKATTN_HOST_DEVICE Item item(int index) const {
    const int per_group = tiles * group;
    const int first_plane = index / per_group * group;
    const int within = index % per_group;
    const int size = planes - first_plane < group ? planes - first_plane : group;
    return {tiles - 1 - within / size, first_plane + within % size};
  }
};

// Of `tiles` query tiles for each head.
inline TileSchedule schedule_tiles(const ForwardParams& params, int tiles) {
  constexpr int64_t kCacheBytes = 32 << 20;  // of an L2 cache of 40 MB or more, what K and V may take
  constexpr int64_t kElementBytes = 2;
  const AttentionShape& shape = params.shape;
  const int64_t kv_head_bytes = 2 * kElementBytes * shape.seqlen_k * shape.head_dim;
  const int64_t kv_planes = static_cast<int64_t>(shape.batch) * shape.kv_heads;
  const int64_t fitting = kv_head_bytes < kCacheBytes ? kCacheBytes / kv_head_bytes : 1;
  // Groups of equal size: a small last one would have too few long tiles to go round, and the device would wait for
  // them.
  const int64_t groups = (kv_planes + fitting - 1) / fitting;
  const int64_t group = (kv_planes + groups - 1) / groups * (shape.heads / shape.kv_heads);
  return {tiles, shape.batch * shape.heads, static_cast<int>(group)};
}

inline TileSchedule make_tile_schedule(const ForwardParams& params, int tile_m) {
  const QueryTiling tiling{params.geometry, params.first_position(), params.shape.seqlen_k, tile_m};
  return schedule_tiles(params, tiling.count());
}

// Where the device alone knows at which position a sequence's queries begin: the most tiles they can have.
inline TileSchedule make_ragged_tile_schedule(const ForwardParams& params, int tile_m) {
  const int stride = params.geometry.stride();
  const int64_t seqlen_q = params.shape.seqlen_q;
  const int64_t chunks =
      (seqlen_q + stride - 2) / stride + 1;  // over which they spread; each may end in a partial tile
  return schedule_tiles(params, static_cast<int>((seqlen_q + chunks * (tile_m - 1)) / tile_m));
}

// Where tiles attend lists of regions, those that share a list follow one another.
inline TileSchedule make_region_tile_schedule(const ForwardParams& params, int heads_per_list, int tile_m) {
  const QueryTiling tiling{params.geometry, params.first_position(), params.shape.seqlen_k, tile_m};
  return {tiling.count(), params.shape.batch * params.shape.heads, heads_per_list};
}

}  // namespace chunkattn::cuda
