// Buffers that producers fill and consumers free in turn, each with a pair of mbarriers.
#pragma once

#include "cuda/ptx/mbarrier.cuh"

namespace chunkattn::cuda {

// Position in a ring of buffers, with the parity of the current lap.
template <int kSize>
struct Ring {
  int index = 0;
  int lap = 0;

  __device__ __forceinline__ void advance() {
    if (++index == kSize) {
      index = 0;
      lap ^= 1;
    }
  }
  __device__ __forceinline__ void wait_full(uint64_t* full) const { ptx::mbarrier_wait(full + index, lap); }
  __device__ __forceinline__ void wait_empty(uint64_t* empty) const { ptx::mbarrier_wait(empty + index, lap ^ 1); }
};

}  // namespace chunkattn::cuda
