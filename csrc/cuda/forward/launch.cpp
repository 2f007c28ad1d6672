// Picks the forward kernel and its instantiation for a call.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/device.h"
#include "cuda/forward/launchers.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

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

const char* dca_forward(const ForwardParams& params, void* stream) {
  int capability = 0;
  if (const char* failure = compute_capability(&capability)) return failure;
  const VectorPaths vectorized = vector_paths(params);
  const KernelPlan plan = plan_forward(params.shape, capability, vectorized.k && vectorized.v, forced_kernel());
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
