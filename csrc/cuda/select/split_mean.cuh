// A semantic token as the tensor cores take it: scaled by a power of two, and cut into two float16.
#pragma once

#include <cfloat>

#include "cuda/common/rotary.cuh"

namespace chunkattn::cuda {

// Of what is finite.
template <int kHeadDim>
__device__ __forceinline__ float largest_magnitude(const float (&mean)[kChunk]) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float magnitude = fabsf(mean[i]);
    if (magnitude <= FLT_MAX) largest = fmaxf(largest, magnitude);
  }
#pragma unroll
  for (int distance = 1; distance < kHeadDim / kChunk; distance *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  return largest;
}

// The power of two that brings a magnitude to 2^14 and above, within float16 and far from its smallest numbers.
__device__ __forceinline__ float scale_for(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
  const int scale = 127 + 14 - (exponent - 127);
  return __uint_as_float(static_cast<unsigned>(scale < 254 ? scale : 254) << 23);
}

// An infinite mean goes to the second part alone, which is only multiplied by first parts: those have the sign of what
// they stand for.
__device__ __forceinline__ void split_mean(uint4* first, uint4* second, const float (&mean)[kChunk], float scale) {
  float high[kChunk], low[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float x = mean[i] * scale;
    high[i] = fabsf(x) == INFINITY ? 0.f : to_float(from_float<Float16>(x));
    low[i] = x - high[i];
  }
  *first = pack8<Float16>(high);
  *second = pack8<Float16>(low);
}

}  // namespace chunkattn::cuda
