// Which backward kernel a call takes and what it works in. Pure host functions: the launchers, introspection and tests
// all ask here.
#pragma once

#include <cstddef>

#include "cuda/common/kernel_plan.h"
#include "params.h"

namespace chunkattn::cuda {

struct HeadGroups;

// compute_capability as major * 10 + minor; `aligned`: rows of q, k, v and dout start on multiples of 16 bytes.
// Throws std::invalid_argument where no kernel takes the head_dim.
KernelPlan plan_backward(const AttentionShape& shape, int compute_capability, bool aligned = true,
                         KernelChoice choice = KernelChoice::kAuto);

// The workspace of a call that is one group, laid out from `memory` on, and its size: without memory it tells the size
// alone. The memory starts on a multiple of 256 bytes.
BackwardWorkspace backward_workspace(const BackwardParams& params, bool deterministic, void* memory, size_t* bytes);

// What the largest of a call's groups needs.
size_t group_workspace_bytes(const BackwardParams& params, const HeadGroups& groups, bool deterministic);

}  // namespace chunkattn::cuda
