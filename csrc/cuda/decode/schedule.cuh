// Which keys a thread block attends to. Every warp finds out by itself, from the lengths in global memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/decode/sequences.h"

namespace chunkattn::cuda {

// With tiles of kTileKeys keys. A small step is waiting for this, so divisions by what is known are not left to the
// device.
template <int kTileKeys, bool kManyRows>
class DecodeSchedule {
 public:
  // Called by whole warps.
  __device__ __forceinline__ DecodeSchedule(const DecodeParams& params, const DecodePlan& plan, int row_tile, int group)
      : params_(params),
        plan_(plan),
        queries_(kManyRows ? tile_queries(params, plan, row_tile) : TileQueries{0, params.seqlen_q}) {
    if (plan.splits > 0) {
      first_.batch = group / plan.splits;
      first_group_ = first_.batch * plan.splits;
      first_.tiles = tiles(first_.batch);
      shares_ = {first_.tiles, plan.splits < first_.tiles ? plan.splits : first_.tiles};
    } else {
      first_group_ = 0;
      int total = 0;
#pragma unroll 4
      for (int batch = threadIdx.x % 32; batch < params.batch; batch += 32) total += cost(batch) + tiles(batch);
      for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
      const int worth_it = (total + plan.min_tiles - 1) / plan.min_tiles;
      shares_ = {total, plan.groups < worth_it ? plan.groups : worth_it};
      if (group < shares_.groups) find_sequence(shares_.begin(group));
    }
    open_share(group - first_group_);
  }

  // Whether the group has keys at all, and its first piece.
  __device__ __forceinline__ bool has_work() const { return first_.end > first_.begin; }
  __device__ __forceinline__ const Piece& first() const { return first_; }

  // The piece behind one with something left.
  __device__ __forceinline__ Piece next(const Piece& piece) const {
    const int tiles = this->tiles(piece.batch + 1);
    const int share = piece.left - plan_.piece_cost;
    const int end = share < tiles ? share : tiles;
    return {piece.batch + 1, 0, end, tiles, piece.start + piece.tiles + plan_.piece_cost, attended(share - end)};
  }

  __device__ __forceinline__ SequenceLengths lengths(int batch) const {
    return sequence_lengths(params_, __ldg(params_.cache.cache_seqlens + batch));
  }

  __device__ __forceinline__ const TileQueries& queries() const { return queries_; }

  // The last group that attends to a sequence, of which a piece is known.
  __device__ __forceinline__ int last_group(const Piece& piece) const {
    return first_group_ + shares_.group_of(piece.start + piece.tiles - 1);
  }

 private:
  __device__ __forceinline__ int tiles(int batch) const {
    return visible_tiles(params_, kTileKeys, queries_, lengths(batch));
  }

  // What lies in front of a sequence's tiles.
  __device__ __forceinline__ int cost(int batch) const { return batch > 0 ? plan_.piece_cost : 0; }

  // Of a share's tiles behind a sequence the first belong to nobody.
  __device__ __forceinline__ int attended(int left) const { return left > plan_.piece_cost ? left : 0; }

  // The group's part of the sequence that first_ says.
  __device__ __forceinline__ void open_share(int group) {
    if (group >= shares_.groups) return;
    first_.begin = max(shares_.begin(group) - first_.start, 0);
    const int to = shares_.begin(group + 1) - first_.start;
    const int end = min(to, first_.tiles);
    first_.end = max(first_.begin, end);
    first_.left = attended(to - end);
  }

  // Sums up the tiles of sequences, 32 at a time, until tile `from` is among them.
  __device__ __forceinline__ void find_sequence(int from) {
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int begin = 0; begin < params_.batch; begin += 32) {
      const int own = begin + lane < params_.batch ? tiles(begin + lane) : 0;
      int sum = own > 0 ? cost(begin + lane) + own : 0;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
      }
      const unsigned behind = __ballot_sync(0xffffffffu, before + sum > from);
      if (behind != 0) {
        const int found = __ffs(static_cast<int>(behind)) - 1;
        first_.batch = begin + found;
        first_.tiles = __shfl_sync(0xffffffffu, own, found);
        first_.start = before + __shfl_sync(0xffffffffu, sum, found) - first_.tiles;
        return;
      }
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
  }

  const DecodeParams& params_;
  const DecodePlan& plan_;
  TileQueries queries_;
  int first_group_;  // of those that share_ divides among
  EqualShares shares_;
  Piece first_{};
};

}  // namespace chunkattn::cuda
