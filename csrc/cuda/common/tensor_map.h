// Describes a tensor to the Hopper copy engine. Host code.
#pragma once

#include <cuda.h>

#include "params.h"

namespace chunkattn::cuda {

// A tensor [batch, rows, heads, head_dim] of 16-bit elements.
struct RowTensor {
  const void* data;
  Strides strides;
  int batch;
  int rows;
  int heads;
  int head_dim;
};

// Boxes of `box_rows` rows by 64 elements of one head, in the 128-byte swizzle of PanelTile. Coordinates are (element,
// row, head, batch row). Rows must be aligned (vector_paths.h). Returns null, or what failed.
const char* encode_row_map(CUtensorMap* map, const RowTensor& tensor, DataType dtype, int box_rows);

// Boxes of 64 rows by 32 elements of a contiguous float32 tensor [planes, rows, head_dim], in the same swizzle.
// Coordinates are (element, row, plane). head_dim is a multiple of 4.
const char* encode_gradient_map(CUtensorMap* map, float* data, int64_t planes, int rows, int head_dim);

}  // namespace chunkattn::cuda
