// The attentions of the backward kernels. A thread block, or a cluster, owns a tile of keys; what differs is which keys
// those are, which queries attend to them, and where their gradients go.
#pragma once

#include <numeric>

#include "cuda/backward/gradient_pieces.h"
#include "cuda/backward/region_tiles.h"
#include "cuda/backward/schedule.h"
#include "cuda/common/copy_rows.cuh"
#include "cuda/common/gradients.cuh"
#include "cuda/common/query_tile.cuh"
#include "cuda/common/query_tiles.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/select_merge/attended_regions.h"

namespace chunkattn::cuda {

struct HeadRange {
  int begin;
  int end;
};

// Dual chunk attention: keys that follow one another, and the queries behind them. Nobody else has their gradients.
struct ChunkKeyTiles {
  static constexpr bool kInRegions = false;
  static constexpr bool kInSequences = false;

  using Tile = ChunkKeyTile;
  struct Work {};  // what of a block's work the Hopper kernel keeps in shared memory

  // Of a plain batch.
  __device__ __forceinline__ Tile tile(const BackwardParams& params, const KeyTileItem& item, int tile_n) const {
    return plain_key_tile(params.forward, item, tile_n);
  }

  // Fills in what a thread block works on, of any batch; false where that is nothing.
  __device__ __forceinline__ bool describe(Tile& own, AttendingQueries& queries, const BackwardParams& params,
                                           const BackwardWorkspace& workspace, const TileSchedule& schedule, int index,
                                           int tile_m, int tile_n) const {
    return describe_key_tile(own, queries, params, workspace, schedule, index, tile_m, tile_n);
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
    copy_rows_async<kThreads>(shared, rows + tile.first_key * stride, stride, tile.keys.end - tile.keys.begin, head_dim,
                              vectorized);
  }

  // Writes dV of `count` of the tile's keys, from `first` on, of which this thread has rows and columns from `row` and
  // `column` on (layout: softmax.cuh). Called by kStoring threads that `thread` counts and sync() brings together.
  template <typename T, int kStoring, int kSlabs, int kBlocks, typename Staged, typename Sync>
  __device__ __forceinline__ void store_values(const float (&dv)[kSlabs][kBlocks][4], int row, int column,
                                               const Staged& staged, const BackwardParams& params,
                                               const BackwardWorkspace& /*workspace*/,
                                               const BackwardVectorPaths& vectorized, const Tile& tile, int first,
                                               int count, int thread, Sync&& sync) const {
    staged.collect(dv, row, column, 1.f);
    sync();
    store_staged<kStoring>(staged, row_of<T>(params.dv, params.dv_strides, tile, first), params.dv_strides.seq, count,
                           params.forward.shape.head_dim, params.forward.rotary, -1, vectorized.dv, thread);
  }

  // The same of dK, scaled, and rotated back to the keys that were passed in.
  template <typename T, int kStoring, int kSlabs, int kBlocks, typename Staged, typename Sync>
  __device__ __forceinline__ void store_keys(const float (&dk)[kSlabs][kBlocks][4], int row, int column,
                                             const Staged& staged, const BackwardParams& params,
                                             const BackwardWorkspace& workspace, const BackwardVectorPaths& vectorized,
                                             const Tile& tile, int first, int count, int thread, Sync&& sync) const {
    staged.collect(dk, row, column, logit_scale(params.forward, tile.batch));
    sync();
    store_staged<kStoring>(staged, row_of<T>(params.dk, params.dk_strides, tile, first), params.dk_strides.seq, count,
                           params.forward.shape.head_dim, params.forward.rotary,
                           workspace.dk_rotated ? -1 : params.forward.geometry.key_row(tile.keys.begin + first),
                           vectorized.dk, thread);
  }

  // The same of the tile's first keys where a warp has whole rows, which leave through its own rows of `shared`, a tile
  // of 16-bit elements: no warp waits for another.
  template <typename T, int kBlocks, typename Shared>
  __device__ __forceinline__ void store_value_rows(const float (&dv)[1][kBlocks][4], int row, const Shared& shared,
                                                   const BackwardParams& params, const BackwardVectorPaths& vectorized,
                                                   const Tile& tile, int count) const {
    store_output(shared, dv, row_of<T>(params.dv, params.dv_strides, tile, 0), params.dv_strides.seq, row, count,
                 params.forward.shape.head_dim, vectorized.dv);
  }

  // Whether a thread has both elements of every pair in which dK is rotated back; or dK is not.
  template <int kHeadDim>
  __device__ __forceinline__ bool has_whole_pairs(const BackwardParams& params, const BackwardWorkspace& workspace,
                                                  const BackwardVectorPaths& vectorized) const {
    const RotaryTable& rotary = params.forward.rotary;
    return workspace.dk_rotated || (vectorized.dk && !rotary.interleaved && rotary.rotary_dim == kHeadDim);
  }

