// Rows on their way from one place to another: converted from one element type to another, rotated, added up.
// The loops are compiled in rows.cpp, for every pair of types that is asked for.
#pragma once

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

// to = factor * R(table_row) from. from may be to. Interleaved pairs go through `scratch` [head_dim].
template <class From, class To>
void rotate_row(const From* from, To* to, int head_dim, const RotaryTable& table, int table_row, RotationSense sense,
                Accumulator<From> factor, Accumulator<From>* scratch);

// to[n] = factor * R(table_row(n)) from[n] for n in [0, rows). They may be the same rows.
template <class From, class To, class TableRow>
void rotate_rows(Rows<const From> from, Rows<To> to, int rows, int head_dim, const RotaryTable& table,
                 RotationSense sense, const TableRow& table_row, Accumulator<From> factor = 1) {
  const Buffer<Accumulator<From>> scratch(table.interleaved ? head_dim : 0);
  for (int n = 0; n < rows; ++n) {
    rotate_row(from.data + n * from.stride, to.data + n * to.stride, head_dim, table, table_row(n), sense, factor,
               scratch.data());
  }
}

}  // namespace chunkattn::cpu
