// Lists of regions without the ids that are ignored, so that the main loops need not look for them.
#include "cuda/select_merge/attended_regions.h"

namespace chunkattn::cuda {

namespace {

constexpr int kThreads = 128;

// A warp takes a list.
__global__ void __launch_bounds__(kThreads)
    attended_regions_kernel(RegionLists lists, SelectMergeWorkspace workspace, int64_t count, int groups) {
  const int64_t list = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (list >= count) return;
  const int group = static_cast<int>(list % groups);
  const int lane = threadIdx.x % 32;
  const int* ids = lists.indices + list * lists.capacity;
  int* kept = workspace.regions + list * lists.capacity;
  int used = 0;
  for (int begin = 0; begin < lists.capacity; begin += 32) {
    const int id = begin + lane < lists.capacity ? ids[begin + lane] : -1;
    const bool keep = lists.geometry.may_attend(group, id);
    const unsigned keeping = __ballot_sync(0xffffffffu, keep);
    if (keep) kept[used + __popc(keeping & ((1u << lane) - 1))] = id;
    used += __popc(keeping);
  }
  if (lane == 0) workspace.counts[list] = used;
}

}  // namespace

const char* launch_attended_regions(const SelectMergeParams& params, const SelectMergeWorkspace& workspace,
                                    cudaStream_t stream) {
  const RegionGeometry& geometry = params.regions.geometry;
  const int groups = geometry.groups(params.shape.seqlen_k);
  // A list's keys are counted in 32 bits, and so are those a tile reaches behind them.
  const int64_t keys = static_cast<int64_t>(params.regions.capacity) * geometry.region_size;
  if (groups > 1 && keys > INT32_MAX - 1024) return "a list of regions can have at most 2^31 - 1024 tokens";
  const int64_t lists = count_lists(params);
  const int64_t blocks = (lists * 32 + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return "there are too many lists of regions for one launch";
  attended_regions_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params.regions, workspace, lists,
                                                                                  groups);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace chunkattn::cuda
