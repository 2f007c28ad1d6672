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

// The same of packed rows, for boxes that end where a sequence does, before their last row. Coordinates of a box whose
// first `count` rows, from `row` on, are the sequence's: (element, box_rows - count, head, row + count). What is behind
// them counts as outside the tensor. For that the map is one of windows of `box_rows` rows that begin at any row, the
// first of them so many rows before the tensor, where nothing is ever read.
const char* encode_window_map(CUtensorMap* map, const RowTensor& tensor, DataType dtype, int box_rows);

// Boxes of 64 rows by 32 elements of a contiguous float32 tensor [planes, rows, head_dim], in the same swizzle.
// Coordinates are (element, row, plane). head_dim is a multiple of 4.
const char* encode_gradient_map(CUtensorMap* map, float* data, int64_t planes, int rows, int head_dim);

// The same boxes, which end where a sequence does, as those of encode_window_map: coordinates are (element, 64 - count,
// plane, row + count).
const char* encode_gradient_window_map(CUtensorMap* map, float* data, int64_t planes, int rows, int head_dim);

}  // namespace chunkattn::cuda
