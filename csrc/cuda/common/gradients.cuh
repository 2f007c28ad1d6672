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

// Adds a warp's accumulators, times a factor, to GradientPieces of a plane whose rows do not follow one another: row n
// to row row_of(n). This thread's rows and columns of the tile begin at `row` and `column`; those from `rows` and
// `columns` on are not there. row_by_row: rows whose places among eight differ are added one after the other.
template <typename Pieces, int kSlabs, int kBlocks, typename RowOf>
__device__ __forceinline__ void add_rows(float* tensor, const Pieces& pieces, int64_t plane,
                                         const float (&gradients)[kSlabs][kBlocks][4], float factor, int row,
                                         int column, int rows, int columns, bool row_by_row, RowOf&& row_of) {
  const int place = threadIdx.x % 32 / 4;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = row + slab * 16 + half * 8 + place;
#pragma unroll 1
      for (int turn = 0; turn < (row_by_row ? 8 : 1); ++turn) {
        if (row_by_row) __syncwarp();
        if (n >= rows || (row_by_row && place != turn)) continue;
        float* target = tensor + pieces.offset(plane, row_of(n)) + column / Pieces::kColumns * Pieces::kElements +
                        threadIdx.x % 4 * 2;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          if (column + block * 8 >= columns) continue;
          add_pair(target + block * Pieces::kElements, gradients[slab][block][2 * half] * factor,
                   gradients[slab][block][2 * half + 1] * factor);
        }
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

// Rotates a warp's accumulators of whole rows back by rows `table_row` on of the table, in the rotate-half layout of
// all columns: this thread has both elements of its pairs. Its rows of the tile begin at `row`, of which `rows` are
// there.
template <int kBlocks>
__device__ __forceinline__ void rotate_rows_back(float (&gradients)[kBlocks][4], const RotaryTable& table,
                                                 int table_row, int row, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = row + half * 8 + lane / 4;
    if (n >= rows) continue;
    const int64_t index = (table_row + n) * table.row_stride + lane % 4 * 2;
#pragma unroll
    for (int block = 0; block < kBlocks / 2; ++block) {
      const float2 cos = __ldg(reinterpret_cast<const float2*>(table.cos + index + block * 8));
      const float2 sin = __ldg(reinterpret_cast<const float2*>(table.sin + index + block * 8));
      float* first = &gradients[block][2 * half];
      float* second = &gradients[block + kBlocks / 2][2 * half];
      rotate_pair_back(first[0], second[0], cos.x, sin.x);
      rotate_pair_back(first[1], second[1], cos.y, sin.y);
    }
  }
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

}  // namespace chunkattn::cuda
