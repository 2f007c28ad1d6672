// Tile sizes of the backward kernels. Host and device read the same numbers; no CUDA types.
#pragma once

#include <cstddef>

namespace chunkattn::cuda {

// The head dims the kernels are compiled for; others run in the next larger one, padded inside the kernel.
constexpr int kBackwardHeadDims[] = {64, 128, 256};

// The bounds that workspaces, made before a kernel is chosen, may rely on.
constexpr int kBackwardSmallestTileM = 32, kBackwardLargestTileM = 128;

// mma.sync, by the kilobytes of shared memory a block takes: 227 (sm_90), 163 (sm_80, sm_87, and sm_100 from the same
// PTX) or 99 (sm_86, sm_89, sm_120). dK and dV of a key tile stay in registers, 128 of a thread at head_dim 128 and
// 256, and S and dP take 64 to 128 more, so that a multiprocessor holds one block. k...Rows: warps one below the other
// in a product's result, the others side by side. Larger parts per warp use each fragment more often, and more keys in
// a tile mean fewer additions to dQ. With two stages the next Q or dO is copied while this one is used.
template <int kHeadDim, int kSharedKilobytes>
struct BackwardSm80Tile;

template <>
struct BackwardSm80Tile<64, 163> {
  static constexpr int kTileM = 128, kTileN = 128, kWarps = 8, kQueryStages = 2, kDoutStages = 2;
  static constexpr int kLogitRows = 4, kKeyRows = 4, kQueryRows = 4;
};

template <>
struct BackwardSm80Tile<128, 163> {
  static constexpr int kTileM = 64, kTileN = 128, kWarps = 8, kQueryStages = 2, kDoutStages = 2;
  static constexpr int kLogitRows = 2, kKeyRows = 4, kQueryRows = 2;
};

template <>
struct BackwardSm80Tile<256, 227> {
  static constexpr int kTileM = 64, kTileN = 64, kWarps = 8, kQueryStages = 2, kDoutStages = 2;
  static constexpr int kLogitRows = 4, kKeyRows = 2, kQueryRows = 2;
};

template <>
struct BackwardSm80Tile<256, 163> {
  static constexpr int kTileM = 64, kTileN = 64, kWarps = 8, kQueryStages = 1, kDoutStages = 1;
  static constexpr int kLogitRows = 4, kKeyRows = 2, kQueryRows = 2;
};

template <>
struct BackwardSm80Tile<64, 99> {
  static constexpr int kTileM = 64, kTileN = 128, kWarps = 8, kQueryStages = 2, kDoutStages = 1;
  static constexpr int kLogitRows = 2, kKeyRows = 4, kQueryRows = 2;
};

template <>
struct BackwardSm80Tile<128, 99> {
  static constexpr int kTileM = 64, kTileN = 64, kWarps = 8, kQueryStages = 2, kDoutStages = 1;
  static constexpr int kLogitRows = 4, kKeyRows = 2, kQueryRows = 2;
};

template <>
struct BackwardSm80Tile<256, 99> {
  static constexpr int kTileM = 32, kTileN = 32, kWarps = 4, kQueryStages = 2, kDoutStages = 1;
  static constexpr int kLogitRows = 2, kKeyRows = 1, kQueryRows = 1;
};

// wgmma: up to head_dim 128 each of two consumer warpgroups owns 64 keys. Its S, dP, dK, dV and part of dQ take 224
// registers of a thread. kDelayed: dQ is made a tile later. At head_dim 256 the two share 64 keys: dV, S and part of
// dQ, or dK, dP and part of dQ, take 192. A tile's keys are those of a cluster of kClusterSize blocks. At head_dim 256
// dQ lies in the memory of the dO it belongs to, elsewhere it has kGradientRows rows of its own.
template <int kHeadDim>
struct BackwardSm90Tile;

template <>
struct BackwardSm90Tile<64> {
  static constexpr int kClusterSize = 1, kTileM = 128, kTileN = 128, kStages = 2;
  static constexpr int kGradientRows = 128;
  static constexpr bool kDelayed = false;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
};

template <>
struct BackwardSm90Tile<128> {
  static constexpr int kClusterSize = 1, kTileM = 64, kTileN = 128, kStages = 3;
  static constexpr int kGradientRows = 64;
  static constexpr bool kDelayed = true;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
};

template <>
struct BackwardSm90Tile<256> {
  static constexpr int kClusterSize = 2, kTileM = 64, kTileN = 128, kStages = 2;
  static constexpr int kGradientRows = 0;
  static constexpr bool kDelayed = false;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
};

// Of dS: while dQ is made of one the next is written, or, at head_dim 256, one is the other block's.
constexpr int kBackwardLogitBuffers = 2;

// Q, dO, K, V, of the other block's K the columns of which this one adds dQ, and what stands between logits and
// gradients in 16 bits, dQ in 32.
template <int kHeadDim>
constexpr size_t backward_sm90_tile_bytes() {
  using Tile = BackwardSm90Tile<kHeadDim>;
  constexpr int kKeys = Tile::kTileN / Tile::kClusterSize;
  return 2 * (2 * (Tile::kStages * Tile::kTileM + kKeys) * kHeadDim +
              (Tile::kClusterSize - 1) * kKeys * kHeadDim / Tile::kClusterSize +
              kBackwardLogitBuffers * Tile::kTileM * kKeys) +
         4 * Tile::kGradientRows * kHeadDim;
}

// Q, dO, K, V, P and dS, in 16 bits.
template <int kHeadDim, int kSharedKilobytes>
constexpr size_t backward_sm80_shared_bytes() {
  using Tile = BackwardSm80Tile<kHeadDim, kSharedKilobytes>;
  constexpr int kQueryRows = (Tile::kQueryStages + Tile::kDoutStages) * Tile::kTileM;
  constexpr size_t kBytes = 2 * ((kQueryRows + 2 * Tile::kTileN) * kHeadDim + 2 * Tile::kTileM * Tile::kTileN);
  static_assert(kBytes <= kSharedKilobytes * 1024);
  return kBytes;
}

}  // namespace chunkattn::cuda
