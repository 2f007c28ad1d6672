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

// Rotates the pairs (d, d + pairs) for d in [0, n), n at most a vector.
template <class S, class Accum>
CHUNKATTN_INLINE void rotate_halves(Accum* row, const float* cos, const float* sin, int pairs, int n, Accum sign) {
  const auto c = load_angles<S>(cos, n);
  const auto s = load_angles<S>(sin, n) * sign;
  const auto first = load_partial<S>(row, n);
  const auto second = load_partial<S>(row + pairs, n);
  store_partial<S>(row, first * c - second * s, n);
  store_partial<S>(row + pairs, second * c + first * s, n);
}

template <class S, class Accum>
CHUNKATTN_INLINE void rotate_pairs(Accum* row, const float* cos, const float* sin, int pairs, bool interleaved,
                                   Accum sign) {
  int d = 0;
  for (; interleaved && d < pairs; ++d) {
    const Accum c = cos[d];
    const Accum s = sin[d] * sign;
    const Accum first = row[2 * d];
    const Accum second = row[2 * d + 1];
    row[2 * d] = first * c - second * s;
    row[2 * d + 1] = second * c + first * s;
  }
  for (; d + S::kLanes <= pairs; d += S::kLanes) rotate_halves<S>(row + d, cos + d, sin + d, pairs, S::kLanes, sign);
  if (d < pairs) rotate_halves<S>(row + d, cos + d, sin + d, pairs, pairs - d, sign);
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

template <class Accum>
void rotate_row(Accum* row, const RotaryTable& table, int table_row, RotationSense sense) {
  const int64_t offset = table_row * table.row_stride;
  const Accum sign = sense == RotationSense::kForward ? 1 : -1;
  vectorized(CHUNKATTN_LOOPS(bytes) {
    rotate_pairs<Simd<Accum, bytes>>(row, table.cos + offset, table.sin + offset, table.rotary_dim / 2,
                                     table.interleaved, sign);
  });
}

#define CHUNKATTN_ADD(From) template void add_rows(Rows<const From>, int, int, Accumulator<From>*)
#define CHUNKATTN_ROTATE(Accum) template void rotate_row(Accum*, const RotaryTable&, int, RotationSense)
#define CHUNKATTN_CONVERT(From, To) template void convert_rows(Rows<const From>, Rows<To>, int, int, Accumulator<From>)

CHUNKATTN_ADD(double);
CHUNKATTN_ADD(float);
CHUNKATTN_ADD(BFloat16);
CHUNKATTN_ADD(Float16);
CHUNKATTN_ROTATE(double);
CHUNKATTN_ROTATE(float);
// Between tensors, caches, operands and gradients.
CHUNKATTN_CONVERT(double, double);
CHUNKATTN_CONVERT(float, float);
CHUNKATTN_CONVERT(float, BFloat16);
CHUNKATTN_CONVERT(float, Float16);
CHUNKATTN_CONVERT(float, Float8);
CHUNKATTN_CONVERT(BFloat16, float);
CHUNKATTN_CONVERT(BFloat16, BFloat16);
CHUNKATTN_CONVERT(BFloat16, Float8);
CHUNKATTN_CONVERT(Float16, float);
CHUNKATTN_CONVERT(Float16, Float16);
CHUNKATTN_CONVERT(Float16, Float8);
CHUNKATTN_CONVERT(Float8, float);
CHUNKATTN_CONVERT(Float8, BFloat16);

}  // namespace chunkattn::cpu
