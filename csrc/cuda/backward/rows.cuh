// How prepare and finish share the rows of Q among threads: a row goes to neighbouring lanes of a warp, each of which
// holds one rotary unit of it (rotary.cuh), or 16 elements where rows are not aligned.
#pragma once

#include <cuda_runtime.h>

#include "cuda/backward/gradient_pieces.h"
#include "cuda/backward/gradient_rows.h"
#include "cuda/backward/tile_sizes.h"
#include "cuda/common/launch_strided.cuh"
#include "cuda/common/packed_rows.h"
#include "cuda/common/rotary.cuh"

namespace chunkattn::cuda {

constexpr int kRowThreads = 256;

// A power of two, so that a row's lanes lie in one warp.
inline int lanes_per_row(int head_dim) {
  int lanes = 1;
  while (lanes * 2 * kChunk < head_dim) lanes *= 2;
  return lanes;
}

// Rows of q and heads of each batch entry: the grid's second dimension counts entries.
struct RowOfThread {
  int entry;     // of the tensors
  int batch;     // sequence
  int query;     // row of q
  int position;  // in the sequence; negative where it sees no key, or is nobody's
  int head;
  int unit;
  bool valid;  // there is such a row; the lane may still lie behind its end

  // The plane of what has a value for every row.
  __device__ __forceinline__ int64_t plane(const AttentionShape& shape) const {
    return static_cast<int64_t>(entry) * shape.heads + head;
  }

  // Of a row of q's shape.
  template <typename T>
  __device__ __forceinline__ T* of(T* tensor, const Strides& strides) const {
    return tensor + entry * strides.batch + query * strides.seq + head * strides.head;
  }
};

// Calls f(RowOfThread) for row `row` of every batch entry.
template <typename Function>
__device__ __forceinline__ void for_each_entry(const ForwardParams& forward, int64_t row, int lanes, Function&& f) {
  const AttentionShape& shape = forward.shape;
  const int64_t query = row / shape.heads;
  RowOfThread place{};
  place.query = static_cast<int>(query);
  place.head = static_cast<int>(row - query * shape.heads);
  place.unit = static_cast<int>(threadIdx.x) % lanes;
  place.valid = query < forward.rows_q();
  place.position = forward.first_position() + place.query;
  if (forward.packed() && place.valid) {
    place.batch = sequence_of_row(forward.cu_seqlens_q, shape.batch, place.query);
    const Sequence sequence = forward.sequence(place.batch);
    const int64_t index = place.query - sequence.first_q;
    const bool inside = index >= 0 && index < sequence.seqlen_q;
    place.position = inside ? static_cast<int>(index) + sequence.first_position() : -1;
  }
  for (place.entry = blockIdx.y; place.entry < forward.entries(); place.entry += gridDim.y) {
    if (!forward.packed()) place.batch = place.entry;
    f(place);
  }
}

// Calls f(RowOfThread) for this thread's rows; all lanes of a warp together.
template <typename Function>
__device__ __forceinline__ void for_each_row(const ForwardParams& forward, int lanes, Function&& f) {
  const int64_t rows_per_block = kRowThreads / lanes;
  const int64_t rows = static_cast<int64_t>(forward.rows_q()) * forward.shape.heads;
  for (int64_t first = blockIdx.x * rows_per_block; first < rows; first += gridDim.x * rows_per_block) {
    for_each_entry(forward, first + threadIdx.x / lanes, lanes, f);
  }
}

// Launches kernel(params, workspace, lanes, vectorized) over all rows. Returns null, or what failed.
template <typename Kernel>
const char* launch_over_rows(Kernel kernel, const BackwardParams& params, const BackwardWorkspace& workspace,
                             bool vectorized, int most_blocks, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int lanes = lanes_per_row(forward.shape.head_dim);
  const int64_t rows_per_block = kRowThreads / lanes;
  const int64_t rows = static_cast<int64_t>(forward.rows_q()) * forward.shape.heads;
  return launch_strided(kernel, (rows + rows_per_block - 1) / rows_per_block, most_blocks, forward.entries(),
                        kRowThreads, stream, params, workspace, lanes, vectorized);
}

// Calls f(regime, row in the tensors of the regime) for the regimes a query can be in.
template <typename Function>
__device__ __forceinline__ void for_each_regime(const BackwardParams& params, const BackwardWorkspace& workspace,
                                                const RowOfThread& place, Function&& f) {
  if (place.position < 0) return;
  const ForwardParams& forward = params.forward;
  const RegimeRows rows =
      forward.packed() ? packed_regime_rows(forward.geometry, place.position - place.query, kBackwardLargestTileM)
                       : workspace.rows;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const Regime regime = static_cast<Regime>(i);
    if (rows.has_row(regime, place.position)) f(regime, rows.row(regime, place.position));
  }
}

// The gradient of a row with respect to its queries of a regime.
struct GradientRow {
  float* data;
  int chunk_pitch;   // from one kChunk elements to the next
  bool evens_first;  // in a chunk: GradientRows

  __device__ __forceinline__ float* chunk(int d) const { return data + d / kChunk * chunk_pitch; }

  __device__ __forceinline__ float operator[](int d) const {
    return chunk(d)[evens_first ? GradientRows::place(d % kChunk) : d % kChunk];
  }
};
static_assert(GradientPieces::kColumns == kChunk && GradientRows::kColumns == kChunk);

// A chunk of GradientRows as they lie there becomes one of neighbouring columns.
__device__ __forceinline__ void order_columns(float (&x)[kChunk]) {
  float ordered[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) ordered[i] = x[GradientRows::place(i)];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = ordered[i];
}

__device__ __forceinline__ GradientRow gradient_row(const BackwardParams& params, const BackwardWorkspace& workspace,
                                                    const RowOfThread& place, Regime regime, int row) {
  const RegimeQueries& target = workspace.regimes[static_cast<int>(regime)];
  const int head_dim = params.forward.shape.head_dim;
  const int64_t plane = place.plane(params.forward.shape);
  if (workspace.dq_in_pieces) {
    return {target.dq + GradientPieces{target.rows, head_dim}.offset(plane, row), GradientPieces::kElements, false};
  }
  return {target.dq + GradientRows{target.rows, head_dim}.offset(plane, row), kChunk, true};
}

}  // namespace chunkattn::cuda
