// The two attentions of the forward kernels: what differs between them is which keys a tile of queries attends to,
// where those lie, and whether every segment has its own rotation of Q.
#pragma once

#include "cuda/common/copy_rows.cuh"
#include "cuda/common/key_tiles.cuh"
#include "cuda/select_merge/attended_regions.h"

namespace chunkattn::cuda {

// Dual chunk attention: segments are ranges of keys.
struct ChunkKeys {
  static constexpr bool kRotatesQueries = true;

  __device__ __forceinline__ SegmentList segments(const ForwardParams& params, int /*batch*/, int /*head*/,
                                                  const QueryTile& queries) const {
    return params.geometry.segments(queries);
  }

  // Starts the copy of a key tile of K or V of the head's KV head; see copy_rows.cuh.
  struct Reader {
    template <int kThreads, typename T, typename Tile>
    __device__ __forceinline__ void copy(const Tile& shared, const T* keys, int64_t stride, const KeyTile& tile,
                                         int head_dim, bool vectorized) const {
      copy_rows_async<kThreads>(shared, keys + tile.begin * stride, stride, tile.valid, head_dim, vectorized);
    }
  };
  __device__ __forceinline__ Reader reader(int /*batch*/, int /*head*/, const QueryTile& /*queries*/) const {
    return {};
  }
};

// Select-and-merge attention: the queries' own group, and the list of its regions. Rows are attended as they are.
struct RegionKeys {
  static constexpr bool kRotatesQueries = false;

  AttendedRegions lists;
  int box_rows;  // rows of a region that the copy engine brings at once, a divisor of the key tile; Hopper only

  __device__ __forceinline__ SegmentList segments(const ForwardParams& /*params*/, int batch, int head,
                                                  const QueryTile& queries) const {
    return lists.segments(batch, head, queries);
  }

  struct Reader {
    ListedRegions regions;

    template <int kThreads, typename T, typename Tile>
    __device__ __forceinline__ void copy(const Tile& shared, const T* keys, int64_t stride, const KeyTile& tile,
                                         int head_dim, bool vectorized) const {
      const bool listed = tile.regime != Regime::kIntra;
      copy_scattered_rows_async<kThreads>(shared, keys, stride, tile.valid, head_dim, vectorized, [&](int row) {
        return listed ? regions.token(tile.begin + row) : tile.begin + row;
      });
    }
  };
  __device__ __forceinline__ Reader reader(int batch, int head, const QueryTile& queries) const {
    return {lists.of(batch, head, queries.begin)};
  }
};

}  // namespace chunkattn::cuda
