// Rows on their way from one place to another: converted from one element type to another, rotated, added up.
// The loops are compiled in rows.cpp, for every pair of types that is asked for.
#pragma once

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "params.h"

namespace chunkattn::cpu {

// A stack of rows of head_dim elements.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;
};

// to[n] = factor * from[n] for n in [0, rows). They may be the same rows.
template <class From, class To>
void convert_rows(Rows<const From> from, Rows<To> to, int rows, int head_dim, Accumulator<From> factor = 1);

// sum += from[n] for n in [0, rows).
template <class From>
void add_rows(Rows<const From> from, int rows, int head_dim, Accumulator<From>* sum);

enum class RotationSense { kForward, kInverse };  // R(row) or its transpose

// row = R(table_row) row.
template <class Accum>
void rotate_row(Accum* row, const RotaryTable& table, int table_row, RotationSense sense);

// to[n] = factor * R(table_row(n)) from[n] for n in [0, rows). They may be the same rows.
template <class From, class To, class TableRow>
void rotate_rows(Rows<const From> from, Rows<To> to, int rows, int head_dim, const RotaryTable& table,
                 RotationSense sense, const TableRow& table_row, Accumulator<From> factor = 1) {
  using Accum = Accumulator<From>;
  constexpr int block = 16;  // rows, which stay in the first-level cache
  const Buffer<Accum> rotated(int64_t{head_dim} * std::min(block, rows));
  for (int begin = 0; begin < rows; begin += block) {
    const int count = std::min(block, rows - begin);
    convert_rows(Rows<const From>{from.data + begin * from.stride, from.stride}, Rows<Accum>{rotated.data(), head_dim},
                 count, head_dim, factor);
    for (int n = 0; n < count; ++n) rotate_row(rotated.data() + n * head_dim, table, table_row(begin + n), sense);
    convert_rows(Rows<const Accum>{rotated.data(), head_dim}, Rows<To>{to.data + begin * to.stride, to.stride}, count,
                 head_dim);
  }
}

}  // namespace chunkattn::cpu
