// Launches kernels that may start before the one they follow has ended, and wait for it themselves.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace chunkattn::cuda {

// Returns null, or what failed.
template <typename... Parameters, typename... Arguments>
const char* launch_step(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, bool dependent,
                        cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return "the call has too many rows for one launch";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace chunkattn::cuda
