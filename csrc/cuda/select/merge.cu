// From the regions each row lists to those a group keeps: puts the lists in order, and walks them rank by rank.
#include "cuda/select/launchers.h"
#include "cuda/select/row_candidates.cuh"

namespace chunkattn::cuda {

namespace {

inline int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// kTeam threads, a warp or the block.
template <int kTeam>
__device__ __forceinline__ void sync_team() {
  if constexpr (kTeam == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Bitonic sort; `before(a, b)` says that a belongs before b. Two sorted halves are merged by first comparing mirror
// images, so that all comparisons point the same way: where the count is no power of two, what is missing behind the
// last element stays there, and need not exist.
template <int kTeam, typename Element, typename Before>
__device__ __forceinline__ void sort_by_team(Element* data, int count, Before&& before) {
  for (int size = 2; size < 2 * count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const int mirror = stride == size / 2 ? size - 1 : stride;
      for (int i = threadIdx.x % kTeam;; i += kTeam) {
        const int first = 2 * i - (i & (stride - 1)), second = first ^ mirror;
        if (first >= count) break;
        if (second >= count) continue;
        const Element a = data[first], b = data[second];
        if (before(b, a)) {
          data[first] = b;
          data[second] = a;
        }
      }
      sync_team<kTeam>();
    }
  }
}

// A row lists `wanted` regions; those its sorted entries lack score -inf. Among the first `wanted` regions are enough
// of these, and the lowest of them are listed.
template <int kTeam>
__device__ __forceinline__ void complete_list(uint64_t* entries, int wanted) {
  if (entries[wanted - 1] != 0) return;
  int listed = 0;
  while (entries[listed] != 0) ++listed;
  sync_team<kTeam>();  // everybody has counted
  for (int region = threadIdx.x % kTeam; region < wanted; region += kTeam) {
    int lower = 0;  // of the listed regions
    bool missing = true;
    for (int i = 0; i < listed; ++i) {
      const int other = listed_region(entries[i]);
      lower += other < region ? 1 : 0;
      missing &= other != region;
    }
    const int place = listed + region - lower;
    if (missing && place < wanted) entries[place] = list_entry(ordered_bits(-INFINITY), region);
  }
}

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

constexpr int kMergeThreads = 128;

// The regions a group has kept so far and those of the rows in work, as a hash table.
struct RegionTable {
  static constexpr int kNone = -1;

  int* regions;  // [slots], kNone where free
  int* finders;  // [slots], the first thread that found the region in this step; kKept once it is kept
  int slots;     // a power of two

  static constexpr int kKept = -1;

  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < slots; i += kMergeThreads) {
      regions[i] = kNone;
      finders[i] = INT32_MAX;
    }
  }

  // Returns the region's slot.
  __device__ __forceinline__ int find(int region) const {
    uint32_t slot = static_cast<uint32_t>(region) * 2654435769u >> 7 & (slots - 1);
    while (true) {
      const int found = atomicCAS(regions + slot, kNone, region);
      if (found == kNone || found == region) break;
      slot = (slot + 1) & (slots - 1);
    }
    atomicMin(finders + slot, static_cast<int>(threadIdx.x));
    return static_cast<int>(slot);
  }
};

// Writes the place of this thread among those with `chosen`, in order of threads; returns how many there are.
__device__ __forceinline__ int place_among(bool chosen, int* warp_counts, int* place) {
  const uint32_t votes = __ballot_sync(0xffffffffu, chosen);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), all = 0;
#pragma unroll
  for (int i = 0; i < kMergeThreads / 32; ++i) {
    before += i < warp ? warp_counts[i] : 0;
    all += warp_counts[i];
  }
  *place = before;
  return all;
}

// The rows' lists of ids are walked rank by rank, and within a rank in steps of kMergeThreads rows. Writes the regions
// that are seen first, at most top_k, and returns how many there are; -1 where the lists are too short to tell.
__device__ __forceinline__ int walk_lists(const SelectPass& pass, int group, int plane, const RegionTable& table,
                                          int* kept) {
  __shared__ int warp_counts[kMergeThreads / 32];
  const SelectionRule& rule = pass.rule;
  const int voters = rule.voter_count(group), top_k = rule.top_k, ranks = pass.listed;
  const int64_t first_row = static_cast<int64_t>(plane) * rule.regions + rule.first_voter(group);
  const auto load = [&](int rank, int step) {
    const int row = step * kMergeThreads + threadIdx.x;
    if (row >= voters || rank >= ranks) return RegionTable::kNone;
    return reinterpret_cast<const int*>(pass.workspace.lists + (first_row + row) * ranks)[rank];
  };
  const int steps = (voters + kMergeThreads - 1) / kMergeThreads;
  int count = 0, rank = 0, step = 0;
  bool occupied = false;  // by any row, this rank
  int next = load(0, 0);
  while (rank < ranks && count < top_k) {
    const int region = next;
    const bool last = step + 1 == steps;
    next = last ? load(rank + 1, 0) : load(rank, step + 1);
    const int slot = region == RegionTable::kNone ? -1 : table.find(region);
    occupied |= __syncthreads_or(slot >= 0) != 0;
    const bool first_seen = slot >= 0 && table.finders[slot] == static_cast<int>(threadIdx.x);
    int place;
    const int found = place_among(first_seen, warp_counts, &place);
    if (first_seen) {
      if (count + place < top_k) kept[count + place] = region;
      table.finders[slot] = RegionTable::kKept;
    }
    count = count + found < top_k ? count + found : top_k;
    if (last) {
      if (!occupied) break;
      occupied = false;
      ++rank;
    }
    step = last ? 0 : step + 1;
    __syncthreads();  // the table says what is kept
  }
  return count < top_k && rank == ranks && ranks < top_k ? -1 : count;
}

// Of the table and the regions kept.
__host__ __device__ inline int64_t merge_ints(int slots, int top_k) { return 2 * static_cast<int64_t>(slots) + top_k; }

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
    const int count = walk_lists(pass, group, plane, table, kept);
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
  // No more than half full: the kept regions, and those of one step.
  const int slots = walks ? power_of_two_from(2 * (top_k + kMergeThreads)) : 0;
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
