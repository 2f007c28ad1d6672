// The steps of the backward, and the launchers that the instantiation files define, one file per kernel, element type
// and head_dim. Keys are rotated: params.forward.k_rotated is true.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/backward/plan.h"
#include "cuda/common/vector_paths.h"
#include "cuda/select_merge/attended_regions.h"
#include "params.h"

namespace chunkattn::cuda {

// Each returns null, or a sentence that says what failed. The steps around the main loop have at most so many thread
// blocks.

// Clears what workspace.zeroed says.
const char* launch_clear(const BackwardWorkspace& workspace, int most_blocks, cudaStream_t stream);

// Writes delta and the rotated queries.
const char* launch_prepare(const BackwardParams& params, const BackwardWorkspace& workspace,
                           const BackwardVectorPaths& vectorized, int most_blocks, cudaStream_t stream);

// Writes dk and dv, and adds to the regimes' dq, which must be zero.
template <typename T, int kHeadDim>
const char* launch_backward_sm80(const BackwardParams& params, const BackwardWorkspace& workspace,
                                 const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream);

// The same; needs vectorized.main_loop().
template <typename T, int kHeadDim>
const char* launch_backward_sm90(const BackwardParams& params, const BackwardWorkspace& workspace,
                                 const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream);

// The same of select-and-merge attention, its params made by group_attention(): adds to the sums instead of writing dk
// and dv, and to dq of regime intra, which all regimes are. The Hopper kernel needs regions of a multiple of 8 tokens,
// too.
template <typename T, int kHeadDim>
const char* launch_region_backward_sm80(const BackwardParams& params, const BackwardWorkspace& workspace,
                                        const AttendedRegions& regions, const KeyGradientSums& sums,
                                        const BackwardVectorPaths& vectorized, const KernelPlan& plan,
                                        cudaStream_t stream);
template <typename T, int kHeadDim>
const char* launch_region_backward_sm90(const BackwardParams& params, const BackwardWorkspace& workspace,
                                        const AttendedRegions& regions, const KeyGradientSums& sums,
                                        const BackwardVectorPaths& vectorized, const KernelPlan& plan,
                                        cudaStream_t stream);

// Writes dq, the sum of the regimes' rotated back. workspace.dq_in_pieces is true behind launch_backward_sm80.
const char* launch_finish(const BackwardParams& params, const BackwardWorkspace& workspace,
                          const BackwardVectorPaths& vectorized, int most_blocks, cudaStream_t stream);

// Writes dk and dv, the sums rounded.
const char* launch_round_key_gradients(const BackwardParams& params, const KeyGradientSums& sums, cudaStream_t stream);

}  // namespace chunkattn::cuda
