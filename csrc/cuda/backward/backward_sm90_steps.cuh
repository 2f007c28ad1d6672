// What consumer warpgroups of the Hopper backward kernels make of a tile: S becomes P, dP becomes dS, in registers, and
// dS and dQ go to shared memory. Nothing here waits for anybody, or knows which keys and queries the tile has.
//
// Of S and dP a thread's rows are keys, its columns queries, taken in steps of 16: as many as one product along them
// takes.
#pragma once

#include "cuda/backward/tile_sizes.h"
#include "cuda/common/softmax.cuh"
#include "cuda/common/swizzled_tile.cuh"
#include "cuda/ptx/mma_sync.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace chunkattn::cuda {

template <typename T, int kHeadDim>
struct BackwardSm90Steps {
  using Sizes = BackwardSm90Tile<kHeadDim>;
  static constexpr int kTileM = Sizes::kTileM;
  static constexpr int kBlockKeys = Sizes::kTileN / Sizes::kClusterSize;
  static constexpr int kConsumers = 2;

  // dQ of a tile is cut among the warpgroups by rows where there are enough of them, otherwise by columns.
  static constexpr bool kCutRows = kTileM == kConsumers * 64;
  static constexpr int kQueryColumns = kCutRows ? kHeadDim : kHeadDim / (kConsumers * Sizes::kClusterSize);
  static_assert(kTileM == 64 || (kCutRows && Sizes::kClusterSize == 1));

  using QueryShared = PanelTile<kTileM, kHeadDim>;
  using KeyShared = PanelTile<kBlockKeys, kHeadDim>;
  using KeyColumns = PanelTile<kBlockKeys, kHeadDim / Sizes::kClusterSize>;  // of which a block adds dQ
  using LogitShared = PanelTile<kBlockKeys, kTileM>;                         // keys by queries
  using Logits = float[kTileM / 8][4];                                       // of 64 keys by kTileM queries
  using Operand = uint32_t[kTileM / 16][4];                                  // the same, rounded to T
  using KeyGradients = float[1][kHeadDim / 8][4];
  using QueryGradients = float[1][kQueryColumns / 8][4];

  // Of this thread's queries of a step of 16, which are neighbours in pairs. Where values lie that queries have: in the
  // order in which four lanes read two of their pairs at once.
  static __device__ __forceinline__ int per_query_index(int query) {
    return query / 16 * 16 + query % 8 / 2 * 4 + query / 8 % 2 * 2 + query % 2;
  }
  static __device__ __forceinline__ float4 per_query(const float (&values)[kTileM], int step, int thread) {
    return *reinterpret_cast<const float4*>(values + step * 16 + thread % 4 * 4);
  }
  // Of those, the one that belongs to element i of the step's first or second block.
  static __device__ __forceinline__ float of_query(const float4& pairs, int block, int i) {
    return block % 2 == 0 ? (i % 2 == 0 ? pairs.x : pairs.y) : (i % 2 == 0 ? pairs.z : pairs.w);
  }

