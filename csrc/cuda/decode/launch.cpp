// Runs the steps of decoding: the append where it is one of its own, the kernel and instantiation, the combination.
#include "cuda/common/device.h"
#include "cuda/common/element_types.h"
#include "cuda/decode/launchers.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

const char* describe_device(DecodeDevice* device) {
  if (const char* failure = compute_capability(&device->compute_capability)) return failure;
  if (const char* failure = multiprocessors(&device->multiprocessors)) return failure;
  int index = 0;
  cudaError_t status = cudaGetDevice(&index);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&device->shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <typename T>
const char* launch(const DecodeParams& params, const DecodeWorkspace& workspace, const DecodePaths& paths,
                   const DecodePlan& plan, bool dependent_launch, cudaStream_t stream) {
  switch (plan.head_dim_padded) {
    case 64:
      return launch_decode<T, 64>(params, workspace, paths, plan, dependent_launch, stream);
    case 128:
      return launch_decode<T, 128>(params, workspace, paths, plan, dependent_launch, stream);
    case 256:
      return launch_decode<T, 256>(params, workspace, paths, plan, dependent_launch, stream);
    default:
      return "no decode kernel is compiled for this head_dim";
  }
}

}  // namespace

DecodeWorkspace decode_workspace(const DecodeParams& params, void* memory, size_t* bytes) {
  DecodeDevice device{};
  *bytes = 0;
  if (describe_device(&device) != nullptr) return {};  // dca_decode will say so
  return lay_out_workspace(params, plan_decode(params, device), memory, bytes);
}

const char* dca_decode(const DecodeParams& params, const DecodeWorkspace& workspace, void* stream) {
  if (params.dtype != DataType::kBFloat16 && params.dtype != DataType::kFloat16) {
    return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
  DecodeDevice device{};
  if (const char* failure = describe_device(&device)) return failure;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const DecodePlan plan = plan_decode(params, device);
  const DecodePaths paths = decode_paths(params);
  const bool attends = params.batch > 0 && plan.rows > 0;
  if (attends && is_prefill(params, device, paths)) return launch_prefill(params, workspace, device, cuda_stream);
  if (params.batch > 0 && params.seqlen_new > 0 && !(attends && plan.fused_append)) {
    if (const char* failure = launch_append(params, cuda_stream)) return failure;
  }
  if (!attends) return nullptr;
  // Code for later devices is compiled from PTX of sm_80, which does not know how to wait.
  const bool dependent_launch = device.compute_capability == 90;
  return params.dtype == DataType::kBFloat16
             ? launch<BFloat16>(params, workspace, paths, plan, dependent_launch, cuda_stream)
             : launch<Float16>(params, workspace, paths, plan, dependent_launch, cuda_stream);
}

}  // namespace chunkattn::cuda
