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

// Regions that a row lists at first. The walk over the lists of a group's rows ends when it has seen top_k regions: at
// rank top_k / merge if no two rows agree, at rank top_k if all do.
constexpr int kShortList = 64;
inline int short_list(int top_k, int merge) {
  const int fewest_ranks = (top_k - 1) / merge + 1;
  const int length = fewest_ranks < kShortList / 8 ? kShortList : 8 * fewest_ranks;
  return length <= top_k / 2 ? length : top_k;
}

// A row has room for what it keeps and for what it finds between two reductions: a power of two. A warp holds up to
// kMostInRegisters in registers.
constexpr int kFewInRegisters = 512;
constexpr int kMostInRegisters = 1024;
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

// A reduction may leave so many more than the row lists.
CHUNKATTN_HOST_DEVICE int reduction_slack(int listed) { return listed / 8 + 16; }

// A quarter of a row belongs to each lane of its quad. One that stored more has no room for its part of a tile.
CHUNKATTN_HOST_DEVICE int most_stored(int capacity, int columns) { return capacity / 4 - columns / 4; }

inline int candidates_per_row(int listed) {
  int capacity = kFewInRegisters;
  while (capacity < listed + listed / 4 + reduction_slack(listed) + 2 * kLargestTileColumns) capacity *= 2;
  return capacity;
}

// Blocks of kLargestRowBlock rows there is room for among the candidates.
inline int64_t candidate_blocks(int regions, int planes_at_once) {
  const int64_t row_blocks = (static_cast<int64_t>(regions) + kSmallestRowBlock - 1) / kSmallestRowBlock;
  return row_blocks * planes_at_once < kMaximumBlocks ? row_blocks * planes_at_once : kMaximumBlocks;
}

}  // namespace chunkattn::cuda
