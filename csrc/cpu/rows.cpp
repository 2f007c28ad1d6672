#include "cpu/rows.h"

namespace chunkattn::cpu {
namespace {

// The first n cosines or sines of a table row.
template <class S>
CHUNKATTN_INLINE typename S::Vector load_angles(const float* from, int n) {
  if constexpr (std::is_same_v<S, Simd<float, sizeof(typename S::Vector)>>) {
    return load_partial<S>(from, n);
  } else {
    typename S::Vector angles = {};
    for (int lane = 0; lane < n; ++lane) angles[lane] = from[lane];
    return angles;
  }
}

// Rotates the pairs (d, d + pairs) for d in [0, n), n at most a vector. from may be to.
template <class S, class From, class To, class Accum>
CHUNKATTN_INLINE void rotate_halves(const From* from, To* to, const float* cos, const float* sin, int pairs, int n,
                                    Accum cos_factor, Accum sin_factor) {
  const auto c = load_angles<S>(cos, n) * cos_factor;
  const auto s = load_angles<S>(sin, n) * sin_factor;
  const auto first = load_partial<S>(from, n);
  const auto second = load_partial<S>(from + pairs, n);
  store_partial<S>(to, first * c - second * s, n);
  store_partial<S>(to + pairs, second * c + first * s, n);
}

// rotate_row, where cos and sin are the row of the table.
template <class S, class From, class To, class Accum>
CHUNKATTN_INLINE void rotate_loops(const From* from, To* to, int head_dim, const float* cos, const float* sin,
                                   int pairs, bool interleaved, RotationSense sense, Accum factor, Accum* scratch) {
  const Accum sin_factor = sense == RotationSense::kForward ? factor : -factor;
  if (interleaved) {
    convert_row<S>(from, scratch, head_dim, Accum(1));
    for (int d = 0; d < pairs; ++d) {
      const Accum c = cos[d] * factor;
      const Accum s = sin[d] * sin_factor;
      const Accum first = scratch[2 * d];
      const Accum second = scratch[2 * d + 1];
      scratch[2 * d] = first * c - second * s;
      scratch[2 * d + 1] = second * c + first * s;
    }
    convert_row<S>(scratch, to, 2 * pairs, Accum(1));
  } else {
    int d = 0;
    for (; d + S::kLanes <= pairs; d += S::kLanes) {
      rotate_halves<S>(from + d, to + d, cos + d, sin + d, pairs, S::kLanes, factor, sin_factor);
    }
    if (d < pairs) rotate_halves<S>(from + d, to + d, cos + d, sin + d, pairs, pairs - d, factor, sin_factor);
  }
  convert_row<S>(from + 2 * pairs, to + 2 * pairs, head_dim - 2 * pairs, factor);
}

}  // namespace

template <class From, class To>
void convert_rows(Rows<const From> from, Rows<To> to, int rows, int head_dim, Accumulator<From> factor) {
  vectorized(CHUNKATTN_LOOPS(bytes) {
    using S = Simd<Accumulator<From>, bytes>;
    for (int n = 0; n < rows; ++n) {
      convert_row<S>(from.data + n * from.stride, to.data + n * to.stride, head_dim, factor);
    }
  });
}

template <class From>
void add_rows(Rows<const From> from, int rows, int head_dim, Accumulator<From>* sum) {
  vectorized(CHUNKATTN_LOOPS(bytes) {
    for (int n = 0; n < rows; ++n) {
      add_row<Simd<Accumulator<From>, bytes>>(from.data + n * from.stride, sum, head_dim);
    }
  });
}

template <class From, class To>
void rotate_row(const From* from, To* to, int head_dim, const RotaryTable& table, int table_row, RotationSense sense,
                Accumulator<From> factor, Accumulator<From>* scratch) {
  const int64_t offset = table_row * table.row_stride;
  vectorized(CHUNKATTN_LOOPS(bytes) {
    rotate_loops<Simd<Accumulator<From>, bytes>>(from, to, head_dim, table.cos + offset, table.sin + offset,
                                                 table.rotary_dim / 2, table.interleaved, sense, factor, scratch);
  });
}

#define CHUNKATTN_ADD(From) template void add_rows(Rows<const From>, int, int, Accumulator<From>*)
#define CHUNKATTN_CONVERT(From, To) template void convert_rows(Rows<const From>, Rows<To>, int, int, Accumulator<From>)
#define CHUNKATTN_CONVERT_AND_ROTATE(From, To)                                                               \
  CHUNKATTN_CONVERT(From, To);                                                                               \
  template void rotate_row(const From*, To*, int, const RotaryTable&, int, RotationSense, Accumulator<From>, \
                           Accumulator<From>*)

CHUNKATTN_ADD(double);
CHUNKATTN_ADD(float);
CHUNKATTN_ADD(BFloat16);
CHUNKATTN_ADD(Float16);
// Between tensors, caches, operands and gradients.
CHUNKATTN_CONVERT_AND_ROTATE(double, double);
CHUNKATTN_CONVERT_AND_ROTATE(float, float);
CHUNKATTN_CONVERT_AND_ROTATE(float, BFloat16);
CHUNKATTN_CONVERT_AND_ROTATE(float, Float16);
CHUNKATTN_CONVERT_AND_ROTATE(float, Float8);
CHUNKATTN_CONVERT_AND_ROTATE(BFloat16, float);
CHUNKATTN_CONVERT_AND_ROTATE(BFloat16, BFloat16);
CHUNKATTN_CONVERT_AND_ROTATE(BFloat16, Float8);
CHUNKATTN_CONVERT_AND_ROTATE(Float16, float);
CHUNKATTN_CONVERT_AND_ROTATE(Float16, Float16);
CHUNKATTN_CONVERT_AND_ROTATE(Float16, Float8);
CHUNKATTN_CONVERT(Float8, float);
CHUNKATTN_CONVERT(Float8, BFloat16);

}  // namespace chunkattn::cpu