  template <typename T, int kBlocks, typename Shared>
  __device__ __forceinline__ void store_key_rows(float (&dk)[1][kBlocks][4], int row, const Shared& shared,
                                                 const BackwardParams& params, const BackwardWorkspace& workspace,
                                                 const BackwardVectorPaths& vectorized, const Tile& tile,
                                                 int count) const {
    const float scale = logit_scale(params.forward, tile.batch);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[0][block][i] *= scale;
    }
    if (!workspace.dk_rotated) {
      const int table_row = params.forward.geometry.key_row(tile.keys.begin);
      rotate_rows_back(dk[0], params.forward.rotary, table_row, row, count);
    }
    store_output(shared, dk, row_of<T>(params.dk, params.dk_strides, tile, 0), params.dk_strides.seq, row, count,
                 params.forward.shape.head_dim, vectorized.dk);
  }

 private:
  template <typename T>
  static __device__ __forceinline__ T* row_of(void* tensor, const Strides& strides, const Tile& tile, int key) {
    return static_cast<T*>(tensor) + tile.batch * strides.batch + (tile.first_key + key) * strides.seq +
           tile.kv_head * strides.head;
  }
};

// The same of packed sequences, whose lengths the device alone knows. Hopper only: what a block of it works on lies in
// shared memory, and the copy engine sees sequences end (encode_window_map).
struct SequenceKeyTiles : ChunkKeyTiles {
  static constexpr bool kInSequences = true;

  struct Work {
    Tile keys;  // none: the block has nothing to do
    AttendingQueries queries;
  };

  Work* work;  // in shared memory

  // Called by all threads before anything else.
  __device__ __forceinline__ void find(const BackwardParams& params, const BackwardWorkspace& workspace,
                                       const TileSchedule& schedule, int index, int tile_m, int tile_n) const {
    if (threadIdx.x == 0 && !describe(work->keys, work->queries, params, workspace, schedule, index, tile_m, tile_n)) {
      work->keys.keys = {0, 0};
    }
    __syncthreads();
  }

  __device__ __forceinline__ Tile tile(const BackwardParams& /*params*/, const KeyTileItem& /*item*/,
                                       int /*tile_n*/) const {
    return work->keys;
  }
};

// Select-and-merge attention (group_attention.h). A block has keys of a group's list of regions, or of the group
// itself, and the queries of the group, of all heads that share the list. Other groups list the same regions, so
// gradients are added to float32 sums. Keys of a list are counted from its first on.
struct RegionKeyTiles {
  static constexpr bool kInRegions = true;
  static constexpr bool kInSequences = false;

  AttendedRegions lists;
  RegionTiling tiling;
  KeyGradientSums sums;
  int blocks;    // of a cluster, among which a tile is cut
  int box_rows;  // Hopper only: the rows of a region that the copy engine brings at once, a divisor of a block's keys

  struct Work {};

  struct Tile : RegionTile {
    int batch;
    int kv_head;
  };

  __device__ __forceinline__ Tile tile(const BackwardParams& params, const KeyTileItem& item, int /*tile_n*/) const {
    const int kv_heads = params.forward.shape.kv_heads;
    const int batch = item.plane / kv_heads, kv_head = item.plane % kv_heads;
    const auto listed_keys = [&](int group, int list) { return regions(batch, kv_head, list, group).keys(); };
    return {tiling.tile(item.tile, listed_keys), batch, kv_head};
  }

  __device__ __forceinline__ bool describe(Tile& own, AttendingQueries& queries, const BackwardParams& params,
                                           const BackwardWorkspace& workspace, const TileSchedule& schedule, int index,
                                           int tile_m, int tile_n) const {
    own = tile(params, key_tile_item(schedule, index), tile_n);
    queries = attending_queries(params.forward, workspace, tile_m);
    return own.keys.begin < own.keys.end;
  }

  __device__ __forceinline__ HeadRange heads(const AttentionShape& /*shape*/, const Tile& tile) const {
    const int list = tile.kv_head * tiling.lists + tile.list;
    return {list * lists.heads_per_list, (list + 1) * lists.heads_per_list};
  }

  __device__ __forceinline__ GroupTileWalk walk(const BackwardParams& /*params*/, const QueryTiling& query_tiling,
                                                const RegimeRows& /*rows*/, const Tile& tile) const {
    const QueryTile group = tiling.queries(tile.group);
    return tiling.is_listed(tile) ? GroupTileWalk(query_tiling, group, group.begin, Regime::kInter)
                                  : GroupTileWalk(query_tiling, group, tile.keys.begin, Regime::kIntra);
  }

  __device__ __forceinline__ ListedRegions regions(const Tile& tile) const {
    return regions(tile.batch, tile.kv_head, tile.list, tile.group);
  }

  // The position of the tile's key `index`.
  __device__ __forceinline__ int token(const ListedRegions& regions, const Tile& tile, int index) const {
    return tiling.is_listed(tile) ? regions.token(tile.keys.begin + index) : tile.keys.begin + index;
  }

  template <int kThreads, typename T, typename Shared>
  __device__ __forceinline__ void copy(const Shared& shared, const T* rows, int64_t stride, const Tile& tile,
                                       int head_dim, bool vectorized) const {
    const ListedRegions regions = this->regions(tile);
    copy_scattered_rows_async<kThreads>(shared, rows, stride, tile.keys.end - tile.keys.begin, head_dim, vectorized,
                                        [&](int row) { return token(regions, tile, row); });
  }

