// Vectors, conversions between element types, and the choice of instruction set at run time.
//
// A function that runs its loops inside `vectorized` is compiled for AVX-512, AVX2 and the baseline, and the best one
// the processor has is taken; nothing else in the build asks for an instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Code run by `vectorized` must be inlined into it, or it would keep the instruction set of the build.
#define CHUNKATTN_INLINE inline __attribute__((always_inline))

// Every function that returns a vector is inlined, so no calling convention is involved.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace chunkattn::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What sums and the softmax of an element type are computed in.
template <class Element>
using Accumulator = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// Vectors of kBytes bytes of float or double.
template <class Accum, int kBytes>
struct Simd;

template <int kBytes>
struct Simd<float, kBytes> {
  static constexpr int kLanes = kBytes / 4;
  typedef float Vector __attribute__((vector_size(kBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
  typedef uint16_t HalfBits __attribute__((vector_size(kBytes / 2)));
};

template <int kBytes>
struct Simd<double, kBytes> {
  static constexpr int kLanes = kBytes / 8;
  typedef double Vector __attribute__((vector_size(kBytes)));
  typedef int64_t Ints __attribute__((vector_size(kBytes)));
};

// Rows of this many elements are whole vectors on every instruction set.
constexpr int kRowMultiple = 16;

constexpr int round_up_row(int n) { return (n + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }

template <class S, class Element>
CHUNKATTN_INLINE auto load(const Element* from) {
  if constexpr (std::is_same_v<Element, Accumulator<Element>>) {
    typename S::Vector value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  } else {
    typename S::HalfBits half;
    std::memcpy(&half, from, sizeof(half));
    const auto bits = __builtin_convertvector(half, typename S::Bits);
    if constexpr (std::is_same_v<Element, BFloat16>) {
      return (typename S::Vector)(bits << 16);
    } else {
      const auto magnitude = bits & 0x7fffu;
      const auto normal = (magnitude << 13) + (112u << 23);
      const auto subnormal =
          (typename S::Bits)(__builtin_convertvector((typename S::Ints)magnitude, typename S::Vector) * 0x1p-24f);
      const auto special = (magnitude << 13) + (224u << 23);  // infinity and NaN
      const auto finite = magnitude < 0x400u ? subnormal : normal;
      return (typename S::Vector)((magnitude < 0x7c00u ? finite : special) | ((bits & 0x8000u) << 16));
    }
  }
}

// Rounds to nearest, ties to even.
template <class S, class Element>
CHUNKATTN_INLINE void store(Element* to, const typename S::Vector& value) {
  if constexpr (std::is_same_v<Element, Accumulator<Element>>) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    const auto bits = (typename S::Bits)value;
    typename S::Bits rounded;
    if constexpr (std::is_same_v<Element, BFloat16>) {
      const typename S::Bits zero = {};
      const auto quiet = value == value ? bits : zero + 0x7fc00000u;  // rounding up could carry a NaN into the sign
      rounded = (quiet + (0x7fffu + ((quiet >> 16) & 1u))) >> 16;
    } else {
      const typename S::Bits zero = {};
      const auto magnitude = bits & 0x7fffffffu;
      const auto rebiased = magnitude - (112u << 23);
      const auto normal = (rebiased + (0xfffu + ((rebiased >> 13) & 1u))) >> 13;
      // The spacing of floats from 0.5 on is that of subnormal halves, so the addition rounds.
      const auto subnormal = (typename S::Bits)((typename S::Vector)magnitude + 0.5f) - 0x3f000000u;
      const auto finite = magnitude < 0x38800000u ? subnormal : normal;
      const auto special = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
      rounded = (magnitude < 0x47800000u ? finite : special) | ((bits >> 16) & 0x8000u);
    }
    const auto half = __builtin_convertvector(rounded, typename S::HalfBits);
    std::memcpy(to, &half, sizeof(half));
  }
}

// As store, but bfloat16 rounds ties away from zero, in half the instructions. For what was computed from bfloat16
// numbers: their NaNs have zeros in the lower half, which rounding cannot carry out of.
template <class S, class Element>
CHUNKATTN_INLINE void store_fast(Element* to, const typename S::Vector& value) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const auto half = __builtin_convertvector(((typename S::Bits)value + 0x8000u) >> 16, typename S::HalfBits);
    std::memcpy(to, &half, sizeof(half));
  } else {
    store<S>(to, value);
  }
}

// The first n elements of a vector; the others are zero.
template <class S, class Element>
CHUNKATTN_INLINE auto load_partial(const Element* from, int n) {
  Element buffer[S::kLanes] = {};
  std::memcpy(buffer, from, n * sizeof(Element));
  return load<S>(buffer);
}

template <class S, class Element>
CHUNKATTN_INLINE void store_partial(Element* to, const typename S::Vector& value, int n) {
  Element buffer[S::kLanes];
  store<S>(buffer, value);
  std::memcpy(to, buffer, n * sizeof(Element));
}

// to[i] = from[i] * factor
template <class S, class From, class To>
CHUNKATTN_INLINE void convert_row(const From* from, To* to, int n, Accumulator<From> factor) {
  int i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) store<S>(to + i, load<S>(from + i) * factor);
  if (i < n) store_partial<S>(to + i, load_partial<S>(from + i, n - i) * factor, n - i);
}

