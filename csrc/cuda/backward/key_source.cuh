// The attentions of the backward kernels. A thread block owns a tile of keys; what differs is which keys those are,
// which queries attend to them, and where their gradients go.
#pragma once

#include <numeric>

#include "cuda/backward/schedule.h"
#include "cuda/common/copy_rows.cuh"
#include "cuda/common/gradients.cuh"
#include "cuda/common/query_tiles.cuh"
#include "cuda/select_merge/attended_regions.h"

namespace chunkattn::cuda {

struct HeadRange {
  int begin;
  int end;
};

// Dual chunk attention: keys that follow one another, and the queries behind them. Nobody else has their gradients.
struct ChunkKeyTiles {
  static constexpr bool kInRegions = false;

  struct Tile {
    int batch;
    int kv_head;
    int order;  // how many blocks add to dq of the same queries before this one, where they take turns
    QueryTile keys;
  };

  __device__ __forceinline__ Tile tile(const BackwardParams& params, const KeyTileItem& item, int tile_n) const {
    const int kv_heads = params.forward.shape.kv_heads;
    const QueryTiling tiling{params.forward.geometry, 0, params.forward.shape.seqlen_k, tile_n};
    return {item.plane / kv_heads, item.plane % kv_heads, item.tile, tiling.tile(item.tile)};
  }

  // The query heads that attend to the tile.
  __device__ __forceinline__ HeadRange heads(const AttentionShape& shape, const Tile& tile) const {
    const int group = shape.heads / shape.kv_heads;
    return {tile.kv_head * group, (tile.kv_head + 1) * group};
  }

  // Their query tiles.
  __device__ __forceinline__ QueryTileWalk walk(const BackwardParams& /*params*/, const QueryTiling& tiling,
                                                const RegimeRows& rows, const Tile& tile) const {
    return QueryTileWalk(tiling, rows, tile.keys.begin);
  }

  // Starts the copy of the tile's rows of K or V; see copy_rows.cuh.
  template <int kThreads, typename T, typename Shared>
  __device__ __forceinline__ void copy(const Shared& shared, const T* rows, int64_t stride, const Tile& tile,
                                       int head_dim, bool vectorized) const {
    copy_rows_async<kThreads>(shared, rows + tile.keys.begin * stride, stride, tile.keys.end - tile.keys.begin,
                              head_dim, vectorized);
  }

  // Writes the tile's staged dV by kStoring threads, `thread` counting them.
  template <typename T, int kStoring, typename Staged>
  __device__ __forceinline__ void store_values(const Staged& staged, const BackwardParams& params,
                                               const BackwardWorkspace& /*workspace*/,
                                               const BackwardVectorPaths& vectorized, const Tile& tile,
                                               int thread) const {
    store_staged<kStoring>(staged, first_row<T>(params.dv, params.dv_strides, tile), params.dv_strides.seq,
                           tile.keys.end - tile.keys.begin, params.forward.shape.head_dim, params.forward.rotary, -1,
                           vectorized.dv, thread);
  }

  // The same of dK, rotated back to the keys that were passed in.
  template <typename T, int kStoring, typename Staged>
  __device__ __forceinline__ void store_keys(const Staged& staged, const BackwardParams& params,
                                             const BackwardWorkspace& workspace, const BackwardVectorPaths& vectorized,
                                             const Tile& tile, int thread) const {
    store_staged<kStoring>(staged, first_row<T>(params.dk, params.dk_strides, tile), params.dk_strides.seq,
                           tile.keys.end - tile.keys.begin, params.forward.shape.head_dim, params.forward.rotary,
                           workspace.dk_rotated ? -1 : params.forward.geometry.key_row(tile.keys.begin), vectorized.dk,
                           thread);
  }

 private:
  template <typename T>
  static __device__ __forceinline__ T* first_row(void* tensor, const Strides& strides, const Tile& tile) {
    return static_cast<T*>(tensor) + tile.batch * strides.batch + tile.keys.begin * strides.seq +
           tile.kv_head * strides.head;
  }
};

// The query tiles of a group from some position on, in the terms of QueryTileWalk: all of them attend alike.
class GroupTileWalk {
 public:
  __device__ __forceinline__ GroupTileWalk(const QueryTiling& tiling, const QueryTile& group, int position,
                                           Regime regime)
      : begin_(group.begin + (position - group.begin) / tiling.size * tiling.size),
        end_(group.end),
        tile_index_(tiling.index_of(begin_)),
        regime_(regime) {}

