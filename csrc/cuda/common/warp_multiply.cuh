// A warp's part of a matrix product whose operands lie in shared memory, by mma.m16n8k16.
#pragma once

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/ptx/mma_sync.cuh"

namespace chunkattn::cuda {

// How an operand lies in its tile: its inner dimension, the one that is summed over, runs along the tile's rows or from
// row to row.
enum class Inner { kAlongRows, kDownRows };

// c += a b, where c is this warp's rows from `row` and columns from `column` on (layout: softmax.cuh), over kInner.
// Fragments are loaded eight instructions ahead or more, so that their latency hides behind them.
template <typename T, Inner kA, Inner kB, int kInner, int kSlabs, int kBlocks, typename TileA, typename TileB>
__device__ __forceinline__ void warp_multiply(float (&c)[kSlabs][kBlocks][4], const TileA& a_tile, int row,
                                              const TileB& b_tile, int column) {
  constexpr int kSteps = kInner / 16;
  constexpr int kPairs = kBlocks / 2;
  static_assert(kSteps * 16 == kInner && kPairs * 2 == kBlocks);
  static_assert((kSlabs & (kSlabs - 1)) == 0 && (kBlocks & (kBlocks - 1)) == 0,
                "RowTile::along wants bits of their own");
  constexpr int kAheadB = 4 / kSlabs > 0 ? 4 / kSlabs : 1;  // pairs
  constexpr int kAheadA = (kAheadB + kPairs - 1) / kPairs;  // steps
  const int lane = threadIdx.x % 32;
  const uint32_t first_a = kA == Inner::kAlongRows
                               ? a_tile.address(row + lane % 16, lane / 16)
                               : a_tile.address(lane % 8 + lane / 16 * 8, row / kChunk + lane / 8 % 2);
  const uint32_t first_b = kB == Inner::kAlongRows ? b_tile.address(column + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                                                   : b_tile.address(lane % 16, column / kChunk + lane / 16);
  uint32_t a[kAheadA + 1][kSlabs][4], b[kAheadB + 1][4];
  const auto load_a = [&](int step) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      if constexpr (kA == Inner::kAlongRows) {
        ptx::ldmatrix_x4(a[step % (kAheadA + 1)][slab], TileA::along(first_a, step * 2) + slab * 16 * TileA::kPitch);
      } else {
        ptx::ldmatrix_x4_trans(a[step % (kAheadA + 1)][slab],
                               TileA::along(first_a, slab * 2) + step * 16 * TileA::kPitch);
      }
    }
  };
  const auto load_b = [&](int step, int pair) {
    uint32_t (&fragment)[4] = b[(step * kPairs + pair) % (kAheadB + 1)];
    if constexpr (kB == Inner::kAlongRows) {
      ptx::ldmatrix_x4(fragment, TileB::along(first_b, step * 2) + pair * 16 * TileB::kPitch);
    } else {
      ptx::ldmatrix_x4_trans(fragment, TileB::along(first_b, pair * 2) + step * 16 * TileB::kPitch);
    }
  };
#pragma unroll
  for (int step = 0; step < kAheadA && step < kSteps; ++step) load_a(step);
#pragma unroll
  for (int index = 0; index < kAheadB && index < kSteps * kPairs; ++index) load_b(index / kPairs, index % kPairs);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step + kAheadA < kSteps) load_a(step + kAheadA);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int index = step * kPairs + pair, ahead = index + kAheadB;
      if (ahead < kSteps * kPairs) load_b(ahead / kPairs, ahead % kPairs);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint32_t (&left)[4] = a[step % (kAheadA + 1)][slab];
        const uint32_t (&right)[4] = b[index % (kAheadB + 1)];
        ptx::mma_m16n8k16<T>(c[slab][2 * pair], left, right[0], right[1]);
        ptx::mma_m16n8k16<T>(c[slab][2 * pair + 1], left, right[2], right[3]);
      }
    }
  }
}

// Writes a warp's accumulators, rounded to T, to their place in a tile.
template <typename T, int kSlabs, int kBlocks, typename Tile>
__device__ __forceinline__ void store_accumulators(const Tile& tile, const float (&c)[kSlabs][kBlocks][4], int row,
                                                   int column) {
  const int lane = threadIdx.x % 32;
  const uint32_t first = tile.address(row + lane / 4, column / kChunk) + lane % 4 * 4;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        store_shared(Tile::along(first, block) + (slab * 16 + half * 8) * Tile::kPitch,
                     pack2<T>(c[slab][block][2 * half], c[slab][block][2 * half + 1]));
      }
    }
  }
}

}  // namespace chunkattn::cuda
