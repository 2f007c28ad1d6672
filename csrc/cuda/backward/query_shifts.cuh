// Log-sum-exp and delta as part of the products that they are subtracted from (sm_90a).
//
// S^T = K Q^T and dP^T = V dO^T need a value for each query, a row of b. Read by threads, each value is loaded by all
// lanes that hold a part of the query's column: as much of shared memory's time as half of a product at head_dim 128.
// So the values are columns more of b, against which a has -1.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace chunkattn::cuda {

// In shared memory. Of 16 columns b has 8, twice: three bfloat16 whose sum is -x in float32, and a zero, of both
// values. Of a all rows are the same, and columns 8 to 15 are zero.
template <int kRows>
struct alignas(16) QueryShifts {
  static constexpr int kStages = 2;
  static constexpr int kCoreRows = 8;
  enum Which { kLogSumExp, kDelta };

  uint4 minus[2][kCoreRows];  // columns 0 to 7 of a, by Which
  uint4 zeros[2][kCoreRows];  // the others
  // Core by core, those of the stages in turn: memcheck takes an operand for 2048 bytes in one piece, which end in
  // shared memory so.
  uint4 values[kRows / kCoreRows][kStages][kCoreRows];
  uint64_t empty[kStages];  // they are full with the queries

  // What S is multiplied by, instead of the logits' scale: never so near zero that lse / scale is more than bfloat16
  // can be.
  static __device__ __forceinline__ float scale(float logit_scale) { return fmaxf(logit_scale, 1e-30f); }

  // One warp, before the products.
  __device__ __forceinline__ void init(int lane) {
    const uint4 of_first{0xbf80bf80u, 0x0000bf80u, 0, 0}, of_second{0, 0, 0xbf80bf80u, 0x0000bf80u};
    if (lane < kCoreRows) {
      minus[kLogSumExp][lane] = of_first;
      minus[kDelta][lane] = of_second;
      zeros[0][lane] = zeros[1][lane] = uint4{0, 0, 0, 0};
    }
    ptx::fence_async_proxy();
  }

  // lse: in units of the logits before scaling; +inf makes P zero.
  __device__ __forceinline__ void set(int stage, int row, float lse, float delta) {
    constexpr float kMost = 3e38f;  // with infinity the zeros of a would make NaN of dP
    const uint2 first = parts(lse > kMost ? kMost : lse), second = parts(delta);
    values[row / kCoreRows][stage][row % kCoreRows] = {first.x, first.y, second.x, second.y};
  }

  // Starts d = -x, part of the group that is open: the product is added to it.
  __device__ __forceinline__ void start(float (&d)[kRows / 8][4], Which which, int stage) const {
    constexpr uint32_t kCoreBytes = kCoreRows * sizeof(uint4);
    const uint64_t a = ptx::descriptor_of_cores(ptx::shared_address(minus[which]), 2 * kCoreBytes, 0);
    const uint64_t b = ptx::descriptor_of_cores(ptx::shared_address(values[0][stage]), 0, kStages * kCoreBytes);
    ptx::Wgmma<BFloat16, kRows>::ss(d, a, b, false);
  }

 private:
  static __device__ __forceinline__ uint2 parts(float x) {
    const float high = to_float(from_float<BFloat16>(x));
    const float middle = to_float(from_float<BFloat16>(x - high));
    return {pack2<BFloat16>(high, middle), pack2<BFloat16>(x - high - middle, 0.f)};
  }
};

}  // namespace chunkattn::cuda