  template <typename T, int kStoring, int kSlabs, int kBlocks, typename Staged, typename Sync>
  __device__ __forceinline__ void store_values(const float (&dv)[kSlabs][kBlocks][4], int row, int column,
                                               const Staged& /*staged*/, const BackwardParams& params,
                                               const BackwardWorkspace& /*workspace*/,
                                               const BackwardVectorPaths& /*vectorized*/, const Tile& tile, int first,
                                               int count, int thread, Sync&& sync) const {
    add<kStoring>(sums.dv, sums.dv_turns, dv, row, column, 1.f, params, tile, first, count, thread, sync);
  }

  template <typename T, int kStoring, int kSlabs, int kBlocks, typename Staged, typename Sync>
  __device__ __forceinline__ void store_keys(const float (&dk)[kSlabs][kBlocks][4], int row, int column,
                                             const Staged& /*staged*/, const BackwardParams& params,
                                             const BackwardWorkspace& /*workspace*/,
                                             const BackwardVectorPaths& /*vectorized*/, const Tile& tile, int first,
                                             int count, int thread, Sync&& sync) const {
    add<kStoring>(sums.dk, sums.dk_turns, dk, row, column, logit_scale(params.forward, tile.batch), params, tile, first,
                  count, thread, sync);
  }

 private:
  __device__ __forceinline__ ListedRegions regions(int batch, int kv_head, int list, int group) const {
    return lists.of_group(batch, kv_head * tiling.lists + list, group);
  }

  // Adds the gradients of keys from `first` on to the sums of the KV head. Where blocks take turns the warps of a block
  // do, too, and rows unless regions are whole eights: a list may name a region twice. With regions of whole eights all
  // that is added to an element comes from the same lane of the block's warps.
  template <int kStoring, int kSlabs, int kBlocks, typename Sync>
  __device__ __forceinline__ void add(float* tensor, int* turns, const float (&gradients)[kSlabs][kBlocks][4], int row,
                                      int column, float factor, const BackwardParams& params, const Tile& tile,
                                      int first, int count, int thread, Sync&& sync) const {
    const AttentionShape& shape = params.forward.shape;
    const int plane = tile.batch * shape.kv_heads + tile.kv_head;
    const bool in_turns = turns != nullptr;
    const ListedRegions regions = this->regions(tile);
    const bool row_by_row = in_turns && regions.region_size % GradientPieces::kRows != 0;
    const int block = first / (tiling.size / blocks);
    if (in_turns && thread == 0) wait_for_turn(turns + plane, blocks * tiling.turn(tile) + block);
#pragma unroll 1
    for (int warp = 0; warp < (in_turns ? kStoring / 32 : 1); ++warp) {
      if (in_turns) sync();
      if (in_turns && thread / 32 != warp) continue;
      add_rows(tensor, GradientPieces{shape.seqlen_k, shape.head_dim}, plane, gradients, factor, row, column, count,
               shape.head_dim, row_by_row, [&](int index) { return token(regions, tile, first + index); });
    }
    if (in_turns) {
      __threadfence();
      sync();
      // The last block of a tile takes the turns of tiles without keys, too.
      if (thread == 0) pass_turns_on(turns + plane, block + 1 < blocks ? 1 : blocks * (tiling.turns(tile) - 1) + 1);
    }
  }
};

inline RegionKeyTiles region_key_tiles(const BackwardParams& params, const AttendedRegions& lists,
                                       const KeyGradientSums& sums, int tile_n, int blocks) {
  const AttentionShape& shape = params.forward.shape;
  const int group_size = params.forward.geometry.stride();
  const int64_t listed_keys = lists.groups > 1 ? static_cast<int64_t>(lists.capacity) * lists.geometry.region_size : 0;
  const RegionTiling tiling{lists.index_heads / shape.kv_heads,
                            static_cast<int>((listed_keys + tile_n - 1) / tile_n),
                            (group_size + tile_n - 1) / tile_n,
                            tile_n,
                            group_size,
                            shape.seqlen_k};
  return {lists, tiling, sums, blocks, std::gcd(lists.geometry.region_size, tile_n / blocks)};
}

// Returns null, or why there is no such schedule.
inline const char* schedule_region_key_tiles(const BackwardParams& params, const RegionKeyTiles& keys,
                                             TileSchedule* schedule) {
  const AttentionShape& shape = params.forward.shape;
  const int planes = shape.batch * shape.kv_heads;
  const int64_t tiles = static_cast<int64_t>(keys.lists.groups) * keys.tiling.lists * keys.tiling.per_list();
  if (tiles * planes > INT32_MAX) return "the lists of regions have too many key tiles for one launch";
  const int64_t queries = static_cast<int64_t>(keys.tiling.group_size) * keys.lists.heads_per_list;
  *schedule = {static_cast<int>(tiles), planes,
               planes_at_once(planes, queries + shape.seqlen_k, shape.head_dim, keys.sums.dk_turns != nullptr)};
  return nullptr;
}

}  // namespace chunkattn::cuda
