// The order in which tiles are worked on. No CUDA types; host and device read the same rule.
#pragma once

#include <cstdint>

#include "params.h"

namespace chunkattn::cuda {

// Longest tiles first, so that the short ones fill the end. Heads go in groups whose K and V fit the L2 cache together:
// within a group the same tile of every head follows the other, and heads that share a KV head are neighbours.
//
// Packed sequences follow one another, those with the longest tiles first (SequenceTiles). How many items they have is
// known to the device alone: the host counts the most that there can be, and those behind the last are nothing.
struct TileSchedule {
  int tiles;                                 // of a head; of packed sequences, of all together, at most
  int planes;                                // batch * heads; of packed sequences heads
  int group;                                 // planes of a group
  const SequenceTiles* sequences = nullptr;  // packed ones, behind them one that only says how many items there are
  int batch = 0;                             // of them

  struct Item {
    int tile;
    int plane;  // batch * heads + head
  };

  CHUNKATTN_HOST_DEVICE int64_t count() const { return static_cast<int64_t>(tiles) * planes; }

  CHUNKATTN_HOST_DEVICE bool has(int64_t index) const {
    return index < count() && (sequences == nullptr || index < sequences[batch].first_item);
  }

  // Of an index that it has.
  CHUNKATTN_HOST_DEVICE Item item(int index) const {
    if (sequences == nullptr) return plain_item(index);
    const SequenceTiles sequence = sequence_of(index);
    const TileSchedule own{sequence.tiles, planes, sequence.group};
    const Item item = own.plain_item(index - sequence.first_item);
    return {item.tile, sequence.batch * planes + item.plane};
  }

  // The same of a plain batch: a kernel that takes no other need not know where sequences begin.
  CHUNKATTN_HOST_DEVICE Item plain_item(int index) const {
    const int per_group = tiles * group;
    const int first_plane = index / per_group * group;
    const int within = index % per_group;
    const int size = planes - first_plane < group ? planes - first_plane : group;
    return {tiles - 1 - within / size, first_plane + within % size};
  }

 private:
  // The last one that begins at the index or before it. Those without tiles are the last of all.
  CHUNKATTN_HOST_DEVICE SequenceTiles sequence_of(int index) const {
    int begin = 0, end = batch;
    while (end - begin > 1) {
      const int middle = begin + (end - begin) / 2;
      (sequences[middle].first_item <= index ? begin : end) = middle;
    }
    return sequences[begin];
  }
};

// How many of so many planes make a group, each of which needs so many bytes again and again.
CHUNKATTN_HOST_DEVICE int64_t planes_of_group(int64_t planes, int64_t bytes) {
  constexpr int64_t kCacheBytes = 32 << 20;  // of an L2 cache of 40 MB or more, what they may take
  const int64_t fitting = bytes <= 0 ? kCacheBytes : bytes < kCacheBytes ? kCacheBytes / bytes : 1;
  // Groups of equal size: a small last one would have too few long tiles to go round, and the device would wait for
  // them.
  const int64_t groups = (planes + fitting - 1) / fitting;
  return (planes + groups - 1) / groups;
}

// K and V of a head, in 16-bit elements.
CHUNKATTN_HOST_DEVICE int64_t key_value_bytes(int seqlen_k, int head_dim) {
  return int64_t{2 * 2} * seqlen_k * head_dim;
}

// Of `tiles` query tiles for each head.
inline TileSchedule schedule_tiles(const ForwardParams& params, int tiles) {
  const AttentionShape& shape = params.shape;
  const int64_t kv_planes = static_cast<int64_t>(shape.batch) * shape.kv_heads;
  const int64_t group = planes_of_group(kv_planes, key_value_bytes(shape.seqlen_k, shape.head_dim));
  return {tiles, shape.batch * shape.heads, static_cast<int>(group * (shape.heads / shape.kv_heads))};
}

// At least as many as the tiles of that many sequences with that many rows in all, none across a chunk boundary: each
// of a sequence's chunks may end in a partial tile, and its first and its last chunk may be partial themselves. What a
// sequence's tiles need begins, among those of all, no earlier than what the rows and sequences before it need ends.
CHUNKATTN_HOST_DEVICE int64_t room_for_packed_tiles(int64_t rows, int64_t sequences, const ChunkGeometry& geometry,
                                                    int tile_size) {
  return rows / tile_size + rows / geometry.stride() + 2 * sequences;
}

// Of `planes` heads of packed sequences, whose lengths `sequences` says.
inline TileSchedule schedule_packed_tiles(const ForwardParams& params, const SequenceTiles* sequences, int64_t rows,
                                          int planes, int tile_size) {
  const int64_t tiles = room_for_packed_tiles(rows, params.shape.batch, params.geometry, tile_size);
  // More than a launch can have stays more when the number is cut to 32 bits.
  return {static_cast<int>(tiles < INT32_MAX ? tiles : INT32_MAX), planes, planes, sequences, params.shape.batch};
}

// The query tiles of a packed sequence.
struct PackedQueryTiles {
  const ForwardParams& params;
  int tile_size;

  // The keys of its longest tile; 0 where it has none.
  CHUNKATTN_HOST_DEVICE int longest(int batch) const {
    const Sequence sequence = params.sequence(batch);
    return sequence.seqlen_q > 0 ? sequence.seqlen_k : 0;
  }

  CHUNKATTN_HOST_DEVICE int count(int batch) const {
    return params.sequence(batch).query_tiling(params.geometry, tile_size).count();
  }

  CHUNKATTN_HOST_DEVICE int planes() const { return params.shape.heads; }

  CHUNKATTN_HOST_DEVICE int group(int batch) const {
    const AttentionShape& shape = params.shape;
    const int64_t bytes = key_value_bytes(params.sequence(batch).seqlen_k, shape.head_dim);
    return static_cast<int>(planes_of_group(shape.kv_heads, bytes)) * (shape.heads / shape.kv_heads);
  }
};

// Where a packed sequence stands among all: behind those with longer tiles.
struct SequencePlace {
  int rank;
  int64_t first_item;

  // Counts in another sequence.
  template <typename Tiles>
  CHUNKATTN_HOST_DEVICE void meet(const Tiles& tiles, int batch, int other) {
    const int own = tiles.longest(batch), others = tiles.longest(other);
    if (others < own || (others == own && other >= batch)) return;
    ++rank;
    first_item += static_cast<int64_t>(tiles.count(other)) * tiles.planes();
  }
};

inline TileSchedule make_tile_schedule(const ForwardParams& params, int tile_m) {
  if (params.packed()) {
    return schedule_packed_tiles(params, params.sequence_tiles, params.total_q, params.shape.heads, tile_m);
  }
  return schedule_tiles(params, params.sequence(0).query_tiling(params.geometry, tile_m).count());
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
  const QueryTiling tiling = params.sequence(0).query_tiling(params.geometry, tile_m);
  return {tiling.count(), params.shape.batch * params.shape.heads, heads_per_list};
}

}  // namespace chunkattn::cuda
