// The rotated copy of raw keys, which the main loops of forward and backward read.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace chunkattn::cuda {

// rotate_keys of kernels.h, by at most so many thread blocks. Returns null, or what failed.
const char* launch_rotate_keys(const ForwardParams& params, void* rotated, const Strides& rotated_strides,
                               int most_blocks, cudaStream_t stream);

}  // namespace chunkattn::cuda
