// The softmax of a row over part of its keys, in bits (base 2), and how parts make up the whole.
//
// With it goes the row's sum of 2^(logit - maximum) times the value. Over disjoint parts of the keys, sum and values of
// each part count with weight_in(maximum over all); the output is the quotient of both, whatever the maxima were.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/numeric.cuh"

namespace chunkattn::cuda {

struct __align__(8) SoftmaxState {
  float maximum;  // -inf: no key
  float sum;      // of 2^(logit - maximum)

  __device__ __forceinline__ float weight_in(float whole_maximum) const {
    return maximum == -INFINITY ? 0.f : exp2_approx(maximum - whole_maximum);
  }
  __device__ __forceinline__ float normalise() const { return maximum == -INFINITY ? 0.f : 1.f / sum; }
  __device__ __forceinline__ float log_sum_exp() const {  // natural logarithm
    return maximum == -INFINITY ? -INFINITY : maximum * kLn2 + logf(sum);
  }
};

// Of parts that lie `stride` apart.
__device__ __forceinline__ SoftmaxState whole_state(const SoftmaxState* parts, int count, int stride = 1) {
  SoftmaxState whole{-INFINITY, 0.f};
#pragma unroll
  for (int i = 0; i < count; ++i) whole.maximum = fmaxf(whole.maximum, parts[i * stride].maximum);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    whole.sum += parts[i * stride].sum * parts[i * stride].weight_in(whole.maximum);
  }
  return whole;
}

}  // namespace chunkattn::cuda
