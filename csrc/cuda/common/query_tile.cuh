// Query rows on their way into shared memory (rotated) and output rows on their way out.
#pragma once

#include "cuda/common/rotary.cuh"
#include "cuda/common/swizzled_tile.cuh"
#include "params.h"

namespace chunkattn::cuda {

// Writes the queries of the tile, rotated for `regime`, and zeros below its last query. `q` points at the tile's first
// row. Called by kThreads threads, `thread` counting them. kBatch rows of a thread are under way at a time: what it
// costs is the latency of their loads.
template <int kRows, int kThreads, int kBatch, typename T, typename Tile>
__device__ __forceinline__ void load_queries_vectorized(const Tile& shared, const ForwardParams& params, const T* q,
                                                        const QueryTile& queries, Regime regime, int thread) {
  constexpr int kUnits = Tile::kChunksPerRow / 2;
  constexpr int kStep = kThreads / kUnits;
  static_assert(kThreads % kUnits == 0, "a thread keeps its unit from row to row");
  const RotaryUnit unit = rotary_unit(params.rotary, thread % kUnits);
  const int valid = queries.end - queries.begin;
  const int head_dim = params.shape.head_dim;
  const int first_index = queries.begin % params.geometry.stride();
#pragma unroll 1
  for (int begin = thread / kUnits; begin < kRows; begin += kBatch * kStep) {
    uint4 first[kBatch], second[kBatch];
    Angles angles[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = begin + i * kStep;
      const T* source = q + row * params.q_strides.seq;
      first[i] = row < valid && unit.first < head_dim ? load_chunk(source, unit.first) : uint4{0, 0, 0, 0};
      second[i] = row < valid && unit.second < head_dim ? load_chunk(source, unit.second) : uint4{0, 0, 0, 0};
      if (row < valid && unit.rotated && !params.rotary.interleaved) {
        angles[i] = load_angles(params.rotary,
                                params.geometry.query_rotation_in_chunk(regime, first_index + row, params.q_rotated),
                                unit.first);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = begin + i * kStep;
      if (row >= kRows) break;
      if (row < valid && unit.rotated) {
        if (params.rotary.interleaved) {
          rotate_unit<T>(first[i], second[i], unit, params.rotary,
                         params.geometry.query_rotation_in_chunk(regime, first_index + row, params.q_rotated));
        } else {
          rotate_chunks<T>(first[i], second[i], angles[i]);
        }
      }
      store_shared(shared.address(row, unit.first / kChunk), first[i]);
      store_shared(shared.address(row, unit.second / kChunk), second[i]);
    }
  }
}

// The same for rows of any alignment.
template <int kRows, int kThreads, typename T, typename Tile>
__device__ __forceinline__ void load_queries_by_element(const Tile& shared, const ForwardParams& params, const T* q,
                                                        const QueryTile& queries, Regime regime, int thread) {
  constexpr int kHeadDim = Tile::kChunksPerRow * kChunk;
#pragma unroll 1
  for (int i = thread; i < kRows * kHeadDim; i += kThreads) {
    const int row = i / kHeadDim;
    const int d = i % kHeadDim;
    const int position = queries.begin + row;
    float x = 0.f;
    if (position < queries.end && d < params.shape.head_dim) {
      x = rotated_element(q + row * params.q_strides.seq, d, params.rotary,
                          params.geometry.query_rotation(regime, position, params.q_rotated));
    }
    const T rounded = from_float<T>(x);
    store_shared(shared.address(row, d / kChunk) + d % kChunk * 2, reinterpret_cast<const uint16_t&>(rounded));
  }
}

template <int kRows, int kThreads, int kBatch, typename T, typename Tile>
__device__ __forceinline__ void load_queries(const Tile& shared, const ForwardParams& params, const T* q,
                                             const QueryTile& queries, Regime regime, bool vectorized, int thread) {
  if (vectorized) {
    load_queries_vectorized<kRows, kThreads, kBatch>(shared, params, q, queries, regime, thread);
  } else {
    load_queries_by_element<kRows, kThreads>(shared, params, q, queries, regime, thread);
  }
}

// Writes a warp's normalised output rows into its own rows of `staging`. `first_row` is the warp's first row in the
// tile.
template <typename T, int kSlabs, int kBlocks, typename Tile>
__device__ __forceinline__ void stage_output(const Tile& staging, const float (&output)[kSlabs][kBlocks][4],
                                             int first_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + slab * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        store_shared(staging.address(row, block) + lane % 4 * 4,
                     pack2<T>(output[slab][block][2 * half], output[slab][block][2 * half + 1]));
      }
    }
  }
}

// Writes kRows staged rows of a warp to global memory, in whole chunks. `valid` says how many rows the tile has, `out`
// is its first row.
template <int kRows, typename T, typename Tile>
__device__ __forceinline__ void store_staged_output(const Tile& staging, T* out, int64_t stride, int first_row,
                                                    int valid, int head_dim, bool vectorized) {
  __syncwarp();
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < kRows * Tile::kChunksPerRow; i += 32) {
    const int row = first_row + i / Tile::kChunksPerRow;
    const int begin = i % Tile::kChunksPerRow * kChunk;
    if (row >= valid || begin >= head_dim) continue;
    const uint4 data = load_shared(staging.address(row, begin / kChunk));
    T* destination = out + row * stride + begin;
    if (vectorized) {
      *reinterpret_cast<uint4*>(destination) = data;
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const uint32_t word = j < 2 ? data.x : j < 4 ? data.y : j < 6 ? data.z : data.w;
        const uint16_t bits = static_cast<uint16_t>(j % 2 == 0 ? word : word >> 16);
        if (begin + j < head_dim) destination[j] = reinterpret_cast<const T&>(bits);
      }
    }
  }
}

template <typename T, int kSlabs, int kBlocks, typename Tile>
__device__ __forceinline__ void store_output(const Tile& staging, const float (&output)[kSlabs][kBlocks][4], T* out,
                                             int64_t stride, int first_row, int valid, int head_dim, bool vectorized) {
  stage_output<T>(staging, output, first_row);
  store_staged_output<kSlabs * 16>(staging, out, stride, first_row, valid, head_dim, vectorized);
}

// Writes a warp's log-sum-exp values; `lse_row` is the tile's first element.
template <int kSlabs>
__device__ __forceinline__ void store_lse(const float (&lse)[kSlabs][2], float* lse_row, int first_row, int valid) {
  const int lane = threadIdx.x % 32;
  if (lane % 4 != 0) return;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + slab * 16 + half * 8 + lane / 4;
      if (row < valid) lse_row[row] = lse[slab][half];
    }
  }
}

}  // namespace chunkattn::cuda
