// Which forward kernel a call takes. Pure host functions: the launchers, introspection and tests all ask here.
#pragma once

#include "cuda/common/kernel_plan.h"
#include "params.h"

namespace chunkattn::cuda {

// compute_capability as major * 10 + minor; `aligned`: rows of k and v start on multiples of 16 bytes;
// in select_merge those of q, too, and regions have a multiple of 8 tokens.
// Throws std::invalid_argument where no kernel takes the head_dim, or the chosen one does not take the call.
KernelPlan plan_forward(const AttentionShape& shape, int compute_capability, bool aligned = true,
                        KernelChoice choice = KernelChoice::kAuto);

}  // namespace chunkattn::cuda
