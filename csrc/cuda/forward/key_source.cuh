// The attentions of the forward kernels: what differs between them is which keys a tile of queries attends to, where
// those lie, and whether every segment has its own rotation of Q.
#pragma once

#include "cuda/common/copy_rows.cuh"
#include "cuda/common/key_tiles.cuh"
#include "cuda/decode/cache_rows.cuh"
#include "cuda/decode/sequences.h"
#include "cuda/select_merge/attended_regions.h"

namespace chunkattn::cuda {

// Where the copy engine finds a box of keys: its first row, and what its tensor map calls the batch.
struct BoxPlace {
  int row;
  int batch;
};

// Dual chunk attention: segments are ranges of keys.
struct ChunkKeys {
  static constexpr bool kRotatesQueries = true;
  static constexpr bool kInBoxes = false;  // otherwise key tiles are brought in boxes

  // Behind a sequence's last key.
  __device__ __forceinline__ bool ends_in_zeros(const ForwardParams& params) const { return !params.packed(); }

  __device__ __forceinline__ Sequence sequence(const ForwardParams& params, int batch) const {
    return params.sequence(batch);
  }

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
  // Hopper only: the rows of a region that the copy engine brings at once, a divisor of the key tile.
  int box_rows;
  // Hopper only: 2^64 / region_size, rounded up. The upper half of the product with a key's index is the index divided
  // by region_size, without error as long as both have 31 bits.
  uint64_t reciprocal;

  // Behind a sequence's last key.
  __device__ __forceinline__ bool ends_in_zeros(const ForwardParams& /*params*/) const { return true; }

  __device__ __forceinline__ Sequence sequence(const ForwardParams& params, int batch) const {
    return params.sequence(batch);
  }

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

  // Places the boxes of a tile, each of which another lane asks for.
  struct Boxes {
    const int* ids;
    int region_size;
    uint64_t reciprocal;
    int behind;  // a row behind the last key, where only zeros are

    // The first row of the box that begins at the tile's key `key`.
    __device__ __forceinline__ int row(const KeyTile& tile, int key) const {
      if (key >= tile.valid) return behind;
      const int index = tile.begin + key;
      if (tile.regime == Regime::kIntra) return index;
      const int region = static_cast<int>(__umul64hi(index, reciprocal));
      return index + (__ldg(ids + region) - region) * region_size;
    }
  };
  __device__ __forceinline__ Boxes boxes(const ForwardParams& params, int batch, int head,
                                         const QueryTile& queries) const {
    return {lists.of(batch, head, queries.begin).ids, lists.geometry.region_size, reciprocal, params.shape.seqlen_k};
  }
};

// Dual chunk attention to a cache: the device alone knows lengths and pages. Hopper only.
struct CacheKeys {
  static constexpr bool kRotatesQueries = true;
  static constexpr bool kInBoxes = true;

  KeyValueCache cache;
  int seqlen_new;  // tokens that were appended since cache_seqlens were counted
  int box_rows;    // a divisor of the key tile, which with a block table divides pages and chunks, too

  // Behind a sequence's last key.
  __device__ __forceinline__ bool ends_in_zeros(const ForwardParams& /*params*/) const { return false; }

  __device__ __forceinline__ Sequence sequence(const ForwardParams& params, int batch) const {
    const int seqlen_k = sequence_lengths(cache.capacity, seqlen_new, __ldg(cache.cache_seqlens + batch)).total;
    return {0, 0, params.shape.seqlen_q, seqlen_k};
  }

  __device__ __forceinline__ SegmentList segments(const ForwardParams& params, int /*batch*/, int /*head*/,
                                                  const QueryTile& queries) const {
    return params.geometry.segments(queries);
  }

  struct Boxes {
    const KeyValueCache& cache;
    int batch;
    int seqlen_k;

    // Rows behind the page are zeros.
    __device__ __forceinline__ BoxPlace place(const KeyTile& tile, int key) const {
      const int position = tile.begin + key;
      const CacheRow row = position < seqlen_k ? cache_row(cache, batch, position) : CacheRow{-1, 0};
      if (row.page >= 0) return {row.row, row.page};
      return {cache.block_table == nullptr ? cache.capacity : cache.page_size, 0};
    }
  };
  __device__ __forceinline__ Boxes boxes(const ForwardParams& /*params*/, int batch, int /*head*/,
                                         const QueryTile& /*queries*/, int seqlen_k) const {
    return {cache, batch, seqlen_k};
  }
};

}  // namespace chunkattn::cuda
