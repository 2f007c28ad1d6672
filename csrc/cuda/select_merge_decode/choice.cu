// From the regions that rows list to those a group attends to.
#include "cuda/common/launch_step.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/select/merge_lists.cuh"
#include "cuda/select_merge_decode/chooser.cuh"

namespace chunkattn::cuda {

namespace {

constexpr int kThreads = kMergeThreads;

// Everything of a plane whose group begins, by the whole block.
struct PlaneChoice {
  const SpanStep& step;
  int plane;
  Chooser choice;

  __device__ __forceinline__ int* indices() const {
    return step.params.indices + static_cast<int64_t>(plane) * step.params.top_k;
  }

  __device__ __forceinline__ uint64_t* list(int split, int row) const {
    const int64_t plane_split = static_cast<int64_t>(plane) * step.plan.splits + split;
    return step.workspace.lists + (plane_split * step.plan.voters + row) * step.params.top_k;
  }

  __device__ __forceinline__ void keep_all() const {
    for (int i = threadIdx.x; i < step.params.top_k; i += kThreads) indices()[i] = i < choice.eligible ? i : -1;
  }

  // Puts what all splits found for a row in order, best first, and leaves the ids where the first split's entries were.
  // `shared` has room for the entries of all splits and for top_k more.
  template <bool kInShared>
  __device__ __forceinline__ void sort_row(int row, uint64_t* shared) const {
    const int top_k = step.params.top_k;
    uint64_t* first = list(0, row);
    uint64_t* entries = kInShared ? shared + step.plan.splits * top_k : first;
    if constexpr (kInShared) {
      for (int split = 0; split < step.plan.splits; ++split) {
        const uint64_t* found = list(split, row);
        for (int i = threadIdx.x; i < top_k; i += kThreads) shared[split * top_k + i] = found[i];
      }
      for (int i = threadIdx.x; i < top_k; i += kThreads) entries[i] = 0;
      __syncthreads();
      keep_best(shared, step.plan.splits * top_k, entries, top_k);
    }
    __syncthreads();
    sort_by_team<kThreads>(entries, top_k, [](uint64_t a, uint64_t b) { return a > b; });
    const int end = choice.row_end(step, row);
    const int wanted = end < top_k ? end : top_k;
    if (wanted > 0) complete_list<kThreads>(entries, wanted);
    __syncthreads();
    int* ids = reinterpret_cast<int*>(first);
    for (int begin = 0; begin < top_k; begin += kThreads) {
      const int i = begin + threadIdx.x;
      const int id = i < top_k ? listed_region(entries[i]) : 0;
      // Ids are written over entries that come before theirs, or with them, and that others read.
      if constexpr (!kInShared) __syncthreads();
      if (i < top_k) ids[i] = id;
    }
  }

  // Copies the best top_k of `count` entries, in any order. No two are equal, but those that are 0 and mean nothing.
  static __device__ __forceinline__ void keep_best(const uint64_t* entries, int count, uint64_t* kept, int top_k) {
    __shared__ int next;
    if (threadIdx.x == 0) next = 0;
    const uint64_t least = count > top_k ? threshold(entries, count, top_k) : 1;
    __syncthreads();  // `next` is 0
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t entry = entries[i];
      if (entry >= least) kept[atomicAdd(&next, 1)] = entry;
    }
  }

