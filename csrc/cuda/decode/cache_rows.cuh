// Rows of the cache: where they lie, and new ones on their way into it.
#pragma once

#include "cuda/common/float8.cuh"
#include "cuda/common/rotary.cuh"
#include "params.h"

namespace chunkattn::cuda {

// What the cache's memory holds, as bits.
template <bool kFloat8>
struct CacheElement {
  using Bits = uint16_t;
};
template <>
struct CacheElement<true> {
  using Bits = uint8_t;
};

struct CacheRow {
  int page;  // -1: the block table has none
  int row;   // of the page
};

// Of a position below the capacity. Without a block table each sequence is a page.
__device__ __forceinline__ CacheRow cache_row(const KeyValueCache& cache, int batch, int position) {
  if (cache.block_table == nullptr) return {batch, position};
  const int index = position / cache.page_size;
  const int page = __ldg(cache.block_table + batch * cache.block_table_stride + index);
  return {page >= 0 && page < cache.num_pages ? page : -1, position - index * cache.page_size};
}

__device__ __forceinline__ int64_t cache_offset(const Strides& strides, const CacheRow& place, int head) {
  return place.page * strides.batch + place.row * strides.seq + head * strides.head;
}

template <typename T, bool kFloat8>
__device__ __forceinline__ typename CacheElement<kFloat8>::Bits cache_bits(float x, const float* factors, int head) {
  if constexpr (kFloat8) {
    return float8_of(factors == nullptr ? x : x / __ldg(factors + head));
  } else {
    const T rounded = from_float<T>(x);
    return reinterpret_cast<const uint16_t&>(rounded);
  }
}

// Element d of the new key (kKeys) or value of a position, as the cache holds it.
template <typename T, bool kFloat8, bool kKeys>
__device__ __forceinline__ typename CacheElement<kFloat8>::Bits new_element(const DecodeParams& params, int batch,
                                                                            int index, int position, int head, int d) {
  const Strides& strides = kKeys ? params.new_k_strides : params.new_v_strides;
  const T* row = static_cast<const T*>(kKeys ? params.new_k : params.new_v) + batch * strides.batch +
                 index * strides.seq + head * strides.head;
  const float x = kKeys ? rotated_element(row, d, params.rotary, params.geometry.key_row(position)) : to_float(row[d]);
  return cache_bits<T, kFloat8>(x, kKeys ? params.cache.k_scale : params.cache.v_scale, head);
}

}  // namespace chunkattn::cuda
