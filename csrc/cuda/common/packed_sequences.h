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

}  // namespace chunkattn::cuda
