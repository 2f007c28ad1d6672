// How prepare and finish share the rows of Q among threads: a row goes to neighbouring lanes of a warp, each of which
// holds one rotary unit of it (rotary.cuh), or 16 elements where rows are not aligned.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/rotary.cuh"

namespace chunkattn::cuda {

constexpr int kRowThreads = 256;

// A power of two, so that a row's lanes lie in one warp.
inline int lanes_per_row(int head_dim) {
  int lanes = 1;
  while (lanes * 2 * kChunk < head_dim) lanes *= 2;
  return lanes;
}

// Rows of q, [seqlen_q, heads] of each batch row: the grid's second dimension counts batch rows.
struct RowOfThread {
  int query;
  int head;
  int unit;
  bool valid;  // there is such a row; the lane may still lie behind its end
};

__device__ __forceinline__ RowOfThread row_of_thread(const AttentionShape& shape, int lanes) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / lanes) + threadIdx.x / lanes;
  const int64_t query = row / shape.heads;
  return {static_cast<int>(query), static_cast<int>(row - query * shape.heads), static_cast<int>(threadIdx.x) % lanes,
          query < shape.seqlen_q};
}

// Launches kernel(params, workspace, lanes, vectorized) over all rows. Returns null, or what failed.
template <typename Kernel>
const char* launch_over_rows(Kernel kernel, const BackwardParams& params, const BackwardWorkspace& workspace,
                             bool vectorized, cudaStream_t stream) {
  const AttentionShape& shape = params.forward.shape;
  const int lanes = lanes_per_row(shape.head_dim);
  const int64_t rows_per_block = kRowThreads / lanes;
  const int64_t blocks = (static_cast<int64_t>(shape.seqlen_q) * shape.heads + rows_per_block - 1) / rows_per_block;
  if (blocks > INT32_MAX) return "q has too many elements for one launch";
  const dim3 grid(static_cast<unsigned>(blocks), shape.batch < 65535 ? shape.batch : 65535);
  kernel<<<grid, kRowThreads, 0, stream>>>(params, workspace, lanes, vectorized);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Calls f(regime, row in the tensors of the regime) for the regimes a query can be in.
template <typename Function>
__device__ __forceinline__ void for_each_regime(const BackwardParams& params, const BackwardWorkspace& workspace,
                                                int query, Function&& f) {
  const int position = params.forward.first_position() + query;
  const RegimeRows& rows = workspace.rows;
  for (const Regime regime : {Regime::kIntra, Regime::kSucc, Regime::kInter}) {
    if (rows.has_row(regime, position)) f(regime, rows.row(regime, position));
  }
}

}  // namespace chunkattn::cuda
