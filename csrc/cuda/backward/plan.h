// Which backward kernel a call takes and what it works in. Pure host functions: the launchers, introspection and tests
// all ask here.
#pragma once

#include "cuda/common/kernel_plan.h"
#include "params.h"

namespace chunkattn::cuda {

// compute_capability as major * 10 + minor; `aligned`: rows of q, k, v and dout start on multiples of 16 bytes.
// Throws std::invalid_argument where no kernel takes the head_dim.
KernelPlan plan_backward(const AttentionShape& shape, int compute_capability, bool aligned = true,
                         KernelChoice choice = KernelChoice::kAuto);

}  // namespace chunkattn::cuda
