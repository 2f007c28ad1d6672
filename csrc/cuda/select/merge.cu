// From the regions each row lists to those a group keeps: puts the lists in order, and walks them rank by rank.
#include "cuda/select/launchers.h"
#include "cuda/select/merge_lists.cuh"

namespace chunkattn::cuda {

namespace {

constexpr int kSortThreads = 256;

// Each team sorts a row's list, in shared memory or where it is, and writes its region ids there; -1 behind the last.
template <int kTeam, bool kInShared>
__global__ void __launch_bounds__(kSortThreads) sort_lists_kernel(const __grid_constant__ SelectPass pass) {
  extern __shared__ uint64_t sort_memory[];
  const int team = threadIdx.x / kTeam;
  const int row = blockIdx.x * (kSortThreads / kTeam) + team;
  const int row_end = pass.row_end(blockIdx.y, row);
  if (row_end == 0) return;
  const int listed = pass.listed;
  uint64_t* list = pass.workspace.lists + (static_cast<int64_t>(blockIdx.y) * pass.rule.regions + row) * listed;
  uint64_t* entries = kInShared ? sort_memory + team * listed : list;
  if constexpr (kInShared) {
    for (int i = threadIdx.x % kTeam; i < listed; i += kTeam) entries[i] = list[i];
    sync_team<kTeam>();
  }
  sort_by_team<kTeam>(entries, listed, [](uint64_t a, uint64_t b) { return a > b; });
  complete_list<kTeam>(entries, row_end < listed ? row_end : listed);
  sync_team<kTeam>();
  int* ids = reinterpret_cast<int*>(list);
  for (int first = 0; first < listed; first += kTeam) {
    const int i = first + threadIdx.x % kTeam;
    const int id = i < listed ? listed_region(entries[i]) : 0;
    // Ids are written over entries that come before theirs, or with them, and that others read.
    if constexpr (!kInShared) sync_team<kTeam>();
    if (i < listed) ids[i] = id;
  }
}

// A block for each group and plane. Its table is in shared memory, or where the candidates were.
template <bool kInShared>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ SelectPass pass, int slots) {
  extern __shared__ int merge_memory[];
  const int top_k = pass.rule.top_k;
  int* memory = merge_memory;
  if constexpr (!kInShared) {
    memory = reinterpret_cast<int*>(pass.workspace.candidates) + blockIdx.x * merge_ints(slots, top_k);
  }
  const int64_t works = static_cast<int64_t>(pass.rule.groups) * pass.planes;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int group = static_cast<int>(work % pass.rule.groups), plane = static_cast<int>(work / pass.rule.groups);
    const int64_t index = static_cast<int64_t>(pass.first_plane + plane) * pass.rule.groups + group;
    int* indices = pass.params.indices + index * top_k;
    if (pass.rule.keeps_all(group)) {
      const int all = pass.rule.eligible(group);
      for (int i = threadIdx.x; i < top_k; i += kMergeThreads) indices[i] = i < all ? i : -1;
      continue;
    }
    if (!pass.to_merge(plane, group)) continue;
    const RegionTable table{memory, memory + slots, slots};
    int* kept = memory + 2 * slots;
    table.clear();
    __syncthreads();
    const int64_t first_row = static_cast<int64_t>(plane) * pass.rule.regions + pass.rule.first_voter(group);
    const RowLists lists{pass.workspace.lists + first_row * pass.listed, pass.rule.voter_count(group), pass.listed};
    const int count = walk_lists(lists, top_k, table, kept);
    if (threadIdx.x == 0) pass.workspace.unmerged[work] = count < 0 ? 1 : 0;
    __syncthreads();
    if (count < 0) continue;
    sort_by_team<kMergeThreads>(kept, count, [](int a, int b) { return a < b; });
    for (int i = threadIdx.x; i < top_k; i += kMergeThreads) indices[i] = i < count ? kept[i] : -1;
    __syncthreads();
  }
}

}  // namespace

const char* launch_sort_lists(const SelectPass& pass, cudaStream_t stream) {
  constexpr int kLargestOfWarp = 512;
  const int listed = pass.listed;
  const bool by_warp = listed <= kLargestOfWarp, in_shared = listed <= kLargestTopKInShared;
  const int rows_per_block = by_warp ? kSortThreads / 32 : 1;
  const size_t shared_bytes = in_shared ? static_cast<size_t>(rows_per_block) * listed * sizeof(uint64_t) : 0;
  const dim3 grid((pass.rule.regions + rows_per_block - 1) / rows_per_block, pass.planes);
  const auto kernel = by_warp     ? &sort_lists_kernel<32, true>
                      : in_shared ? &sort_lists_kernel<kSortThreads, true>
                                  : &sort_lists_kernel<kSortThreads, false>;
  kernel<<<grid, kSortThreads, shared_bytes, stream>>>(pass);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* launch_merge(const SelectPass& pass, cudaStream_t stream) {
  const int top_k = pass.rule.top_k;
  const bool walks = pass.workspace.lists != nullptr, in_shared = !walks || top_k <= kLargestTopKInShared;
  const int slots = walks ? merge_slots(top_k) : 0;
  int64_t blocks = static_cast<int64_t>(pass.rule.groups) * pass.planes;
  int64_t room = INT32_MAX;
  size_t shared_bytes = 0;
  if (!in_shared) {
    const int64_t rows = candidate_blocks(pass.rule.regions, pass.workspace.planes_at_once) * kLargestRowBlock;
    const int64_t bytes = rows * pass.workspace.candidates_per_row * static_cast<int64_t>(sizeof(uint64_t));
    room = bytes / (merge_ints(slots, top_k) * static_cast<int64_t>(sizeof(int)));
  } else if (walks) {
    shared_bytes = static_cast<size_t>(merge_ints(slots, top_k)) * sizeof(int);
  }
  if (blocks > room) blocks = room;
  const auto kernel = in_shared ? &merge_kernel<true> : &merge_kernel<false>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  kernel<<<static_cast<unsigned>(blocks), kMergeThreads, shared_bytes, stream>>>(pass, slots);
  status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace chunkattn::cuda