  // S becomes P, of one step of 16 queries.
  static __device__ __forceinline__ void exponentiate(Logits& logits, int step, const float4& lse_log2,
                                                      float scale_log2) {
#pragma unroll
    for (int block = 2 * step; block < 2 * step + 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[block][i] = exp2_approx(logits[block][i] * scale_log2 - of_query(lse_log2, block, i));
      }
    }
  }

  // The same of all steps, of S that is shifted.
  static __device__ __forceinline__ void exponentiate(Logits& logits, float scale_log2) {
#pragma unroll
    for (int block = 0; block < kTileM / 8; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[block][i] = exp2_approx(logits[block][i] * scale_log2);
    }
  }

  static __device__ __forceinline__ void round(Operand& operand, const Logits& x) {
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) pack_operand<T>(operand[step], x, step);
  }

  // The way back, of one step.
  static __device__ __forceinline__ void unround(Logits& x, const uint32_t (&operand)[4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(operand[i]);
      x[2 * step + i / 2][i % 2 * 2] = pair.x;
      x[2 * step + i / 2][i % 2 * 2 + 1] = pair.y;
    }
  }

  // Of one step.
  static __device__ __forceinline__ void subtract_delta(Logits& ds, int step, const float4& delta) {
#pragma unroll
    for (int block = 2 * step; block < 2 * step + 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[block][i] -= of_query(delta, block, i);
    }
  }

  // What dP = V dO^T is added to where delta is read before.
  static __device__ __forceinline__ void set_minus_delta(Logits& ds, const float (&delta)[kTileM], int thread) {
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 8; ++i) ds[2 * step + i / 4][i % 4] = 0.f;
      subtract_delta(ds, step, per_query(delta, step, thread));
    }
  }

  // dP - delta becomes dS = P (dP - delta), without the logits' scale, rounded to T. Of one step.
  static __device__ __forceinline__ void differentiate(Operand& operand, const Logits& p, Logits& ds, int step) {
#pragma unroll
    for (int block = 2 * step; block < 2 * step + 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[block][i] *= p[block][i];
    }
    pack_operand<T>(operand[step], ds, step);
  }

  // The same of all steps.
  static __device__ __forceinline__ void differentiate(Operand& operand, const Logits& p, Logits& ds) {
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) differentiate(operand, p, ds, step);
  }

  // The same from P as it was rounded.
  static __device__ __forceinline__ void differentiate_rounded(Operand& operand, const Operand& p, Logits& ds,
                                                               int step) {
    Logits weights;
    unround(weights, p[step], step);
    differentiate(operand, weights, ds, step);
  }
  static __device__ __forceinline__ void differentiate_rounded(Operand& operand, const Operand& p, Logits& ds) {
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) differentiate_rounded(operand, p, ds, step);
  }

  // Where a thread's row of dS begins, of the warp's 16 keys from `key_row` on.
  static __device__ __forceinline__ uint32_t ds_row(const LogitShared& shared, int key_row, int thread) {
    const int lane = thread % 32;
    return shared.address(key_row + lane / 8 % 2 * 8 + lane % 8, lane / 16);
  }

  static __device__ __forceinline__ void store_ds(uint32_t row, const uint32_t (&ds)[4], int step) {
    // Two chunks further on in the row, as the panel permutes them: PanelTile::address().
    ptx::stmatrix_x4((row ^ (step % 4 * 32)) + step / 4 * LogitShared::kPanelBytes, ds);
  }
  static __device__ __forceinline__ void store_ds(uint32_t row, const Operand& ds) {
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) store_ds(row, ds[step], step);
  }

  // A warpgroup's part of dQ on its way: panels of 64 rows by 32 float32 elements, swizzled as PanelTile is, their
  // columns in the order of GradientRows.
  static constexpr int kGradientPanels = kQueryColumns / 32;
  static constexpr int kGradientPanelBytes = 64 * 128;

  // Writes this warpgroup's part of dQ to shared memory. Rows behind the tile's queries are zero. Of the 16 rows and
  // 8 columns that a warp stores at once, a lane has the address of a row's even columns or of its odd ones.
  static __device__ __forceinline__ void store_part(const QueryGradients& dq, uint32_t part, int thread) {
    const int lane = thread % 32;
    const uint32_t row =
        part + (thread / 32 * 16 + lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int block = 0; block < kQueryColumns / 8; ++block) {
      const float (&x)[4] = dq[0][block];
      // Two chunks further on in the row, as the panel permutes them: PanelTile::address().
      ptx::stmatrix_x4((row ^ (block % 4 * 32)) + block / 4 * kGradientPanelBytes,
                       {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
    }
  }

  // Starts this warpgroup's part of dS K, along the keys.
  static __device__ __forceinline__ void start_query_gradients(QueryGradients& dq, const LogitShared& ds,
                                                               const KeyShared& k, int warpgroup) {
    ptx::wgmma_fence();
    add_keys(dq, ds.base + (kCutRows ? warpgroup * LogitShared::kPanelBytes : 0),
             k.base + (kCutRows ? 0 : warpgroup * (kQueryColumns / 64) * KeyShared::kPanelBytes), false);
    ptx::wgmma_commit();
  }

  // What keys contribute to dQ: of dS from the panel at `ds` on, of K from that at `k` on.
  static __device__ __forceinline__ void add_keys(QueryGradients& dq, uint32_t ds, uint32_t k, bool add) {
    const uint64_t a = ptx::descriptor_n_major(ds, LogitShared::kPanelBytes);
    const uint64_t b = ptx::descriptor_n_major(k, KeyShared::kPanelBytes);
#pragma unroll
    for (int step = 0; step < kBlockKeys / 16; ++step) {
      constexpr int kStep = 16 * 128 / 16;
      ptx::Wgmma<T, kQueryColumns>::template ss<true>(dq[0], a + step * kStep, b + step * kStep, add || step > 0);
    }
  }
};

}  // namespace chunkattn::cuda
