#include <cuda_runtime.h>

#include "read_memory.h"

namespace chunkattn::bench {

namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* data, size_t count, unsigned* sink) {
  unsigned bits = 0;
  const size_t stride = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const uint4 words = data[i];
    bits |= words.x | words.y | words.z | words.w;
  }
  if (bits != 0) *sink = bits;  // or the compiler would drop the reads
}

}  // namespace

cudaError_t read_memory(const void* data, size_t bytes, unsigned* sink, cudaStream_t stream) {
  constexpr int kBlocks = 2048;  // several for every multiprocessor of any GPU
  read_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<const uint4*>(data), bytes / sizeof(uint4), sink);
  return cudaGetLastError();
}

}  // namespace chunkattn::bench
