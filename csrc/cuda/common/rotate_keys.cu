// Rotates raw keys, each by row position % stride of the table, into a copy of their own.
#include <cuda_runtime.h>

#include <climits>

#include "cuda/common/launch_strided.cuh"
#include "cuda/common/packed_rows.h"
#include "cuda/common/rotary.cuh"
#include "cuda/common/rotate_keys.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

constexpr int kThreads = 256;

__host__ __device__ inline int units_per_row(int head_dim) { return (head_dim + 2 * kChunk - 1) / (2 * kChunk); }

// The position of a row of k in its sequence; negative where it is nobody's.
__device__ __forceinline__ int key_position(const ForwardParams& params, int row) {
  if (!params.packed()) return row;
  const Sequence sequence = params.sequence(sequence_of_row(params.cu_seqlens_k, params.shape.batch, row));
  const int64_t position = row - sequence.first_k;
  return position < sequence.seqlen_k ? static_cast<int>(position) : -1;
}

// One thread per unit of a row (rotary.cuh), or per 16 elements where rows are not aligned.
template <typename T>
__global__ void __launch_bounds__(kThreads) rotate_keys_kernel(const __grid_constant__ ForwardParams params, T* rotated,
                                                               const Strides rotated_strides, bool vectorized) {
  const int head_dim = params.shape.head_dim;
  const int units = units_per_row(head_dim);
  const int64_t per_batch = static_cast<int64_t>(params.rows_k()) * params.shape.kv_heads * units;
  for (int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x; index < per_batch;
       index += int64_t{gridDim.x} * kThreads) {
    const int unit_index = static_cast<int>(index % units);
    const int64_t token_head = index / units;
    const int head = static_cast<int>(token_head % params.shape.kv_heads);
    const int key = static_cast<int>(token_head / params.shape.kv_heads);
    const int position = key_position(params, key);
    if (position < 0) continue;
    const int row = params.geometry.key_row(position);
    for (int batch = blockIdx.y; batch < params.entries(); batch += gridDim.y) {
      const T* source = static_cast<const T*>(params.k) + batch * params.k_strides.batch + key * params.k_strides.seq +
                        head * params.k_strides.head;
      T* destination =
          rotated + batch * rotated_strides.batch + key * rotated_strides.seq + head * rotated_strides.head;
      if (vectorized) {
        const RotaryUnit unit = rotary_unit(params.rotary, unit_index);
        const bool has_second = unit.second < head_dim;
        uint4 first = load_chunk(source, unit.first);
        uint4 second = has_second ? load_chunk(source, unit.second) : uint4{0, 0, 0, 0};
        rotate_unit<T>(first, second, unit, params.rotary, row);
        *reinterpret_cast<uint4*>(destination + unit.first) = first;
        if (has_second) *reinterpret_cast<uint4*>(destination + unit.second) = second;
      } else {
        const int begin = unit_index * 2 * kChunk;
        for (int d = begin; d < head_dim && d < begin + 2 * kChunk; ++d) {
          destination[d] = from_float<T>(rotated_element(source, d, params.rotary, row));
        }
      }
    }
  }
}

template <typename T>
const char* launch(const ForwardParams& params, void* rotated, const Strides& rotated_strides, int most_blocks,
                   cudaStream_t stream) {
  const int head_dim = params.shape.head_dim;
  const int64_t threads = static_cast<int64_t>(params.rows_k()) * params.shape.kv_heads * units_per_row(head_dim);
  const bool vectorized = rows_aligned(params.k, params.k_strides, head_dim) &&
                          rows_aligned(rotated, rotated_strides, head_dim) && rotation_aligned(params.rotary);
  return launch_strided(&rotate_keys_kernel<T>, (threads + kThreads - 1) / kThreads, most_blocks, params.entries(),
                        kThreads, stream, params, static_cast<T*>(rotated), rotated_strides, vectorized);
}

}  // namespace

const char* launch_rotate_keys(const ForwardParams& params, void* rotated, const Strides& rotated_strides,
                               int most_blocks, cudaStream_t stream) {
  switch (params.dtype) {
    case DataType::kBFloat16:
      return launch<BFloat16>(params, rotated, rotated_strides, most_blocks, stream);
    case DataType::kFloat16:
      return launch<Float16>(params, rotated, rotated_strides, most_blocks, stream);
    default:
      return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
}

const char* rotate_keys(const ForwardParams& params, void* rotated, const Strides& rotated_strides, void* stream) {
  return launch_rotate_keys(params, rotated, rotated_strides, INT_MAX, static_cast<cudaStream_t>(stream));
}

}  // namespace chunkattn::cuda
