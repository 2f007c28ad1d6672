// A warp's part of a matrix product whose operands lie in shared memory, by mma.m16n8k16.
#pragma once

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/ptx/mma_sync.cuh"

namespace chunkattn::cuda {

// How an operand lies in its tile: its inner dimension, the one that is summed over, runs along the tile's rows or from
// row to row.
enum class Inner { kAlongRows, kDownRows };

// c += a b, where c is this warp's rows from `row` and columns from `column` on (layout: softmax.cuh), over kInner.
// Fragments are loaded one product ahead, so that their latency hides behind it.
template <typename T, Inner kA, Inner kB, int kInner, int kSlabs, int kBlocks, typename TileA, typename TileB>
__device__ __forceinline__ void warp_multiply(float (&c)[kSlabs][kBlocks][4], const TileA& a_tile, int row,
                                              const TileB& b_tile, int column) {
  constexpr int kSteps = kInner / 16;
  constexpr int kPairs = kBlocks / 2;
  static_assert(kSteps * 16 == kInner && kPairs * 2 == kBlocks);
  const int lane = threadIdx.x % 32;
  uint32_t a[2][kSlabs][4], b[2][4];
  const auto load_a = [&](int step) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      if constexpr (kA == Inner::kAlongRows) {
        ptx::ldmatrix_x4(a[step % 2][slab], a_tile.address(row + slab * 16 + lane % 16, step * 2 + lane / 16));
      } else {
        ptx::ldmatrix_x4_trans(a[step % 2][slab], a_tile.address(step * 16 + lane % 8 + lane / 16 * 8,
                                                                 row / kChunk + slab * 2 + lane / 8 % 2));
      }
    }
  };
  const auto load_b = [&](int index) {
    const int step = index / kPairs, pair = index % kPairs;
    if constexpr (kB == Inner::kAlongRows) {
      ptx::ldmatrix_x4(b[index % 2],
                       b_tile.address(column + pair * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
    } else {
      ptx::ldmatrix_x4_trans(b[index % 2],
                             b_tile.address(step * 16 + lane % 16, column / kChunk + pair * 2 + lane / 16));
    }
  };
  load_a(0);
  load_b(0);
#pragma unroll
  for (int index = 0; index < kSteps * kPairs; ++index) {
    const int step = index / kPairs, pair = index % kPairs;
    if (pair + 1 == kPairs && step + 1 < kSteps) load_a(step + 1);
    if (index + 1 < kSteps * kPairs) load_b(index + 1);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      ptx::mma_m16n8k16<T>(c[slab][2 * pair], a[step % 2][slab], b[index % 2][0], b[index % 2][1]);
      ptx::mma_m16n8k16<T>(c[slab][2 * pair + 1], a[step % 2][slab], b[index % 2][2], b[index % 2][3]);
    }
  }
}

// Writes a warp's accumulators, rounded to T, to their place in a tile.
template <typename T, int kSlabs, int kBlocks, typename Tile>
__device__ __forceinline__ void store_accumulators(const Tile& tile, const float (&c)[kSlabs][kBlocks][4], int row,
                                                   int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        store_shared(tile.address(row + slab * 16 + half * 8 + lane / 4, column / kChunk + block) + lane % 4 * 4,
                     pack2<T>(c[slab][block][2 * half], c[slab][block][2 * half + 1]));
      }
    }
  }
}

}  // namespace chunkattn::cuda
