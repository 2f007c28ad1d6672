// Conversions and fast functions for the 16-bit types the kernels take.
#pragma once

#include <cstdint>

#include "cuda/common/element_types.h"

namespace chunkattn::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float to_float(BFloat16 x) {
  float y;
#if __CUDA_ARCH__ >= 900
  asm("cvt.f32.bf16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
#else
  asm("mov.b32 %0, {0, %1};\n" : "=f"(y) : "h"(x.bits));
#endif
  return y;
}
__device__ __forceinline__ float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounded to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two values in one register, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;\n" : "=r"(pair) : "f"(low), "f"(high));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack2<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;\n" : "=r"(pair) : "f"(low), "f"(high));
  return pair;
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t pair) {
  T low, high;
  asm("mov.b32 {%0, %1}, %2;\n" : "=h"(low.bits), "=h"(high.bits) : "r"(pair));
  return {to_float(low), to_float(high)};
}
// The upper half of a float32. ptxas would take the halves apart before it shifts them.
template <>
__device__ __forceinline__ float2 unpack2<BFloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// 2^x in one instruction; 0 for x = -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace chunkattn::cuda
