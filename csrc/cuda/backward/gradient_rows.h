// How the Hopper kernels keep the float32 gradients with respect to a regime's queries: rows,
// [plane][row][head_dim], head_dim a multiple of 8 (vector_paths.h). Of eight columns the even ones come first:
// stmatrix stores a 16-byte row from four lanes, and each of them holds an even column and the odd one behind it.
#pragma once

#include "geometry.h"

namespace chunkattn::cuda {

struct GradientRows {
  static constexpr int kColumns = 8;

  int rows;
  int head_dim;

  // Of a row's first element.
  CHUNKATTN_HOST_DEVICE int64_t offset(int64_t plane_index, int row) const {
    return (plane_index * rows + row) * head_dim;
  }

  // From there to a column's.
  CHUNKATTN_HOST_DEVICE static int place(int column) {
    return column / kColumns * kColumns + column % 2 * (kColumns / 2) + column % kColumns / 2;
  }
};

}  // namespace chunkattn::cuda
