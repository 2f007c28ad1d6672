// Tiles of 16-bit elements in shared memory whose 16-byte chunks are permuted against bank conflicts.
#pragma once

#include <cstdint>

#include "cuda/common/rotary.cuh"

namespace chunkattn::cuda {

__device__ __forceinline__ void store_shared(uint32_t address, const uint4& chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(chunk.x), "r"(chunk.y), "r"(chunk.z),
               "r"(chunk.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint2& half_chunk) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(half_chunk.x), "r"(half_chunk.y) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t pair) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(pair) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint16_t element) {
  asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(address), "h"(element) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint8_t element) {
  asm volatile("st.shared.b8 [%0], %1;\n" ::"r"(address), "r"(static_cast<uint32_t>(element)) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(first), "f"(second) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 chunk;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(address));
  return chunk;
}

// [kRows][kColumns], row after row. The eight rows ldmatrix reads at once lie in different banks.
template <int kRows, int kColumns>
struct RowTile {
  static constexpr int kChunksPerRow = kColumns / kChunk;
  static constexpr int kPitch = kColumns * 2;
  static constexpr int kBytes = kRows * kPitch;
  static constexpr int kRowsPerLine = kChunksPerRow < 8 ? 8 / kChunksPerRow : 1;  // a line is 128 bytes, all banks
  static constexpr int kChunksPermuted = kChunksPerRow < 8 ? kChunksPerRow : 8;

  uint32_t base;

  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    return base + (row * kChunksPerRow + (chunk ^ (row / kRowsPerLine % kChunksPermuted))) * 16;
  }

  // address(row, chunk + chunks) from `address`, that of (row, chunk): `chunk` and `chunks` have no bit in common. Rows
  // eight apart lie 8 kPitch apart. So all fragments of a tile share a few registers of addresses.
  static __device__ __forceinline__ uint32_t along(uint32_t address, int chunks) {
    return (address ^ (chunks % kChunksPermuted * 16)) + chunks / kChunksPermuted * kChunksPermuted * 16;
  }
};

// [kHeadDim / 64][kRows][64]: panels of 128-byte rows with the 128-byte swizzle that wgmma and the copy engine share.
// The base is aligned to 1024 bytes.
template <int kRows, int kHeadDim>
struct PanelTile {
  static constexpr int kChunksPerRow = kHeadDim / kChunk;
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;

  uint32_t base;

  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    return base + chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
  }
};

}  // namespace chunkattn::cuda
