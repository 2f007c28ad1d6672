// What puts the regions that rows list in order, and walks them rank by rank.
#pragma once

#include "cuda/select/row_candidates.cuh"

namespace chunkattn::cuda {

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

// The lists of the rows that vote for a group: ids, each row's in the room of as many entries.
struct RowLists {
  const uint64_t* lists;
  int rows;
  int ranks;
};

// The rows' lists of ids are walked rank by rank, and within a rank in steps of kMergeThreads rows. Writes the regions
// that are seen first, at most top_k, and returns how many there are; -1 where the lists are too short to tell.
__device__ __forceinline__ int walk_lists(const RowLists& lists, int top_k, const RegionTable& table, int* kept) {
  __shared__ int warp_counts[kMergeThreads / 32];
  const int ranks = lists.ranks;
  const auto load = [&](int rank, int step) {
    const int row = step * kMergeThreads + threadIdx.x;
    if (row >= lists.rows || rank >= ranks) return RegionTable::kNone;
    // Other blocks may have written it just now.
    return __ldcg(reinterpret_cast<const int*>(lists.lists + static_cast<int64_t>(row) * ranks) + rank);
  };
  const int steps = (lists.rows + kMergeThreads - 1) / kMergeThreads;
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

}  // namespace chunkattn::cuda
