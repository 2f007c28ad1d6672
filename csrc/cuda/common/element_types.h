// The 16-bit element types that kernels are instantiated for, as bits; numeric.cuh computes with them. CUDA's own come
// with headers of ten thousand lines, which every file would compile three times.
#pragma once

#include <cstdint>

namespace chunkattn::cuda {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace chunkattn::cuda
