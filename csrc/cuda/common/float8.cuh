// float8_e4m3fn elements, and their factors.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace chunkattn::cuda {

// The two elements in the lower half of `pair` as float16, which holds them exactly.
__device__ __forceinline__ uint32_t half2_of_float8(uint32_t pair) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return static_cast<uint32_t>(halves.x) | static_cast<uint32_t>(halves.y) << 16;
}

// Rounded to nearest; what is too large becomes the largest.
__device__ __forceinline__ uint8_t float8_of(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

}  // namespace chunkattn::cuda
