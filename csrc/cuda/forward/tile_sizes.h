// Tile sizes of the forward kernels. Host and device read the same numbers; no CUDA types.
#pragma once

namespace chunkattn::cuda {

// The head dims the kernels are compiled for; others run in the next larger one, padded inside the kernel.
constexpr int kForwardHeadDims[] = {64, 128, 256};

// mma.sync: 32 rows per warp use each fragment of K and V twice. Output and logits take 128 registers of a thread at
// head_dim 64 and 192 at 128, and two blocks share a multiprocessor. head_dim 256 has room for 16 rows per warp only,
// and 96 KB of shared memory is what fits every sm_8x.
template <int kHeadDim>
struct ForwardSm80Tile;

template <>
struct ForwardSm80Tile<64> {
  static constexpr int kTileM = 128, kTileN = 64, kWarps = 4;
};

template <>
struct ForwardSm80Tile<128> {
  static constexpr int kTileM = 128, kTileN = 64, kWarps = 4;
};

template <>
struct ForwardSm80Tile<256> {
  static constexpr int kTileM = 64, kTileN = 64, kWarps = 4;
};

// wgmma: each consumer warpgroup owns 64 rows. 227 KB of shared memory hold the rotations of Q in flight (the one
// in use and two ahead, so that short segments do not wait for theirs), and the stages of K and of V; at head_dim 256
// there is room for one Q. Registers per thread times threads fit 64 K.
// kQueryBatch rows per thread are under way when queries are prepared, 24 registers each.
template <int kHeadDim>
struct ForwardSm90Tile;

template <>
struct ForwardSm90Tile<64> {
  static constexpr int kTileM = 192, kTileN = 128, kConsumers = 3, kStages = 3, kQueryStages = 3;
  static constexpr int kConsumerRegisters = 160, kProducerRegisters = 32, kQueryBatch = 1;
};

template <>
struct ForwardSm90Tile<128> {
  static constexpr int kTileM = 128, kTileN = 128, kConsumers = 2, kStages = 2, kQueryStages = 3;
  static constexpr int kConsumerRegisters = 200, kProducerRegisters = 104, kQueryBatch = 2;
};

template <>
struct ForwardSm90Tile<256> {
  static constexpr int kTileM = 128, kTileN = 80, kConsumers = 2, kStages = 2, kQueryStages = 1;
  static constexpr int kConsumerRegisters = 216, kProducerRegisters = 72, kQueryBatch = 1;
};

}  // namespace chunkattn::cuda
