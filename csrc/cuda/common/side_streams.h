// Streams beside the caller's, for work that overlaps its own.
#pragma once

#include <cuda_runtime_api.h>

namespace chunkattn::cuda {

// Of the current device and the calling thread. They wait for nothing, also not for the default stream.
struct SideStreams {
  cudaStream_t eager;    // its thread blocks go first where others wait for room
  cudaStream_t patient;  // does not go before the caller's
  cudaEvent_t event;

  // Each returns null, or what failed.
  static const char* find(SideStreams* streams);
  // What comes to `follower` from now on waits for what is in `leader` now.
  const char* follow(cudaStream_t follower, cudaStream_t leader) const;
};

}  // namespace chunkattn::cuda
