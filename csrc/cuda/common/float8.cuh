// float8_e4m3fn elements, and their factors.
#pragma once

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
  uint32_t halves, magnitudes, is_nan;
  asm("mul.f16x2 %0, %1, %2;\n" : "=r"(halves) : "r"(bits), "r"(0x5c005c00u));  // 256
  asm("abs.f16x2 %0, %1;\n" : "=r"(magnitudes) : "r"(bits));
  asm("set.gt.u32.f16x2 %0, %1, %2;\n" : "=r"(is_nan) : "r"(magnitudes), "r"(0x3f003f00u));  // 1.75
  return halves | is_nan;
#endif
}

// Rounded to nearest, ties to even; what is too large becomes the largest.
__device__ __forceinline__ uint8_t float8_of(float x) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;\n" : "=h"(pair) : "f"(x), "f"(0.f));
  return static_cast<uint8_t>(pair);
#else
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;                                    // NaN
  const uint32_t clamped = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
  const uint32_t rebiased = clamped - (120u << 23);
  const uint32_t normal = (rebiased + 0x7ffffu + (rebiased >> 20 & 1)) >> 20;
  // The spacing of floats from 2^14 on is that of subnormals, below 2^-6, so the addition rounds.
  const uint32_t subnormal = __float_as_uint(__uint_as_float(clamped) + 0x1p14f) - 0x46800000u;
  return static_cast<uint8_t>((clamped < 0x3c800000u ? subnormal : normal) | (bits >> 24 & 0x80u));
#endif
}

}  // namespace chunkattn::cuda
