// Blocks of rows, as both kernels that score take them from a schedule.
#pragma once

#include "cuda/common/tile_schedule.h"
#include "cuda/select/launchers.h"

namespace chunkattn::cuda {

struct RowBlock {
  int plane;  // of the pass; -1 behind the last block
  int kv_plane;
  int first_row;
  int end;        // every row's end is at most this; 0 where no row has to choose
  int whole_end;  // and at least this

  template <int kTileN>
  __device__ __forceinline__ int tiles() const {
    return (end + kTileN - 1) / kTileN;
  }
};

// Called by a whole warp.
template <int kTileM>
__device__ __forceinline__ RowBlock row_block(const SelectPass& pass, const TileSchedule& schedule, int64_t index) {
  if (index >= schedule.count()) return {-1, 0, 0, 0, 0};
  const TileSchedule::Item item = schedule.item(static_cast<int>(index));
  const int first_row = item.tile * kTileM;
  int end = 0, whole_end = INT32_MAX;
  for (int row = first_row + threadIdx.x % 32; row < first_row + kTileM; row += 32) {
    const int row_end = pass.row_end(item.plane, row);
    end = row_end > end ? row_end : end;
    whole_end = row_end < whole_end ? row_end : whole_end;
  }
  return {item.plane, pass.kv_plane(item.plane), first_row, __reduce_max_sync(0xffffffffu, end),
          __reduce_min_sync(0xffffffffu, whole_end)};
}

// Called by a whole warp: the index of the next block that nobody has taken.
__device__ __forceinline__ int64_t next_row_block(int* counter) {
  int taken = 0;
  if (threadIdx.x % 32 == 0) taken = atomicAdd(counter, 1);
  return static_cast<int64_t>(gridDim.x) + __shfl_sync(0xffffffffu, taken, 0);
}

// Scores of regions from a row's end on are no candidates. `first` is the region of the lane's first score.
template <int kBlocks>
__device__ __forceinline__ void hide_regions(float (&scores)[kBlocks][4], int first, const int (&end)[2]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + block * 8 + i % 2 >= end[i / 2]) scores[block][i] = -INFINITY;
    }
  }
}

__device__ __forceinline__ uint64_t* row_lists(const SelectPass& pass, const RowBlock& work, int row) {
  return pass.workspace.lists + (static_cast<int64_t>(work.plane) * pass.rule.regions + row) * pass.listed;
}

// Rows that have more to be scored against come first, and the key means that are read together fit the L2 cache.
inline TileSchedule row_schedule(const SelectPass& pass, int tile_m) {
  constexpr int64_t kCacheBytes = 32 << 20;
  const int64_t plane_bytes = static_cast<int64_t>(pass.rule.regions) * pass.workspace.padded_dim * 4;
  const int64_t fitting = plane_bytes < kCacheBytes ? kCacheBytes / plane_bytes : 1;
  const int64_t groups = (pass.planes + fitting - 1) / fitting;
  return {(pass.rule.regions + tile_m - 1) / tile_m, pass.planes,
          static_cast<int>((pass.planes + groups - 1) / groups)};
}

}  // namespace chunkattn::cuda
