#include <cuda_runtime.h>

#include "cuda/backward/schedule.h"
#include "cuda/common/packed_sequences.h"
#include "cuda/common/tile_schedule.h"

namespace chunkattn::cuda {

namespace {

constexpr int kThreads = 128;

// Called by all threads of a block: finds the sequence's place among all, and writes it down.
template <typename Tiles>
__device__ __forceinline__ void place_sequence(const Tiles& tiles, SequenceTiles* places, int batch, int sequences) {
  __shared__ int rank;
  __shared__ unsigned long long first_item;
  if (threadIdx.x == 0) rank = 0, first_item = 0;
  __syncthreads();
  SequencePlace place{};
  for (int other = threadIdx.x; other < sequences; other += kThreads) place.meet(tiles, batch, other);
  if (place.rank > 0) {
    atomicAdd(&rank, place.rank);
    atomicAdd(&first_item, static_cast<unsigned long long>(place.first_item));
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  // Offsets that are none may promise more items than there can be.
  const auto cut = [](unsigned long long item) { return static_cast<int>(item < INT32_MAX ? item : INT32_MAX); };
  const int count = tiles.count(batch);
  places[rank] = {cut(first_item), batch, count, tiles.group(batch)};
  if (rank + 1 < sequences) return;
  places[sequences] = {cut(first_item + static_cast<unsigned long long>(count) * tiles.planes()), 0, 0, 0};
}

// All zeros, whatever the type of 16 bits.
__device__ __forceinline__ void clear_rows(void* tensor, const Strides& strides, int64_t first_row, int rows, int heads,
                                           int head_dim) {
  for (int64_t i = threadIdx.x; i < int64_t{rows} * heads * head_dim; i += kThreads) {
    const int d = static_cast<int>(i % head_dim);
    const int head = static_cast<int>(i / head_dim % heads);
    const int64_t row = first_row + i / head_dim / heads;
    static_cast<uint16_t*>(tensor)[row * strides.seq + head * strides.head + d] = 0;
  }
}

// A thread block for each sequence.
__global__ void __launch_bounds__(kThreads)
    packed_queries_kernel(const __grid_constant__ ForwardParams params, int tile_m) {
  const int batch = static_cast<int>(blockIdx.x);
  const AttentionShape& shape = params.shape;
  place_sequence(PackedQueryTiles{params, tile_m}, params.sequence_tiles, batch, shape.batch);
  const Sequence sequence = params.sequence(batch);
  const int before = -sequence.first_position();
  const int unseeing = before < sequence.seqlen_q ? before : sequence.seqlen_q;
  if (unseeing <= 0) return;
  clear_rows(params.out, params.out_strides, sequence.first_q, unseeing, shape.heads, shape.head_dim);
  for (int head = 0; head < shape.heads; ++head) {
    float* const lse = params.softmax_lse + params.lse_row(batch, head);
    for (int query = threadIdx.x; query < unseeing; query += kThreads) lse[query] = -INFINITY;
  }
}

__global__ void __launch_bounds__(kThreads)
    packed_keys_kernel(const __grid_constant__ BackwardParams params,
                       const __grid_constant__ BackwardWorkspace workspace, int tile_n) {
  const int batch = static_cast<int>(blockIdx.x);
  const AttentionShape& shape = params.forward.shape;
  const PackedKeyTiles tiles{params, tile_n, workspace.turns != nullptr};
  place_sequence(tiles, workspace.sequence_tiles, batch, shape.batch);
  const Sequence sequence = params.forward.sequence(batch);
  if (sequence.seqlen_q > 0) return;
  clear_rows(params.dk, params.dk_strides, sequence.first_k, sequence.seqlen_k, shape.kv_heads, shape.head_dim);
  clear_rows(params.dv, params.dv_strides, sequence.first_k, sequence.seqlen_k, shape.kv_heads, shape.head_dim);
}

const char* launched() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

const char* launch_packed_queries(const ForwardParams& params, int tile_m, cudaStream_t stream) {
  packed_queries_kernel<<<params.shape.batch, kThreads, 0, stream>>>(params, tile_m);
  return launched();
}

const char* launch_packed_keys(const BackwardParams& params, const BackwardWorkspace& workspace, int tile_n,
                               cudaStream_t stream) {
  packed_keys_kernel<<<params.forward.shape.batch, kThreads, 0, stream>>>(params, workspace, tile_n);
  return launched();
}

}  // namespace chunkattn::cuda
