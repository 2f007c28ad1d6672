// Gradients on their way to global memory.
#pragma once

#include "cuda/common/rotary.cuh"

namespace chunkattn::cuda {

// Adds to two neighbouring elements, `target` a multiple of 8 bytes. Nobody waits for the sum.
__device__ __forceinline__ void add_pair(float* target, float first, float second) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};\n" ::"l"(target), "f"(first), "f"(second) : "memory");
#else
  atomicAdd(target, first);
  atomicAdd(target + 1, second);
#endif
}

// The same of four, `target` a multiple of 16 bytes.
__device__ __forceinline__ void add_quad(float* target, const float4& x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(target), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
#else
  atomicAdd(target, x.x);
  atomicAdd(target + 1, x.y);
  atomicAdd(target + 2, x.z);
  atomicAdd(target + 3, x.w);
#endif
}

// Adds a warp's accumulators (layout: softmax.cuh) to GradientPieces. `target` is where this thread's first pair goes,
// `pitch` leads to the rows eight further on. Of the rows and columns from the thread's first row and the warp's first
// column on, `rows` and `columns` are there; kWhole says that all are, which leaves no branches.
template <bool kWhole, int kSlabs, int kBlocks>
__device__ __forceinline__ void add_pieces(float* target, int pitch, const float (&gradients)[kSlabs][kBlocks][4],
                                           int rows, int columns) {
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!kWhole && slab * 16 + half * 8 >= rows) continue;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (!kWhole && block * 8 >= columns) continue;
        add_pair(target + (slab * 2 + half) * pitch + block * 64, gradients[slab][block][2 * half],
                 gradients[slab][block][2 * half + 1]);
      }
    }
  }
}

// Who adds to the same elements in a fixed order takes turns: one thread waits until as many turns as stand before its
// own were passed on. Between that and the adds of other threads stand barriers, and __threadfence() behind the adds.
__device__ __forceinline__ void wait_for_turn(const int* turn, int mine) {
  int current;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(current) : "l"(turn) : "memory");
  } while (current < mine);
}

__device__ __forceinline__ void pass_turn_on(int* turn) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(turn) : "memory");
}

__device__ __forceinline__ void pass_turns_on(int* turn, int turns) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(turn), "r"(turns) : "memory");
}

// Where a block collects float32 rows, so that whoever stores them can see whole rotary pairs. The padding spreads the
// eight rows that a warp writes at once over the banks.
template <int kRows, int kHeadDim>
struct StagedRows {
  static constexpr int kPitch = kHeadDim + 8;
  static constexpr int kBytes = kRows * kPitch * 4;

  float* data;

  __device__ __forceinline__ float* row(int index) const { return data + index * kPitch; }

  template <int kSlabs, int kBlocks>
  __device__ __forceinline__ void collect(const float (&gradients)[kSlabs][kBlocks][4], int first_row, int first_column,
                                          float factor) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* target = row(first_row + slab * 16 + half * 8 + lane / 4) + first_column + lane % 4 * 2;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          const float* pair = &gradients[slab][block][2 * half];
          *reinterpret_cast<float2*>(target + block * 8) = {pair[0] * factor, pair[1] * factor};
        }
      }
    }
  }
};

// Writes the first `valid` staged rows by kThreads threads, `thread` counting them, rounded to T, rotated back by rows
// `table_row` on of the table unless that is negative. `vectorized` says that output rows, and pairs where they are
// rotated, fall on whole chunks.
template <int kThreads, typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void store_staged(const StagedRows<kRows, kHeadDim>& staged, T* out, int64_t stride,
                                             int valid, int head_dim, const RotaryTable& table, int table_row,
                                             bool vectorized, int thread) {
  constexpr int kUnits = kHeadDim / (2 * kChunk);
  const bool rotated = table_row >= 0;
#pragma unroll 4
  for (int i = thread; i < valid * kUnits; i += kThreads) {
    const int n = i / kUnits;
    const float* source = staged.row(n);
    T* destination = out + n * stride;
    if (vectorized) {
      const int begin = i % kUnits * 2 * kChunk;
      const RotaryUnit unit = rotated ? rotary_unit(table, i % kUnits) : RotaryUnit{begin, begin + kChunk, false};
      if (unit.first >= head_dim) continue;
      const bool has_second = unit.second < head_dim;
      float first[kChunk], second[kChunk];
      load_floats(source + unit.first, first);
      load_floats(source + (has_second ? unit.second : unit.first), second);
      if (rotated) rotate_unit_back(first, second, unit, table, table_row + n);
      *reinterpret_cast<uint4*>(destination + unit.first) = pack8<T>(first);
      if (has_second) *reinterpret_cast<uint4*>(destination + unit.second) = pack8<T>(second);
    } else {
      const int begin = i % kUnits * 2 * kChunk;
      for (int d = begin; d < head_dim && d < begin + 2 * kChunk; ++d) {
        destination[d] = from_float<T>(rotated ? rotated_back_element(source, d, table, table_row + n) : source[d]);
      }
    }
  }
}

// Adds staged rows to float32 rows of `pitch` elements, a multiple of 4: of the first `valid` every step-th from
// `first` on, row n to row row_of(n). Called by a warp. What it adds to an element comes from one lane, and so in
// order.
template <int kRows, int kHeadDim, typename RowOf>
__device__ __forceinline__ void add_staged(const StagedRows<kRows, kHeadDim>& staged, float* rows, int pitch, int valid,
                                           int first, int step, RowOf&& row_of) {
  constexpr int kVector = kHeadDim < 128 ? 2 : 4;
#pragma unroll 4
  for (int n = first; n < valid; n += step) {
    float* target = rows + static_cast<int64_t>(row_of(n)) * pitch;
#pragma unroll
    for (int part = 0; part < kHeadDim / (32 * kVector); ++part) {
      const int d = (part * 32 + static_cast<int>(threadIdx.x) % 32) * kVector;
      if (d >= pitch) continue;
      if constexpr (kVector == 2) {
        const float2 pair = *reinterpret_cast<const float2*>(staged.row(n) + d);
        add_pair(target + d, pair.x, pair.y);
      } else {
        add_quad(target + d, *reinterpret_cast<const float4*>(staged.row(n) + d));
      }
    }
  }
}

}  // namespace chunkattn::cuda
