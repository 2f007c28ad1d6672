// The two matrix products of a warp's 16 rows with a tile of keys or values, from 16-bit or float8 tiles.
//
// float8 elements become float16 on their way from shared memory to registers, which keeps ldmatrix: a 16-bit unit of
// it is then a pair of elements. Two permutations make up for that. Queries lie with the elements of each 16 in the
// order in which the lanes receive those of the keys; and output columns come out in an order of their own
// (output_column).
#pragma once

#include <type_traits>

#include "cuda/common/float8.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/swizzled_tile.cuh"
#include "cuda/ptx/mma_sync.cuh"

namespace chunkattn::cuda {

template <typename T, bool kFloat8>
struct DecodeProducts {
  using Operand = std::conditional_t<kFloat8, Float16, T>;

  // Writes eight elements of a query row, its chunk-th, as the a operand wants them.
  template <typename Tile>
  static __device__ __forceinline__ void store_query_chunk(const Tile& q, int row, int chunk, const uint4& x) {
    if constexpr (kFloat8) {
      // Lane t of a quad receives elements 4t to 4t + 3 of a key: to the product they are 2t, 2t + 1, 2t + 8, 2t + 9.
      const uint32_t words[4] = {as_operand(x.x), as_operand(x.y), as_operand(x.z), as_operand(x.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(q.address(row, chunk / 2 * 2 + i % 2) + (chunk % 2 * 2 + i / 2) * 4, words[i]);
      }
    } else {
      store_shared(q.address(row, chunk), x);
    }
  }

  template <typename Tile>
  static __device__ __forceinline__ void store_query_element(const Tile& q, int row, int d, T x) {
    const uint32_t pair = as_operand(reinterpret_cast<const uint16_t&>(x));
    const int chunk = d / kChunk, word = d % kChunk / 2;
    const uint32_t address = kFloat8 ? q.address(row, chunk / 2 * 2 + word % 2) + (chunk % 2 * 2 + word / 2) * 4
                                     : q.address(row, chunk) + word * 4;
    store_shared(address + d % 2 * 2, static_cast<uint16_t>(pair));
  }

  // logits = Q K^T, of the rows from `row` on and all keys of the tile.
  template <int kBlocks, int kHeadDim, typename QueryTile, typename KeyTile>
  static __device__ __forceinline__ void multiply_keys(float (&logits)[1][kBlocks][4], const QueryTile& q, int row,
                                                       const KeyTile& k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[0][block][i] = 0.f;
    }
    constexpr int kStepsAtOnce = kFloat8 ? 2 : 1;  // 16 elements each
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; step += kStepsAtOnce) {
      uint32_t a[kStepsAtOnce][4];
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        ptx::ldmatrix_x4(a[i], q.address(row + lane % 16, (step + i) * 2 + lane / 16));
      }
#pragma unroll
      for (int pair = 0; pair < kBlocks / 2; ++pair) {
        uint32_t b[4];
        // 16-bit: a step is two chunks; float8: one chunk each.
        ptx::ldmatrix_x4(b, k.address(pair * 16 + lane % 8 + lane / 16 * 8, step * 2 / kStepsAtOnce + lane / 8 % 2));
        if constexpr (kFloat8) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ptx::mma_m16n8k16<Operand>(logits[0][2 * pair + i / 2], a[i % 2], half2_of_float8(b[i] & 0xffff),
                                       half2_of_float8(b[i] >> 16));
          }
        } else {
          ptx::mma_m16n8k16<Operand>(logits[0][2 * pair], a[0], b[0], b[1]);
          ptx::mma_m16n8k16<Operand>(logits[0][2 * pair + 1], a[0], b[2], b[3]);
        }
      }
    }
  }

  // output += P V; P is rounded to the operand's type.
  template <int kBlocks, int kDimBlocks, typename ValueTile>
  static __device__ __forceinline__ void multiply_values(float (&output)[1][kDimBlocks][4],
                                                         const float (&p)[1][kBlocks][4], const ValueTile& v) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kBlocks / 2; ++step) {
      uint32_t a[4];
      pack_operand<Operand>(a, p[0], step);
#pragma unroll
      for (int chunks = 0; chunks < ValueTile::kChunksPerRow; chunks += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v.address(step * 16 + lane % 16, chunks + lane / 16));
        if constexpr (kFloat8) {
          // A chunk has 16 columns. A unit holds two columns of a key: even ones make one block, odd ones the next.
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            constexpr uint32_t kEvenBytes = 0x4420, kOddBytes = 0x4431;
            const uint32_t bytes = i % 2 == 0 ? kEvenBytes : kOddBytes;
            ptx::mma_m16n8k16<Operand>(output[0][2 * chunks + i], a,
                                       half2_of_float8(__byte_perm(b[i / 2 * 2], 0, bytes)),
                                       half2_of_float8(__byte_perm(b[i / 2 * 2 + 1], 0, bytes)));
          }
        } else {
          ptx::mma_m16n8k16<Operand>(output[0][chunks], a, b[0], b[1]);
          ptx::mma_m16n8k16<Operand>(output[0][chunks + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // The column of this thread's element `i` % 2 of an output block.
  static __device__ __forceinline__ int output_column(int block, int i) {
    const int lane = threadIdx.x % 4;
    return kFloat8 ? block / 2 * 16 + lane * 4 + i % 2 * 2 + block % 2 : block * 8 + lane * 2 + i % 2;
  }

 private:
  // Two elements of T as operands: queries beyond float16's range become its largest.
  static __device__ __forceinline__ uint32_t as_operand(uint32_t pair) {
    if constexpr (std::is_same_v<T, Operand>) return pair;
    constexpr float kLargest = 65504.f;
    const float2 x = unpack2<T>(pair);
    return pack2<Float16>(fminf(fmaxf(x.x, -kLargest), kLargest), fminf(fmaxf(x.y, -kLargest), kLargest));
  }
};

}  // namespace chunkattn::cuda