  __device__ __forceinline__ bool done(const QueryTiling& /*tiling*/) const { return begin_ >= end_; }

  __device__ __forceinline__ AttendingTile tile(const QueryTiling& tiling) const {
    const int left = end_ - begin_;
    return {tile_index_, begin_, left < tiling.size ? left : tiling.size, regime_, begin_};
  }

  __device__ __forceinline__ void advance(const QueryTiling& tiling, const RegimeRows& /*rows*/) {
    ++tile_index_;
    begin_ += tiling.size;
  }

 private:
  int begin_;
  int end_;
  int tile_index_;
  Regime regime_;
};

// Select-and-merge attention (group_attention.h). A block has keys of a group's list of regions, or of the group
// itself, and the queries of the group, of all heads that share the list. Other groups list the same regions, so
// gradients are added to float32 sums. Keys of a list are counted from its first on.
struct RegionKeyTiles {
  static constexpr bool kInRegions = true;

  AttendedRegions lists;
  KeyGradientSums sums;
  int listed_tiles;  // of the longest list there may be
  int own_tiles;     // of a whole group
  int box_rows;      // Hopper only: the rows of a region that the copy engine brings at once, a divisor of the key tile

  struct Tile {
    int batch;
    int kv_head;
    int order;
    QueryTile keys;  // none where the list or the group is shorter
    int list;        // of the batch row
    int group;
    int within;  // place among the list's tiles and behind them the group's own
  };

  __device__ __forceinline__ Tile tile(const BackwardParams& params, const KeyTileItem& item, int tile_n) const {
    const AttentionShape& shape = params.forward.shape;
    const int index = item.tile / (listed_tiles + own_tiles);
    Tile tile;
    tile.batch = item.plane / shape.kv_heads;
    tile.kv_head = item.plane % shape.kv_heads;
    tile.list = tile.kv_head * lists_per_kv_head(shape) + index % lists_per_kv_head(shape);
    tile.group = index / lists_per_kv_head(shape);
    tile.within = item.tile % (listed_tiles + own_tiles);
    const int listed_keys = regions(tile).keys();
    const int own = tile.within - listed_tiles;
    tile.order = listed(tile) ? tile.within : (listed_keys + tile_n - 1) / tile_n + own;
    const int begin = listed(tile) ? tile.within * tile_n : group_queries(params, tile).begin + own * tile_n;
    const int end = listed(tile) ? listed_keys : group_queries(params, tile).end;
    tile.keys = {begin, end - begin < tile_n ? end : begin + tile_n};
    return tile;
  }

  __device__ __forceinline__ HeadRange heads(const AttentionShape& /*shape*/, const Tile& tile) const {
    return {tile.list * lists.heads_per_list, (tile.list + 1) * lists.heads_per_list};
  }

  __device__ __forceinline__ GroupTileWalk walk(const BackwardParams& params, const QueryTiling& tiling,
                                                const RegimeRows& /*rows*/, const Tile& tile) const {
    const QueryTile queries = group_queries(params, tile);
    return listed(tile) ? GroupTileWalk(tiling, queries, queries.begin, Regime::kInter)
                        : GroupTileWalk(tiling, queries, tile.keys.begin, Regime::kIntra);
  }

  // The position of the tile's key `index`.
  __device__ __forceinline__ int token(const ListedRegions& regions, const Tile& tile, int index) const {
    return listed(tile) ? regions.token(tile.keys.begin + index) : tile.keys.begin + index;
  }

  template <int kThreads, typename T, typename Shared>
  __device__ __forceinline__ void copy(const Shared& shared, const T* rows, int64_t stride, const Tile& tile,
                                       int head_dim, bool vectorized) const {
    const ListedRegions regions = this->regions(tile);
    copy_scattered_rows_async<kThreads>(shared, rows, stride, tile.keys.end - tile.keys.begin, head_dim, vectorized,
                                        [&](int row) { return token(regions, tile, row); });
  }

  template <typename T, int kStoring, typename Staged>
  __device__ __forceinline__ void store_values(const Staged& staged, const BackwardParams& params,
                                               const BackwardWorkspace& /*workspace*/,
                                               const BackwardVectorPaths& /*vectorized*/, const Tile& tile,
                                               int thread) const {
    add<kStoring>(staged, sums.dv, sums.dv_turns, params, tile, thread);
  }

