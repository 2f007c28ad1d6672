// Describes a key or value tensor to the Hopper copy engine. Host code.
#pragma once

#include <cuda.h>

#include "params.h"

namespace chunkattn::cuda {

// Boxes of `box_rows` tokens by 64 elements of one head, in the 128-byte swizzle of PanelTile. Coordinates are
// (element, token, KV head, batch row). Rows must be aligned (vector_paths.h). Returns null, or what failed.
const char* encode_key_map(CUtensorMap* map, const void* data, const Strides& strides, const AttentionShape& shape,
                           DataType dtype, int box_rows);

}  // namespace chunkattn::cuda
