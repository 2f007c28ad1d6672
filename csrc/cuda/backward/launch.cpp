// Runs the steps of the backward: rotated keys and queries, the main loop's kernel and instantiation, dQ; of
// select-and-merge attention also its lists, and dK and dV.
#include "cuda/backward/launchers.h"
#include "cuda/common/device.h"
#include "cuda/common/element_types.h"
#include "cuda/common/packed_sequences.h"
#include "group_attention.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

struct DcaLauncher {
  template <typename T, int kHeadDim>
  const char* launch(const BackwardParams& params, const BackwardWorkspace& workspace,
                     const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) const {
    return plan.kind == KernelChoice::kHopper
               ? launch_backward_sm90<T, kHeadDim>(params, workspace, vectorized, plan, stream)
               : launch_backward_sm80<T, kHeadDim>(params, workspace, vectorized, plan, stream);
  }
};

struct RegionLauncher {
  AttendedRegions regions;
  KeyGradientSums sums;

  template <typename T, int kHeadDim>
  const char* launch(const BackwardParams& params, const BackwardWorkspace& workspace,
                     const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) const {
    return plan.kind == KernelChoice::kHopper
               ? launch_region_backward_sm90<T, kHeadDim>(params, workspace, regions, sums, vectorized, plan, stream)
               : launch_region_backward_sm80<T, kHeadDim>(params, workspace, regions, sums, vectorized, plan, stream);
  }
};

template <typename T, typename Launcher>
const char* launch_main_loop(const Launcher& launcher, const BackwardParams& params, const BackwardWorkspace& workspace,
                             const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  switch (plan.head_dim_padded) {
    case 64:
      return launcher.template launch<T, 64>(params, workspace, vectorized, plan, stream);
    case 128:
      return launcher.template launch<T, 128>(params, workspace, vectorized, plan, stream);
    case 256:
      return launcher.template launch<T, 256>(params, workspace, vectorized, plan, stream);
    default:
      return "no backward kernel is compiled for this head_dim";
  }
}

// What is asked of a call before anything is launched.
const char* check_call(const ForwardParams& forward, int* capability) {
  if (forward.dtype != DataType::kBFloat16 && forward.dtype != DataType::kFloat16) {
    return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
  return compute_capability(capability);
}

// All but keys: what is zero at first, what the main loop reads, the main loop, dQ. `aligned`: where the keys lie
// allows the Hopper kernel.
template <typename Launcher>
const char* run_steps(const Launcher& launcher, const BackwardParams& params, BackwardWorkspace workspace,
                      int capability, bool aligned, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const BackwardVectorPaths vectorized = vector_paths(params, workspace);
  const KernelPlan plan = plan_backward(forward.shape, capability, aligned && vectorized.main_loop(), forced_kernel());
  if (workspace.zeroed_bytes > 0) {
    const cudaError_t status = cudaMemsetAsync(workspace.zeroed, 0, workspace.zeroed_bytes, stream);
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  workspace.dq_in_pieces = plan.kind == KernelChoice::kPortable;
  const char* failure = launch_prepare(params, workspace, vectorized, stream);
  if (failure == nullptr && forward.packed()) {
    failure = launch_packed_keys(params, workspace, plan.tile_n, stream);
  }
  if (failure == nullptr && forward.rows_k() > 0) {
    failure = forward.dtype == DataType::kBFloat16
                  ? launch_main_loop<BFloat16>(launcher, params, workspace, vectorized, plan, stream)
                  : launch_main_loop<Float16>(launcher, params, workspace, vectorized, plan, stream);
  }
  return failure == nullptr ? launch_finish(params, workspace, vectorized, stream) : failure;
}

}  // namespace

const char* dca_backward(const BackwardParams& call, const BackwardWorkspace& workspace, void* stream) {
  BackwardParams params = call;
  ForwardParams& forward = params.forward;
  int capability = 0;
  if (const char* failure = check_call(forward, &capability)) return failure;
  if (!forward.k_rotated) {
    // A block has read its keys when it writes their gradients: dk has room until then. Who else reads them, the other
    // block of its cluster, had done so before it sent its first dS.
    if (const char* failure = rotate_keys(forward, params.dk, params.dk_strides, stream)) return failure;
    forward.k = params.dk;
    forward.k_strides = params.dk_strides;
    forward.k_rotated = true;
  }
  return run_steps(DcaLauncher{}, params, workspace, capability, true, static_cast<cudaStream_t>(stream));
}

const char* select_merge_backward(const SelectMergeBackwardParams& params,
                                  const SelectMergeBackwardWorkspace& workspace, void* stream) {
  const BackwardParams backward = group_attention(params);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int capability = 0;
  if (const char* failure = check_call(backward.forward, &capability)) return failure;
  if (const char* failure = launch_attended_regions(params.forward, workspace.lists, cuda_stream)) return failure;
  const RegionLauncher launcher{attended_regions(params.forward, workspace.lists), workspace.keys};
  const bool whole_boxes = params.forward.regions.geometry.region_size % 8 == 0;
  const char* failure = run_steps(launcher, backward, workspace.queries, capability, whole_boxes, cuda_stream);
  return failure == nullptr ? launch_round_key_gradients(backward, workspace.keys, cuda_stream) : failure;
}

}  // namespace chunkattn::cuda
