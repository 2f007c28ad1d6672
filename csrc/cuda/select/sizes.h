// Sizes that the kernels of the selection and their workspace agree on. No CUDA types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace chunkattn::cuda {

// Rows that a thread block scores together, in the kernel with the fewest and in the one with the most.
constexpr int kSmallestRowBlock = 64;
constexpr int kLargestRowBlock = 128;

// Thread blocks of a launch: every multiprocessor of today's devices has one.
constexpr int kMaximumBlocks = 160;

// What the tensors of one pass may take beside the candidates.
constexpr int64_t kPassBytes = int64_t{1200} << 20;
constexpr int64_t kMaximumPlanes = 65535;  // of a pass: the second dimension of a grid

// Up to here lists are sorted and merged in shared memory, of which every device has enough; longer ones where they
// are.
constexpr int kLargestTopKInShared = 2048;

// Sizes in ints and the addresses of a row's candidates hold up to here, far beyond what fits into today's memories.
constexpr int kLargestTopK = 1 << 20;

// A row has room for what it keeps and for what it finds between two reductions: a power of two.
constexpr int kRegisterCandidates = 1024;  // as many as a warp can hold in registers
constexpr int kReductionSlack = 64;        // a reduction may leave so many more than top_k
constexpr int kLargestTileColumns = 128;

// Threads that merge the lists of a group.
constexpr int kMergeThreads = 128;

// Of the table of regions that are kept and those of one step of the walk: no more than half full, and a power of two.
inline int merge_slots(int top_k) {
  int slots = 1;
  while (slots < 2 * (top_k + kMergeThreads)) slots *= 2;
  return slots;
}

// Ints of the table and of the regions kept.
CHUNKATTN_HOST_DEVICE int64_t merge_ints(int slots, int top_k) { return 2 * static_cast<int64_t>(slots) + top_k; }

inline int candidates_per_row(int top_k) {
  int capacity = kRegisterCandidates;
  while (capacity < top_k + top_k / 4 + kReductionSlack + 2 * kLargestTileColumns) capacity *= 2;
  return capacity;
}

// Blocks of kLargestRowBlock rows there is room for among the candidates.
inline int64_t candidate_blocks(int regions, int planes_at_once) {
  const int64_t row_blocks = (static_cast<int64_t>(regions) + kSmallestRowBlock - 1) / kSmallestRowBlock;
  return row_blocks * planes_at_once < kMaximumBlocks ? row_blocks * planes_at_once : kMaximumBlocks;
}

}  // namespace chunkattn::cuda
