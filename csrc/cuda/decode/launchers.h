// The launchers of decoding: those that the instantiation files define, one file per element type and head_dim, and
// those of what runs before.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/decode/paths.h"
#include "cuda/decode/plan.h"
#include "params.h"

namespace chunkattn::cuda {

// Each returns null, or a sentence that says what failed.
template <typename T, int kHeadDim>
const char* launch_decode(const DecodeParams& params, const DecodeWorkspace& workspace, const DecodePaths& paths,
                          const DecodePlan& plan, bool dependent_launch, cudaStream_t stream);

const char* launch_append(const DecodeParams& params, cudaStream_t stream);

// Writes the results of queries that lie before the first token of their sequence and see nothing.
const char* launch_clear_unseeing(const DecodeParams& params, cudaStream_t stream);

// Whether the forward kernel takes the call, and both steps of it. The kernels of decoding give the same results.
bool is_prefill(const DecodeParams& params, const DecodeDevice& device, const DecodePaths& paths);
const char* launch_prefill(const DecodeParams& params, const DecodeWorkspace& workspace, const DecodeDevice& device,
                           cudaStream_t stream);

}  // namespace chunkattn::cuda