  template <typename T, int kStoring, typename Staged>
  __device__ __forceinline__ void store_keys(const Staged& staged, const BackwardParams& params,
                                             const BackwardWorkspace& /*workspace*/,
                                             const BackwardVectorPaths& /*vectorized*/, const Tile& tile,
                                             int thread) const {
    add<kStoring>(staged, sums.dk, sums.dk_turns, params, tile, thread);
  }

  __device__ __forceinline__ ListedRegions regions(const Tile& tile) const {
    return lists.of_group(tile.batch, tile.list, tile.group);
  }

 private:
  __device__ __forceinline__ bool listed(const Tile& tile) const { return tile.within < listed_tiles; }

  __device__ __forceinline__ int lists_per_kv_head(const AttentionShape& shape) const {
    return lists.index_heads / shape.kv_heads;
  }

  __device__ __forceinline__ QueryTile group_queries(const BackwardParams& params, const Tile& tile) const {
    const int size = params.forward.geometry.stride();
    const int begin = tile.group * size;
    const int left = params.forward.shape.seqlen_k - begin;
    return {begin, begin + (left < size ? left : size)};
  }

  // Where blocks take turns, one warp adds all rows of a block: a list may name a region twice.
  template <int kStoring, typename Staged>
  __device__ __forceinline__ void add(const Staged& staged, float* tensor, int* turns, const BackwardParams& params,
                                      const Tile& tile, int thread) const {
    const AttentionShape& shape = params.forward.shape;
    const int plane = tile.batch * shape.kv_heads + tile.kv_head;
    const int warp = thread / 32;
    const bool in_turns = turns != nullptr;
    if (in_turns && warp > 0) return;
    // A KV head's blocks add in the order of their items. The first of a group's own tiles takes the turns of those its
    // list is too short for, and passes them on; so does its last with those the group is too short for.
    const int own = tile.within - listed_tiles;
    const int missing = own == 0 ? tile.within - tile.order : 0;
    if (in_turns) {
      const int index = tile.group * lists_per_kv_head(shape) + tile.list % lists_per_kv_head(shape);
      const int turn = index * (listed_tiles + own_tiles) + tile.within - missing;
      if (thread == 0) wait_for_turn(turns + plane, turn);
      __syncwarp();
    }
    const ListedRegions regions = this->regions(tile);
    float* rows = tensor + static_cast<int64_t>(plane) * shape.seqlen_k * sums.pitch;
    add_staged(staged, rows, sums.pitch, tile.keys.end - tile.keys.begin, warp, in_turns ? 1 : kStoring / 32,
               [&](int row) { return token(regions, tile, row); });
    if (in_turns) {
      __threadfence();
      __syncwarp();
      const bool last = own >= 0 && tile.keys.end == group_queries(params, tile).end;
      if (thread == 0) pass_turns_on(turns + plane, 1 + missing + (last ? own_tiles - 1 - own : 0));
    }
  }
};

inline RegionKeyTiles region_key_tiles(const BackwardParams& params, const AttendedRegions& lists,
                                       const KeyGradientSums& sums, int tile_n) {
  const int64_t listed_keys = lists.groups > 1 ? static_cast<int64_t>(lists.capacity) * lists.geometry.region_size : 0;
  return {lists, sums, static_cast<int>((listed_keys + tile_n - 1) / tile_n),
          (params.forward.geometry.stride() + tile_n - 1) / tile_n, std::gcd(lists.geometry.region_size, tile_n)};
}

// Returns null, or why there is no such schedule.
inline const char* schedule_region_key_tiles(const BackwardParams& params, const RegionKeyTiles& keys,
                                             TileSchedule* schedule) {
  const AttentionShape& shape = params.forward.shape;
  const int planes = shape.batch * shape.kv_heads;
  const int64_t lists = static_cast<int64_t>(keys.lists.groups) * (keys.lists.index_heads / shape.kv_heads);
  const int64_t tiles = lists * (static_cast<int64_t>(keys.listed_tiles) + keys.own_tiles);
  if (tiles * planes > INT32_MAX) return "the lists of regions have too many key tiles for one launch";
  const int64_t queries = static_cast<int64_t>(params.forward.geometry.stride()) * keys.lists.heads_per_list;
  *schedule = {static_cast<int>(tiles), planes,
               planes_at_once(planes, queries, shape.head_dim, keys.sums.dk_turns != nullptr)};
  return nullptr;
}

}  // namespace chunkattn::cuda
