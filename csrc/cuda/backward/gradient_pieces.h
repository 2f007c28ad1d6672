// How the portable kernel keeps the float32 gradients with respect to a regime's queries: pieces of 8 rows by 8
// columns, [plane][row / 8][column / 8][8][8], rows and columns rounded up to whole pieces. Half of a 16 x 8 block of
// mma.sync's result is as large: the threads of a warp add to 256 contiguous bytes at a time, where rows as they are
// would be 8 times 32, each of which takes the load/store unit as long as 128. A tile may begin at any row; where that
// is not a multiple of 8, a warp's 256 bytes lie in two pieces.
#pragma once

#include "geometry.h"

namespace chunkattn::cuda {

struct GradientPieces {
  static constexpr int kRows = 8;
  static constexpr int kColumns = 8;
  static constexpr int kElements = kRows * kColumns;

  int rows;
  int head_dim;

  // From an element to the one kRows rows further on.
  CHUNKATTN_HOST_DEVICE int pitch() const { return (head_dim + kColumns - 1) / kColumns * kElements; }

  CHUNKATTN_HOST_DEVICE int64_t plane() const { return static_cast<int64_t>((rows + kRows - 1) / kRows) * pitch(); }

  // Of a row's first element. Its kColumns next ones lie kElements further on.
  CHUNKATTN_HOST_DEVICE int64_t offset(int64_t plane_index, int row) const {
    return plane_index * plane() + static_cast<int64_t>(row / kRows) * pitch() + row % kRows * kColumns;
  }
};

}  // namespace chunkattn::cuda
