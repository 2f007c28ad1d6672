// Which kernel a call takes and how it is launched. No CUDA types.
#pragma once

#include <cstddef>

namespace chunkattn::cuda {

enum class KernelChoice {
  kAuto,      // the fastest that takes the call
  kPortable,  // mma.sync, every call
  kHopper,    // wgmma and TMA: compute capability 9.0, aligned rows
};

struct KernelPlan {
  const char* name;
  KernelChoice kind;  // kPortable or kHopper
  int tile_m;         // queries of a tile
  int tile_n;         // keys of a tile
  int warps;
  int stages;  // buffers of what the main loop streams: K and V in the forward, Q in the backward
  int head_dim_padded;
  size_t shared_memory;  // bytes per thread block for the tiles
};

}  // namespace chunkattn::cuda
