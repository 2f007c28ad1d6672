#include "cuda/common/device.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <string>

#include "kernels.h"

namespace chunkattn::cuda {

namespace {

std::atomic<KernelChoice> forced_choice{KernelChoice::kAuto};

}  // namespace

const char* compute_capability(int* capability) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (major < 8) return "chunkattn's CUDA kernels need compute capability 8.0 or later";
  *capability = major * 10 + minor;
  return nullptr;
}

const char* multiprocessors(int* count) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

KernelChoice forced_kernel() { return forced_choice; }

const char* force_kernel(const char* name) {
  const std::string choice = name;
  if (choice == "auto") {
    forced_choice = KernelChoice::kAuto;
  } else if (choice == "portable") {
    forced_choice = KernelChoice::kPortable;
  } else if (choice == "hopper") {
    forced_choice = KernelChoice::kHopper;
  } else {
    return "name must be 'auto', 'portable' or 'hopper'";
  }
  return nullptr;
}

}  // namespace chunkattn::cuda
