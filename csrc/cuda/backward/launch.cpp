// Runs the steps of the backward: rotated keys and queries, the main loop's kernel and instantiation, dQ.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/backward/launchers.h"
#include "cuda/common/device.h"
#include "cuda/common/packed_sequences.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

template <typename T, int kHeadDim>
const char* launch_main_loop(const BackwardParams& params, const BackwardWorkspace& workspace,
                             const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  if (plan.kind == KernelChoice::kHopper) {
    return launch_backward_sm90<T, kHeadDim>(params, workspace, vectorized, plan, stream);
  }
  return launch_backward_sm80<T, kHeadDim>(params, workspace, vectorized, plan, stream);
}

template <typename T>
const char* launch_main_loop(const BackwardParams& params, const BackwardWorkspace& workspace,
                             const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  switch (plan.head_dim_padded) {
    case 64:
      return launch_main_loop<T, 64>(params, workspace, vectorized, plan, stream);
    case 128:
      return launch_main_loop<T, 128>(params, workspace, vectorized, plan, stream);
    case 256:
      return launch_main_loop<T, 256>(params, workspace, vectorized, plan, stream);
    default:
      return "no backward kernel is compiled for this head_dim";
  }
}

}  // namespace

const char* dca_backward(const BackwardParams& call, const BackwardWorkspace& memory, void* stream) {
  BackwardParams params = call;
  BackwardWorkspace workspace = memory;
  ForwardParams& forward = params.forward;
  if (forward.dtype != DataType::kBFloat16 && forward.dtype != DataType::kFloat16) {
    return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
  int capability = 0;
  if (const char* failure = compute_capability(&capability)) return failure;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (!forward.k_rotated) {
    // A block has read its keys when it writes their gradients, and nobody else reads them: dk has room until then.
    if (const char* failure = rotate_keys(forward, params.dk, params.dk_strides, stream)) return failure;
    forward.k = params.dk;
    forward.k_strides = params.dk_strides;
    forward.k_rotated = true;
  }
  if (workspace.zeroed_bytes > 0) {
    const cudaError_t status = cudaMemsetAsync(workspace.zeroed, 0, workspace.zeroed_bytes, cuda_stream);
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  const BackwardVectorPaths vectorized = vector_paths(params, workspace);
  const KernelPlan plan = plan_backward(forward.shape, capability, vectorized.main_loop(), forced_kernel());
  workspace.dq_in_pieces = plan.kind == KernelChoice::kPortable;
  const char* failure = launch_prepare(params, workspace, vectorized, cuda_stream);
  if (failure == nullptr && forward.packed()) {
    failure = launch_packed_keys(params, workspace, plan.tile_n, cuda_stream);
  }
  if (failure == nullptr && forward.rows_k() > 0) {
    failure = forward.dtype == DataType::kBFloat16
                  ? launch_main_loop<__nv_bfloat16>(params, workspace, vectorized, plan, cuda_stream)
                  : launch_main_loop<__half>(params, workspace, vectorized, plan, cuda_stream);
  }
  return failure == nullptr ? launch_finish(params, workspace, vectorized, cuda_stream) : failure;
}

}  // namespace chunkattn::cuda
