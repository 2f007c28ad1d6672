// Which forward kernel a call takes. Pure host functions: the launchers, introspection and tests all ask here.
#pragma once

#include <cstddef>

#include "params.h"

namespace chunkattn::cuda {

enum class KernelChoice {
  kAuto,      // the fastest that takes the call
  kPortable,  // mma.sync, every call
  kHopper,    // wgmma and TMA: compute capability 9.0, aligned rows of k and v
};

struct KernelPlan {
  const char* name;
  KernelChoice kind;  // kPortable or kHopper
  int tile_m;         // queries of a tile
  int tile_n;         // keys of a tile
  int warps;
  int stages;  // buffers of K and of V
  int head_dim_padded;
  size_t shared_memory;  // bytes per thread block for the tiles of Q, K and V
};

// compute_capability as major * 10 + minor; `aligned`: rows of k and v start on multiples of 16 bytes.
// Throws std::invalid_argument where no kernel takes the head_dim, or the chosen one does not take the call.
KernelPlan plan_forward(const AttentionShape& shape, int compute_capability, bool aligned = true,
                        KernelChoice choice = KernelChoice::kAuto);

}  // namespace chunkattn::cuda
