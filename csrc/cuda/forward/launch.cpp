// Picks the forward kernel and its instantiation for a call.
#include "cuda/common/device.h"
#include "cuda/common/element_types.h"
#include "cuda/common/packed_sequences.h"
#include "cuda/forward/launchers.h"
#include "cuda/select_merge/attended_regions.h"
#include "group_attention.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

struct DcaLauncher {
  const ForwardParams& params;

  template <typename T, int kHeadDim>
  const char* launch(const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) const {
    if (params.packed()) {
      if (params.shape.batch == 0) return nullptr;
      if (const char* failure = launch_packed_queries(params, plan.tile_m, stream)) return failure;
      if (params.total_k == 0) return nullptr;  // no query sees a key
    }
    return plan.kind == KernelChoice::kHopper ? launch_forward_sm90<T, kHeadDim>(params, vectorized, plan, stream)
                                              : launch_forward_sm80<T, kHeadDim>(params, vectorized, plan, stream);
  }
};

struct RegionLauncher {
  const ForwardParams& params;
  AttendedRegions regions;

  template <typename T, int kHeadDim>
  const char* launch(const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) const {
    return plan.kind == KernelChoice::kHopper
               ? launch_region_forward_sm90<T, kHeadDim>(params, regions, vectorized, plan, stream)
               : launch_region_forward_sm80<T, kHeadDim>(params, regions, vectorized, plan, stream);
  }
};

template <typename T, typename Launcher>
const char* launch(const Launcher& launcher, const VectorPaths& vectorized, const KernelPlan& plan,
                   cudaStream_t stream) {
  switch (plan.head_dim_padded) {
    case 64:
      return launcher.template launch<T, 64>(vectorized, plan, stream);
    case 128:
      return launcher.template launch<T, 128>(vectorized, plan, stream);
    case 256:
      return launcher.template launch<T, 256>(vectorized, plan, stream);
    default:
      return "no forward kernel is compiled for this head_dim";
  }
}

template <typename Launcher>
const char* launch(const Launcher& launcher, const VectorPaths& vectorized, bool aligned, void* stream) {
  int capability = 0;
  if (const char* failure = compute_capability(&capability)) return failure;
  const KernelPlan plan = plan_forward(launcher.params.shape, capability, aligned, forced_kernel());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (launcher.params.dtype) {
    case DataType::kBFloat16:
      return launch<BFloat16>(launcher, vectorized, plan, cuda_stream);
    case DataType::kFloat16:
      return launch<Float16>(launcher, vectorized, plan, cuda_stream);
    default:
      return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
}

}  // namespace

const char* dca_forward(const ForwardParams& params, void* stream) {
  const VectorPaths vectorized = vector_paths(params);
  return launch(DcaLauncher{params}, vectorized, vectorized.k && vectorized.v, stream);
}

const char* select_merge_forward(const SelectMergeParams& params, const SelectMergeWorkspace& workspace, void* stream) {
  if (const char* failure = launch_attended_regions(params, workspace, static_cast<cudaStream_t>(stream))) {
    return failure;
  }
  ForwardParams forward = group_attention(params);
  forward.tile_counter = workspace.tile_counter;
  const VectorPaths vectorized = vector_paths(forward);
  const bool whole_boxes = params.regions.geometry.region_size % 8 == 0;
  return launch(RegionLauncher{forward, attended_regions(params, workspace)}, vectorized,
                vectorized.q && vectorized.k && vectorized.v && whole_boxes, stream);
}

}  // namespace chunkattn::cuda
