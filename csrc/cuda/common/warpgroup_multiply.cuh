// Products of a warpgroup and tiles in shared memory (sm_90a). Each starts one group of wgmma; ptx::wgmma_wait says
// when its accumulators are valid.
#pragma once

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace chunkattn::cuda {

// Part of a group that is open: starts d += a b^T from the kFirst-th 16 columns on; with those first of all it can be
// d = a b^T. 64 rows of a, from `first_row` on, by all rows of b, along the rows of both.
template <typename T, int kFirst, int kBlocks, typename TileA, typename TileB>
__device__ __forceinline__ void add_rows_by_rows(float (&d)[kBlocks][4], const TileA& a, int first_row, const TileB& b,
                                                 bool add = true) {
  static_assert(TileA::kChunksPerRow == TileB::kChunksPerRow && TileB::kPanelBytes == kBlocks * 8 * 128);
  const uint64_t from_a = ptx::descriptor_k_major(a.base + first_row * 128);
  const uint64_t from_b = ptx::descriptor_k_major(b.base);
#pragma unroll
  for (int step = kFirst; step < TileA::kChunksPerRow / 2; ++step) {
    const int panel = step / 4, inside = step % 4 * 32;
    ptx::Wgmma<T, kBlocks * 8>::ss(d, from_a + (panel * TileA::kPanelBytes + inside) / 16,
                                   from_b + (panel * TileB::kPanelBytes + inside) / 16, add || step > 0);
  }
}

// Starts d = a b^T, or d += a b^T, as above.
template <typename T, bool kAdd = false, int kBlocks, typename TileA, typename TileB>
__device__ __forceinline__ void start_rows_by_rows(float (&d)[kBlocks][4], const TileA& a, int first_row,
                                                   const TileB& b) {
  ptx::wgmma_fence();
  add_rows_by_rows<T, 0>(d, a, first_row, b, kAdd);
  ptx::wgmma_commit();
}

// Starts d += a b: a in registers, as softmax.cuh packs it, b's rows one after the other. Of a the kCount steps of 16
// columns from `first` on, and as many rows of b.
template <typename T, int kCount, int kSteps, int kBlocks, typename Tile>
__device__ __forceinline__ void start_steps_by_rows(float (&d)[kBlocks][4], const uint32_t (&a)[kSteps][4],
                                                    const Tile& b, int first) {
  static_assert(Tile::kChunksPerRow == kBlocks && Tile::kPanelBytes == kSteps * 16 * 128);
  const uint64_t from_b = ptx::descriptor_n_major(b.base, Tile::kPanelBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = first; step < first + kCount; ++step) {
    ptx::Wgmma<T, kBlocks * 8>::rs(d, a[step], from_b + step * 16 * 128 / 16);
  }
  ptx::wgmma_commit();
}

// The same, of all of a.
template <typename T, int kSteps, int kBlocks, typename Tile>
__device__ __forceinline__ void start_operand_by_rows(float (&d)[kBlocks][4], const uint32_t (&a)[kSteps][4],
                                                      const Tile& b) {
  start_steps_by_rows<T, kSteps>(d, a, b, 0);
}

}  // namespace chunkattn::cuda
