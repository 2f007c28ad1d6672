// Runs the steps of the backward: rotated keys and queries, the main loop's kernel and instantiation, dQ; of
// select-and-merge attention also its lists, and dK and dV.
#include <climits>
#include <vector>

#include "cuda/backward/groups.h"
#include "cuda/backward/launchers.h"
#include "cuda/common/device.h"
#include "cuda/common/element_types.h"
#include "cuda/common/packed_sequences.h"
#include "cuda/common/rotate_keys.h"
#include "cuda/common/side_streams.h"
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

// A call, or a group of its heads, on its way through the steps. Keys are rotated.
template <typename Launcher>
class Steps {
 public:
  // `aligned`: where the keys lie allows the Hopper kernel.
  Steps(const Launcher& launcher, const BackwardParams& params, const BackwardWorkspace& workspace, int capability,
        bool aligned)
      : launcher_(launcher),
        params_(params),
        workspace_(workspace),
        vectorized_(vector_paths(params, workspace)),
        plan_(plan_backward(params.forward.shape, capability, aligned && vectorized_.main_loop(), forced_kernel())) {
    workspace_.dq_in_pieces = plan_.kind == KernelChoice::kPortable;
  }

  // Each returns null, or what failed.
  // What is zero at first, and what the main loop reads.
  const char* prepare(int most_blocks, cudaStream_t stream) const {
    const char* failure = launch_clear(workspace_, most_blocks, stream);
    if (failure == nullptr) failure = launch_prepare(params_, workspace_, vectorized_, most_blocks, stream);
    if (failure == nullptr && params_.forward.packed()) {
      failure = launch_packed_keys(params_, workspace_, plan_.tile_n, stream);
    }
    return failure;
  }

  const char* main_loop(cudaStream_t stream) const {
    if (params_.forward.rows_k() == 0) return nullptr;
    return params_.forward.dtype == DataType::kBFloat16
               ? launch_main_loop<BFloat16>(launcher_, params_, workspace_, vectorized_, plan_, stream)
               : launch_main_loop<Float16>(launcher_, params_, workspace_, vectorized_, plan_, stream);
  }

  const char* finish(int most_blocks, cudaStream_t stream) const {
    return launch_finish(params_, workspace_, vectorized_, most_blocks, stream);
  }

 private:
  Launcher launcher_;
  BackwardParams params_;
  BackwardWorkspace workspace_;
  BackwardVectorPaths vectorized_;
  KernelPlan plan_;
};

// Where groups are worked on. One group has the caller's stream alone.
struct GroupStreams {
  cudaStream_t around;    // the steps around the main loop
  cudaStream_t loops[2];  // by turns: a group's loop begins where that before leaves room
  const SideStreams* side;

  const char* follow(cudaStream_t follower, cudaStream_t leader) const {
    return follower == leader ? nullptr : side->follow(follower, leader);
  }
};

struct Group {
  BackwardParams params;  // as they were passed in: keys may be raw
  Steps<DcaLauncher> steps;
};

std::vector<Group> make_groups(const BackwardParams& call, const HeadGroups& groups, bool deterministic, void* memory,
                               int capability) {
  const size_t workspace_bytes = group_workspace_bytes(call, groups, deterministic);
  std::vector<Group> made;
  for (int i = 0; i < groups.count(); ++i) {
    const BackwardParams params = params_of_group(call, groups, i);
    size_t bytes = 0;
    const BackwardWorkspace workspace = backward_workspace(
        params, deterministic, static_cast<unsigned char*>(memory) + i % kGroupWorkspaces * workspace_bytes, &bytes);
    BackwardParams rotated = params;
    if (!params.forward.k_rotated) {
      // A block has read its keys when it writes their gradients: dk has room until then. Who else reads them, the
      // other block of its cluster, had done so before it sent its first dS.
      rotated.forward.k = params.dk;
      rotated.forward.k_strides = params.dk_strides;
      rotated.forward.k_rotated = true;
    }
    made.push_back({params, {DcaLauncher{}, rotated, workspace, capability, true}});
  }
  return made;
}

// What a group's main loop in `loop` waits for.
const char* prepare(const Group& group, int most_blocks, cudaStream_t loop, const GroupStreams& streams) {
  const BackwardParams& params = group.params;
  const char* failure = nullptr;
  if (!params.forward.k_rotated) {
    failure = launch_rotate_keys(params.forward, params.dk, params.dk_strides, most_blocks, streams.around);
  }
  if (failure == nullptr) failure = group.steps.prepare(most_blocks, streams.around);
  return failure == nullptr ? streams.follow(loop, streams.around) : failure;
}

// The steps around the main loop have all thread blocks they want where no loop is beside them.
const char* run(const std::vector<Group>& groups, int blocks_beside_loop, const GroupStreams& streams) {
  const char* failure = prepare(groups[0], INT_MAX, streams.loops[0], streams);
  for (size_t i = 0; i < groups.size() && failure == nullptr; ++i) {
    const cudaStream_t loop = streams.loops[i % 2], next_loop = streams.loops[(i + 1) % 2];
    const bool last = i + 1 == groups.size();
    failure = groups[i].steps.main_loop(loop);
    // The workspace of the next group is that of the one before, which was finished earlier in the same stream.
    if (failure == nullptr && !last) failure = prepare(groups[i + 1], blocks_beside_loop, next_loop, streams);
    if (failure == nullptr) failure = streams.follow(streams.around, loop);
    if (failure == nullptr) failure = groups[i].steps.finish(last ? INT_MAX : blocks_beside_loop, streams.around);
  }
  return failure;
}

}  // namespace

const char* dca_backward(const BackwardParams& params, bool deterministic, void* workspace, void* stream) {
  const auto caller = static_cast<cudaStream_t>(stream);
  int capability = 0, device_multiprocessors = 0;
  if (const char* failure = check_call(params.forward, &capability)) return failure;
  if (const char* failure = multiprocessors(&device_multiprocessors)) return failure;
  const std::vector<Group> groups =
      make_groups(params, head_groups(params.forward, deterministic), deterministic, workspace, capability);
  GroupStreams streams{caller, {caller, caller}, nullptr};
  SideStreams side;
  if (groups.size() > 1) {
    if (const char* failure = SideStreams::find(&side)) return failure;
    streams = {side.eager, {caller, side.patient}, &side};
  }
  const char* failure = streams.follow(streams.around, caller);
  if (failure == nullptr) failure = run(groups, blocks_beside_loop(params.forward, device_multiprocessors), streams);
  // Also behind a failure: the caller may free the tensors then.
  for (const cudaStream_t leader : {streams.around, streams.loops[1]}) {
    const char* const joined = streams.follow(caller, leader);
    if (failure == nullptr) failure = joined;
  }
  return failure;
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
  const Steps steps(launcher, backward, workspace.queries, capability, whole_boxes);
  const char* failure = steps.prepare(INT_MAX, cuda_stream);
  if (failure == nullptr) failure = steps.main_loop(cuda_stream);
  if (failure == nullptr) failure = steps.finish(INT_MAX, cuda_stream);
  return failure == nullptr ? launch_round_key_gradients(backward, workspace.keys, cuda_stream) : failure;
}

}  // namespace chunkattn::cuda