  // What the top_k best entries reach, or all that are not 0 where these are fewer: a search in quarters.
  static __device__ __forceinline__ uint64_t threshold(const uint64_t* entries, int count, int top_k) {
    __shared__ uint32_t counts[2][kThreads / 32][2];
    uint64_t low = 1, high = UINT64_MAX;  // `high` is reached by fewer than top_k
    for (int turn = 0; high - low > 1; turn ^= 1) {
      const uint64_t quarter = (high - low) / 4 > 0 ? (high - low) / 4 : 1;
      const uint64_t middle[3] = {low + quarter, low + 2 * quarter, high - quarter};
      uint32_t reach[3] = {};
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const uint64_t entry = entries[i];
#pragma unroll
        for (int j = 0; j < 3; ++j) reach[j] += entry >= middle[j] ? 1 : 0;
      }
      // Counts have 16 bits: see kLargestSort.
      const uint32_t first_two = __reduce_add_sync(0xffffffffu, reach[0] | reach[1] << 16);
      const uint32_t third = __reduce_add_sync(0xffffffffu, reach[2]);
      if (threadIdx.x % 32 == 0) {
        counts[turn][threadIdx.x / 32][0] = first_two;
        counts[turn][threadIdx.x / 32][1] = third;
      }
      __syncthreads();
      uint32_t all[2] = {};
#pragma unroll
      for (int warp = 0; warp < kThreads / 32; ++warp) {
        all[0] += counts[turn][warp][0];
        all[1] += counts[turn][warp][1];
      }
      const int reached[3] = {static_cast<int>(all[0] & 0xffff), static_cast<int>(all[0] >> 16),
                              static_cast<int>(all[1])};
      uint64_t below = low, above = high;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (reached[j] == top_k) return middle[j];
        if (reached[j] > top_k && middle[j] > below) below = middle[j];
        if (reached[j] < top_k && middle[j] < above) above = middle[j];
      }
      low = below;
      high = above;
    }
    return low;
  }

  // Whether all rows of the plane are in order now. The same for all threads.
  __device__ __forceinline__ bool finish_row() const {
    __threadfence();
    __syncthreads();
    int finished = 0;
    if (threadIdx.x == 0) finished = atomicAdd(step.workspace.counters + plane, 1) + 1;
    const bool all = __syncthreads_or(finished == step.plan.voters) != 0;
    if (all) __threadfence();
    return all;
  }

  __device__ __forceinline__ void merge(int* memory, int slots) const {
    const int top_k = step.params.top_k;
    const RegionTable table{memory, memory + slots, slots};
    int* kept = memory + 2 * slots;
    table.clear();
    __syncthreads();
    const int count = walk_lists({list(0, 0), step.plan.voters, top_k}, top_k, table, kept);
    __syncthreads();
    sort_by_team<kThreads>(kept, count, [](int a, int b) { return a < b; });
    for (int i = threadIdx.x; i < top_k; i += kThreads) indices()[i] = i < count ? kept[i] : -1;
  }
};

// Rows of all planes in turn; whoever finishes the last row of a plane merges it.
template <bool kInShared>
__global__ void __launch_bounds__(kThreads) choice_kernel(const __grid_constant__ SpanStep step, int slots) {
  extern __shared__ __align__(16) unsigned char choice_memory[];
  const SelectMergeDecodeParams& params = step.params;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  if (blockIdx.x == 0) {
    for (int batch = threadIdx.x; batch < params.batch; batch += kThreads) {
      const int stored = params.stored(batch);
      step.workspace.begins[batch] = stored;
      step.workspace.ends[batch] = params.end_of(stored, batch);
    }
  }
  const int voters = step.plan.chooses ? step.plan.voters : 1;
  const int64_t works = static_cast<int64_t>(step.plan.planes) * voters;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int plane = static_cast<int>(work / voters), row = static_cast<int>(work % voters);
    const PlaneChoice self{step, plane, chooser(step, step.first_span(step.sequence(plane)))};
    if (!self.choice.begins) continue;
    if (self.choice.keeps_all) {
      if (row == 0) self.keep_all();
      continue;
    }
    __syncthreads();  // the memory is free
    self.template sort_row<kInShared>(row, reinterpret_cast<uint64_t*>(choice_memory));
    if (!self.finish_row()) continue;
    int* memory = reinterpret_cast<int*>(choice_memory);
    if constexpr (!kInShared) memory = step.workspace.merge_memory + plane * merge_ints(slots, params.top_k);
    self.merge(memory, slots);
  }
}

}  // namespace

const char* launch_choice(const SpanStep& step, cudaStream_t stream) {
  const StepPlan& plan = step.plan;
  const int top_k = step.params.top_k;
  const bool in_shared = !plan.chooses || plan.lists_in_shared;
  size_t shared_bytes = 0;
  if (plan.chooses && in_shared) {
    const size_t sorted = (static_cast<size_t>(plan.splits) + 1) * top_k * sizeof(uint64_t);
    const size_t merged = static_cast<size_t>(merge_ints(merge_slots(top_k), top_k)) * sizeof(int);
    shared_bytes = sorted > merged ? sorted : merged;
  }
  const auto kernel = in_shared ? &choice_kernel<true> : &choice_kernel<false>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  // As many as are resident: most of the time there is nothing to do.
  constexpr int64_t kMostBlocks = 512;
  const int64_t works = static_cast<int64_t>(plan.planes) * (plan.chooses ? plan.voters : 1);
  const int64_t blocks = works < 1 ? 1 : works < kMostBlocks ? works : kMostBlocks;
  const int slots = plan.chooses ? merge_slots(top_k) : 0;
  return launch_step(kernel, blocks, kThreads, shared_bytes, plan.dependent_launch, stream, step, slots);
}

}  // namespace chunkattn::cuda
