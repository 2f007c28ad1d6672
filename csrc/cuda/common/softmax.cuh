// Online softmax over a row tile held in tensor-core accumulators.
//
// mma.sync and wgmma leave the same layout: of a 16-row slab each thread holds two rows, lane / 4 and lane / 4 + 8, and
// of each 8-column block two neighbouring columns. A row is thus shared by the four lanes of a quad. Accumulators are
// [slab][column block][4], elements 0 and 1 in the first row, 2 and 3 in the second.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/numeric.cuh"
#include "params.h"

namespace chunkattn::cuda {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What the logits of a batch row are multiplied by.
__device__ __forceinline__ float logit_scale(const ForwardParams& params, int batch) {
  return static_cast<float>(params.scale) * (params.temperature == nullptr ? 1.f : params.temperature[batch]);
}

// The a operand of P V for 16 keys: neighbouring accumulators, rounded to T.
template <typename T, int kBlocks>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&p)[kBlocks][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* pair = &p[2 * step + i / 2][i % 2 * 2];
    a[i] = pack2<T>(pair[0], pair[1]);
  }
}

template <int kSlabs>
struct OnlineSoftmax {
  static constexpr float kSlackLog2 = 8.f;

  float row_max[kSlabs][2];  // of the logits before scaling
  float row_sum[kSlabs][2];  // this thread's share; finish() adds the quad's four

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      row_max[slab][0] = row_max[slab][1] = -INFINITY;
      row_sum[slab][0] = row_sum[slab][1] = 0.f;
    }
  }

  // A thread's rows lane / 4 (kHalf 0) or lane / 4 + 8 (kHalf 1): moves their maxima up to those of the logits, and
  // writes the factor by which what was accumulated so far must shrink. Returns whether a row shrinks at all: a maximum
  // is only moved when its row outgrows it by 2^kSlackLog2, so after the first tiles hardly ever. Which maximum is
  // subtracted does not change the result, and float32 sums and 16-bit weights have that much room.
  template <int kHalf, int kBlocks>
  __device__ __forceinline__ bool raise_maximum(const float (&logits)[kSlabs][kBlocks][4], float scale_log2,
                                                float (&shrink)[kSlabs][2]) {
    bool grown = false;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      float even = logits[slab][0][2 * kHalf], odd = logits[slab][0][2 * kHalf + 1];
#pragma unroll
      for (int block = 1; block < kBlocks; ++block) {
        even = fmaxf(even, logits[slab][block][2 * kHalf]);
        odd = fmaxf(odd, logits[slab][block][2 * kHalf + 1]);
      }
      const float maximum = quad_max(fmaxf(even, odd));
      const float previous = row_max[slab][kHalf];
      const bool moves = (maximum - previous) * scale_log2 > kSlackLog2;
      grown |= moves;
      if (moves) row_max[slab][kHalf] = maximum;
      shrink[slab][kHalf] = moves ? exp2_approx((previous - maximum) * scale_log2) : 1.f;
      row_sum[slab][kHalf] *= shrink[slab][kHalf];
    }
    return grown;
  }

  // Replaces the rows' logits by exp(scale * (logit - row maximum)) and adds them up. A row may have seen no key at all
  // yet: its maximum is -inf.
  template <int kHalf, int kBlocks>
  __device__ __forceinline__ void exponentiate(float (&logits)[kSlabs][kBlocks][4], float scale_log2) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const float offset = row_max[slab][kHalf] == -INFINITY ? 0.f : row_max[slab][kHalf] * scale_log2;
      float odd_sum = 0.f;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = logits[slab][block][2 * kHalf + i];
          x = exp2_approx(x * scale_log2 - offset);
          (i == 0 ? row_sum[slab][kHalf] : odd_sum) += x;
        }
      }
      row_sum[slab][kHalf] += odd_sum;
    }
  }

  // Everything for all rows. Returns whether any row of the warp shrinks.
  template <int kBlocks>
  __device__ __forceinline__ bool update(float (&logits)[kSlabs][kBlocks][4], float scale_log2,
                                         float (&shrink)[kSlabs][2]) {
    const bool grown[2] = {raise_maximum<0>(logits, scale_log2, shrink), raise_maximum<1>(logits, scale_log2, shrink)};
    exponentiate<0>(logits, scale_log2);
    exponentiate<1>(logits, scale_log2);
    return __any_sync(0xffffffffu, grown[0] | grown[1]);
  }

  // Writes the factor that normalises the output and the log-sum-exp, for rows that saw no key 0 and -inf.
  __device__ __forceinline__ void finish(float scale_log2, float (&normalise)[kSlabs][2], float (&lse)[kSlabs][2]) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(row_sum[slab][half]);
        const bool empty = row_max[slab][half] == -INFINITY;
        normalise[slab][half] = empty ? 0.f : 1.f / sum;
        lse[slab][half] = empty ? -INFINITY : row_max[slab][half] * (scale_log2 * kLn2) + logf(sum);
      }
    }
  }
};

template <int kSlabs, int kBlocks>
__device__ __forceinline__ void scale_rows(float (&accumulators)[kSlabs][kBlocks][4],
                                           const float (&factor)[kSlabs][2]) {
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) accumulators[slab][block][i] *= factor[slab][i / 2];
    }
  }
}

}  // namespace chunkattn::cuda
