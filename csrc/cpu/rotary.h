// Rotary rotation of rows, with conversion from one element type to another.
#pragma once

#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "params.h"

namespace chunkattn::cpu {

enum class RotationSense { kForward, kInverse };  // R(row) or its transpose

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

// to = factor * R(row) from, where cos and sin are the row. from may be to. Interleaved pairs go through `scratch`
// [head_dim].
template <class S, class From, class To, class Accum>
CHUNKATTN_INLINE void rotate_row(const From* from, To* to, int head_dim, const float* cos, const float* sin, int pairs,
                                 bool interleaved, RotationSense sense, Accum factor, Accum* scratch) {
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

// A stack of rows of head_dim elements.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;
};

// to[n] = factor * from[n] for n in [0, rows). They may be the same rows.
template <class From, class To>
void convert_rows(Rows<const From> from, Rows<To> to, int rows, int head_dim, Accumulator<From> factor = 1) {
  vectorized(CHUNKATTN_LOOPS(bytes) {
    using S = Simd<Accumulator<From>, bytes>;
    for (int n = 0; n < rows; ++n) {
      convert_row<S>(from.data + n * from.stride, to.data + n * to.stride, head_dim, factor);
    }
  });
}

// to[n] = factor * R(table_row(n)) from[n] for n in [0, rows). They may be the same rows.
template <class From, class To, class TableRow>
void rotate_rows(Rows<const From> from, Rows<To> to, int rows, int head_dim, const RotaryTable& table,
                 RotationSense sense, const TableRow& table_row, Accumulator<From> factor = 1) {
  using Accum = Accumulator<From>;
  const Buffer<Accum> scratch(table.interleaved ? head_dim : 0);
  vectorized(CHUNKATTN_LOOPS(bytes) {
    for (int n = 0; n < rows; ++n) {
      const int64_t offset = table_row(n) * table.row_stride;
      rotate_row<Simd<Accum, bytes>>(from.data + n * from.stride, to.data + n * to.stride, head_dim, table.cos + offset,
                                     table.sin + offset, table.rotary_dim / 2, table.interleaved, sense, factor,
                                     scratch.data());
    }
  });
}

}  // namespace chunkattn::cpu
