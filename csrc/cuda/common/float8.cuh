// float8_e4m3fn elements, and their factors.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace chunkattn::cuda {

// The two elements in the lower half of `pair` as float16, which holds them exactly.
__device__ __forceinline__ uint32_t half2_of_float8(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  return halves;
#else
  // Exponent and mantissa where float16 has its own make 2^-8 of the element, subnormal ones too. Beyond the largest,
  // 448 * 2^-8 = 1.75, lies only what stands for NaN.
  const uint32_t bytes = __byte_perm(pair, 0, 0x1404);
  const uint32_t bits = (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u);
  const __half2 scaled = reinterpret_cast<const __half2&>(bits);
  const __half2 halves = __hmul2(scaled, __float2half2_rn(256.f));
  return reinterpret_cast<const uint32_t&>(halves) | __hgt2_mask(__habs2(scaled), __float2half2_rn(1.75f));
#endif
}

// Rounded to nearest; what is too large becomes the largest.
__device__ __forceinline__ uint8_t float8_of(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

}  // namespace chunkattn::cuda
