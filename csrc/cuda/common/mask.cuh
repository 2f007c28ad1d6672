// Hides keys from queries in the accumulators of a key tile (layout: softmax.cuh).
#pragma once

#include "cuda/common/key_tiles.cuh"

namespace chunkattn::cuda {

// Sets the logits of keys beyond the segment, and of keys after the query where the tile is causal, to -inf.
// `warp_position` is the position of the warp's first row.
template <int kSlabs, int kBlocks>
__device__ __forceinline__ void hide_keys(float (&logits)[kSlabs][kBlocks][4], const KeyTile& tile, int warp_position) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = warp_position + slab * 16 + half * 8 + lane / 4;
      const int visible = tile.causal ? position + 1 - tile.begin : tile.valid;
      const int end = (visible < tile.valid ? visible : tile.valid) - lane % 4 * 2;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (block * 8 >= end) logits[slab][block][2 * half] = -INFINITY;
        if (block * 8 + 1 >= end) logits[slab][block][2 * half + 1] = -INFINITY;
      }
    }
  }
}

}  // namespace chunkattn::cuda
