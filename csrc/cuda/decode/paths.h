// What of a call of decoding may be read and written in 16-byte pieces. No CUDA types.
#pragma once

#include "cuda/common/vector_paths.h"

namespace chunkattn::cuda {

// What is false takes element-wise paths, slower and right for any stride, alignment and head_dim.
struct DecodePaths {
  bool q;  // pairs and table rows fall on whole pieces too
  bool cache;
  bool new_rows;  // and the cache, into which they go
  bool out;
};

inline bool cache_rows_aligned(const KeyValueCache& cache, const void* rows, const Strides& strides, int head_dim) {
  if (!cache.float8) return rows_aligned(rows, strides, head_dim);
  return is_aligned(rows) && head_dim % 16 == 0 && strides.batch % 16 == 0 && strides.seq % 16 == 0 &&
         strides.head % 16 == 0;
}

inline DecodePaths decode_paths(const DecodeParams& params) {
  const KeyValueCache& cache = params.cache;
  const bool rotation = rotation_aligned(params.rotary);
  const bool cache_rows = cache_rows_aligned(cache, cache.k, cache.k_strides, params.head_dim) &&
                          cache_rows_aligned(cache, cache.v, cache.v_strides, params.head_dim);
  return {rows_aligned(params.q, params.q_strides, params.head_dim) && rotation, cache_rows,
          cache_rows && rotation && rows_aligned(params.new_k, params.new_k_strides, params.head_dim) &&
              rows_aligned(params.new_v, params.new_v_strides, params.head_dim),
          rows_aligned(params.out, params.out_strides, params.head_dim)};
}

}  // namespace chunkattn::cuda
