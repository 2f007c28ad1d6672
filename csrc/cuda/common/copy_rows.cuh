// Rows of 16-bit elements on their way from global to shared memory, as they are.
#pragma once

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/ptx/cp_async.cuh"

namespace chunkattn::cuda {

// Starts the copy of a tile's rows; rows from `valid` on and columns from `head_dim` on are filled with zeros. Called
// by all kThreads threads. Belongs to the group of copies that cp_async_commit closes.
template <int kThreads, typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void copy_rows_async(const RowTile<kRows, kHeadDim>& shared, const T* source, int64_t stride,
                                                int valid, int head_dim, bool vectorized) {
  constexpr int kChunksPerRow = kHeadDim / kChunk;
  constexpr int kPerThread = kRows * kChunksPerRow / kThreads;
  constexpr int kRowStep = kThreads / kChunksPerRow;
  static_assert(kPerThread * kThreads == kRows * kChunksPerRow && kRowStep * kChunksPerRow == kThreads);
  const int chunk = threadIdx.x % kChunksPerRow;
  const int first_row = threadIdx.x / kChunksPerRow;
  if (vectorized) {
    const T* pointer = source + first_row * stride + chunk * kChunk;
    const bool inside = chunk * kChunk < head_dim;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int row = first_row + i * kRowStep;
      ptx::cp_async_16(shared.address(row, chunk), pointer + i * kRowStep * stride, inside && row < valid);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kPerThread * kChunk; ++i) {
      const int row = first_row + i / kChunk * kRowStep;
      const int d = chunk * kChunk + i % kChunk;
      const T x = row < valid && d < head_dim ? source[row * stride + d] : from_float<T>(0.f);
      store_shared(shared.address(row, chunk) + i % kChunk * 2, reinterpret_cast<const uint16_t&>(x));
    }
  }
}

// The same for rows that do not follow one another: row i of the tile is `source`'s row `index_of(i)`.
template <int kThreads, typename T, int kRows, int kHeadDim, typename IndexOf>
__device__ __forceinline__ void copy_scattered_rows_async(const RowTile<kRows, kHeadDim>& shared, const T* source,
                                                          int64_t stride, int valid, int head_dim, bool vectorized,
                                                          IndexOf&& index_of) {
  constexpr int kChunksPerRow = kHeadDim / kChunk;
  constexpr int kRowStep = kThreads / kChunksPerRow;
  const int chunk = threadIdx.x % kChunksPerRow;
#pragma unroll 4
  for (int row = threadIdx.x / kChunksPerRow; row < kRows; row += kRowStep) {
    const bool inside = row < valid && chunk * kChunk < head_dim;
    const T* pointer = inside ? source + index_of(row) * stride + chunk * kChunk : source;
    if (vectorized) {
      ptx::cp_async_16(shared.address(row, chunk), pointer, inside);
    } else {
      for (int i = 0; i < kChunk; ++i) {
        const T x = inside && chunk * kChunk + i < head_dim ? pointer[i] : from_float<T>(0.f);
        store_shared(shared.address(row, chunk) + i * 2, reinterpret_cast<const uint16_t&>(x));
      }
    }
  }
}

}  // namespace chunkattn::cuda
