// Picks the forward kernel and its instantiation for a call.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <string>

#include "cuda/forward/launchers.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

std::atomic<KernelChoice> forced_choice{KernelChoice::kAuto};

template <typename T, int kHeadDim>
const char* launch(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                   cudaStream_t stream) {
  return plan.kind == KernelChoice::kHopper ? launch_forward_sm90<T, kHeadDim>(params, vectorized, plan, stream)
                                            : launch_forward_sm80<T, kHeadDim>(params, vectorized, plan, stream);
}

template <typename T>
const char* launch(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                   cudaStream_t stream) {
  switch (plan.head_dim_padded) {
    case 64:
      return launch<T, 64>(params, vectorized, plan, stream);
    case 128:
      return launch<T, 128>(params, vectorized, plan, stream);
    case 256:
      return launch<T, 256>(params, vectorized, plan, stream);
    default:
      return "no forward kernel is compiled for this head_dim";
  }
}

}  // namespace

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

const char* dca_forward(const ForwardParams& params, void* stream) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (major < 8) return "chunkattn's CUDA kernels need compute capability 8.0 or later";
  const VectorPaths vectorized = vector_paths(params);
  const KernelPlan plan = plan_forward(params.shape, major * 10 + minor, vectorized.k && vectorized.v, forced_choice);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DataType::kBFloat16:
      return launch<__nv_bfloat16>(params, vectorized, plan, cuda_stream);
    case DataType::kFloat16:
      return launch<__half>(params, vectorized, plan, cuda_stream);
    default:
      return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
}

}  // namespace chunkattn::cuda
