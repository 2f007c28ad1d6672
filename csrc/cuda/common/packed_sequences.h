// What runs before kernels attend to packed sequences, whose lengths the device alone knows.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace chunkattn::cuda {

// Each returns null, or a sentence that says what failed.

// Fills in params.sequence_tiles for query tiles of `tile_m`, and writes the results of queries that see nothing.
const char* launch_packed_queries(const ForwardParams& params, int tile_m, cudaStream_t stream);

// Fills in workspace.sequence_tiles for key tiles of `tile_n`, and clears the gradients of keys that nobody sees.
const char* launch_packed_keys(const BackwardParams& params, const BackwardWorkspace& workspace, int tile_n,
                               cudaStream_t stream);

// The sequence that a row of a packed tensor belongs to, by the offsets of all `batch` sequences. Where the offsets are
// no offsets the row need not lie in it.
CHUNKATTN_HOST_DEVICE int sequence_of_row(const int* cu_seqlens, int batch, int row) {
  int begin = 0, end = batch;
  while (end - begin > 1) {
    const int middle = begin + (end - begin) / 2;
    (cu_seqlens[middle] <= row ? begin : end) = middle;
  }
  return begin;
}

}  // namespace chunkattn::cuda
