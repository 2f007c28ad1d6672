// Fills the L2 cache of a GPU with lines of no use to a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace chunkattn::bench {

// Enqueues reads of all the bytes, a multiple of 16, aligned to 16. Reads leave clean lines in the cache: dirty ones
// would be written back during the call that is timed next. `sink` is a word the kernel might write to.
cudaError_t read_memory(const void* data, size_t bytes, unsigned* sink, cudaStream_t stream);

}  // namespace chunkattn::bench