// to[i] += from[i]
template <class S, class From, class To>
CHUNKATTN_INLINE void add_row(const From* from, To* to, int n) {
  int i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) store<S>(to + i, load<S>(to + i) + load<S>(from + i));
  if (i < n) store_partial<S>(to + i, load_partial<S>(to + i, n - i) + load_partial<S>(from + i, n - i), n - i);
}

// Combines all lanes of a vector, by halves.
template <class S, class Combine>
CHUNKATTN_INLINE auto reduce_lanes(const typename S::Vector& values, const Combine& combine) {
  if constexpr (S::kLanes == 1) {
    return values[0];
  } else {
    using Half = Simd<std::remove_cvref_t<decltype(values[0])>, sizeof(values) / 2>;
    typename Half::Vector low, high;
    std::memcpy(&low, &values, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&values) + sizeof(low), sizeof(high));
    return reduce_lanes<Half>(combine(low, high), combine);
  }
}

template <class S>
CHUNKATTN_INLINE auto sum_lanes(const typename S::Vector& values) {
  return reduce_lanes<S>(values, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a + b; });
}

template <class S, class Element>
CHUNKATTN_INLINE auto dot_row(const Element* a, const Element* b, int n) {
  typename S::Vector sums = {};
  int i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) sums += load<S>(a + i) * load<S>(b + i);
  if (i < n) sums += load_partial<S>(a + i, n - i) * load_partial<S>(b + i, n - i);
  return sum_lanes<S>(sums);
}

// The polynomial with the given coefficients, highest power first.
template <class Vector, int count>
CHUNKATTN_INLINE Vector evaluate_polynomial(const Vector& x, const float (&coefficients)[count]) {
  Vector value = x * coefficients[0] + coefficients[1];
  for (int i = 2; i < count; ++i) value = value * x + coefficients[i];
  return value;
}

// 2^x for x up to 127, precise enough to be rounded to Result; for float, about one ulp. In float, what would be below
// the smallest normal number is 0. NaN stays NaN.
template <class S, class Result>
CHUNKATTN_INLINE typename S::Vector exp2_vector(const typename S::Vector& x) {
  if constexpr (std::is_same_v<Result, double>) {
    typename S::Vector power;
    for (int lane = 0; lane < S::kLanes; ++lane) power[lane] = std::exp2(x[lane]);
    return power;
  } else {
    // Floats of this size are spaced by 1, so the sum is rounded to an integer, whose low bits are the biased exponent.
    constexpr float shifter = 0x1.8p23f + 127.0f;
    const auto shifted = x + shifter;
    const auto f = x - (shifted - shifter);
    // Minimax polynomials of 2^f on [-1/2, 1/2], of relative error 3e-6 and 2e-9.
    typename S::Vector mantissa;
    if constexpr (sizeof(Result) == 2) {
      mantissa = evaluate_polynomial(f, {9.5828532e-3f, 5.5906426e-2f, 2.4024099e-1f, 6.9312419e-1f, 1.0f});
    } else {
      mantissa = evaluate_polynomial(
          f, {1.5353362e-4f, 1.3398875e-3f, 9.6184374e-3f, 5.5503325e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f});
    }
    const auto power = (typename S::Vector)((typename S::Bits)shifted << 23);
    const typename S::Vector zero = {};
    return x < -126.0f ? zero : mantissa * power;
  }
}

template <int kBytes>
using VectorBytes = std::integral_constant<int, kBytes>;

#if defined(__x86_64__)
enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

inline InstructionSet detect_instruction_set() {
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return InstructionSet::kAvx512;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has_avx2 ? InstructionSet::kAvx2 : InstructionSet::kBaseline;
}

template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void run_avx512(const Body& body) {
  body(VectorBytes<64>{});
}

template <class Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body) {
  body(VectorBytes<32>{});
}

template <class Body>
void vectorized(const Body& body) {
  static const InstructionSet best = detect_instruction_set();
  if (best == InstructionSet::kAvx512) {
    run_avx512(body);
  } else if (best == InstructionSet::kAvx2) {
    run_avx2(body);
  } else {
    body(VectorBytes<16>{});
  }
}
#else
template <class Body>
void vectorized(const Body& body) {
  body(VectorBytes<16>{});
}
#endif

// Begins the lambda that `vectorized` runs: vectorized(CHUNKATTN_LOOPS(bytes) { using S = Simd<float, bytes>; ... });
#define CHUNKATTN_LOOPS(bytes) [&](auto bytes) __attribute__((always_inline))

}  // namespace chunkattn::cpu
