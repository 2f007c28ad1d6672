// Tile sizes of the decode kernels. Host and device read the same numbers; no CUDA types.
#pragma once

#include <cstddef>

namespace chunkattn::cuda {

// Rows are the queries of the heads that share a KV head: 16 to a warp, as mma.sync takes them.
//
// Few rows (decoding): every warp has all 16 rows and tiles of keys of its own, and the block adds up at the end. Many
// rows (chunks of prefill): every warp has 16 rows of its own and all share the tiles of keys.
//
// kBuffers are a ring of tiles of K and V in turn, all but one of which are under way: decoding costs what it takes to
// read the cache, so bytes under way are what counts. Blocks fit the 99 KB of sm_8x, and twice a Hopper multiprocessor.
template <int kHeadDim, bool kManyRows>
struct DecodeTile;

template <>
struct DecodeTile<64, false> {
  static constexpr int kWarps = 4, kBuffers = 9;
};

template <>
struct DecodeTile<128, false> {
  static constexpr int kWarps = 4, kBuffers = 5;
};

template <>
struct DecodeTile<256, false> {
  static constexpr int kWarps = 2, kBuffers = 4;
};

template <>
struct DecodeTile<64, true> {
  static constexpr int kWarps = 4, kBuffers = 5;
};

template <>
struct DecodeTile<128, true> {
  static constexpr int kWarps = 4, kBuffers = 3;
};

template <>
struct DecodeTile<256, true> {
  static constexpr int kWarps = 2, kBuffers = 3;
};

constexpr int kDecodeWarpRows = 16;

// Rows of a tile that lie in one page of any size that is a multiple of it.
constexpr int kDecodePageSpan = 16;

// What follows from them. Of a tile a warp copies 16 keys; with few rows and float8 twice as many, which are as many
// bytes.
template <int kHeadDim, bool kFloat8, bool kManyRows>
struct DecodeSizes {
  using Tile = DecodeTile<kHeadDim, kManyRows>;
  static constexpr int kWarps = Tile::kWarps;
  static constexpr int kBuffers = Tile::kBuffers;
  static constexpr int kTeamWarps = kManyRows ? kWarps : 1;  // warps that share tiles of keys
  static constexpr int kTeams = kWarps / kTeamWarps;
  static constexpr int kTileM = kDecodeWarpRows * kTeamWarps;
  static constexpr int kWarpKeys = kFloat8 && !kManyRows ? 32 : 16;
  static constexpr int kTileN = kWarpKeys * kTeamWarps;
  static constexpr size_t kQueryBytes = size_t{2} * kTileM * kHeadDim;  // of one regime
  static constexpr size_t kBufferBytes = size_t{kFloat8 ? 1 : 2} * kTileN * kHeadDim;
  static constexpr size_t kSharedBytes = 3 * kQueryBytes + kTeams * kBuffers * kBufferBytes;
  static_assert(kSharedBytes <= 97 * 1024);
};

}  // namespace chunkattn::cuda
