// dQ: the sum of the regimes' float32 gradients, each rotated back to the queries that were passed in, and scaled. dK
// and dV where they are float32 sums: rounded.
#include "cuda/backward/launchers.h"
#include "cuda/backward/rows.cuh"
#include "cuda/common/softmax.cuh"

namespace chunkattn::cuda {

namespace {

// The table row by which the gradient of a regime is rotated back; negative: by none.
__device__ __forceinline__ int rotation_back(const ForwardParams& forward, const RowOfThread& place, Regime regime) {
  if (regime == Regime::kIntra && forward.q_rotated) return -1;
  return forward.geometry.query_rotation(regime, place.position, forward.q_rotated);
}

__device__ __forceinline__ void add(float (&sum)[kChunk], const float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum[i] += x[i];
}

template <typename T>
__device__ __forceinline__ uint4 pack_scaled(float (&x)[kChunk], float scale) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] *= scale;
  return pack8<T>(x);
}

// kInPieces: workspace.dq_in_pieces, as a constant so that the order of columns costs no registers.
template <typename T, bool kInPieces>
__device__ __forceinline__ void finish_unit(const BackwardParams& params, const BackwardWorkspace& workspace,
                                            const RowOfThread& place, float scale, T* dq) {
  const ForwardParams& forward = params.forward;
  const RotaryUnit unit = rotary_unit(forward.rotary, place.unit);
  if (unit.first >= forward.shape.head_dim) return;
  const bool has_second = unit.second < forward.shape.head_dim;
  // All loads first: a thread that waited for each regime's before asking for the next would leave memory idle.
  constexpr int kRegimes = 3;
  int table_row[kRegimes];
  float a[kRegimes][kChunk] = {}, b[kRegimes][kChunk] = {};
  for_each_regime(params, workspace, place, [&](Regime regime, int row) {
    const int i = static_cast<int>(regime);
    const GradientRow source = gradient_row(params, workspace, place, regime, row);
    table_row[i] = rotation_back(forward, place, regime);
    load_floats(source.chunk(unit.first), a[i]);
    if (has_second) load_floats(source.chunk(unit.second), b[i]);
  });
  float first[kChunk] = {}, second[kChunk] = {};
  for_each_regime(params, workspace, place, [&](Regime regime, int) {
    const int i = static_cast<int>(regime);
    if constexpr (!kInPieces) {
      order_columns(a[i]);
      order_columns(b[i]);
    }
    if (table_row[i] >= 0) rotate_unit_back(a[i], b[i], unit, forward.rotary, table_row[i]);
    add(first, a[i]);
    add(second, b[i]);
  });
  *reinterpret_cast<uint4*>(dq + unit.first) = pack_scaled<T>(first, scale);
  if (has_second) *reinterpret_cast<uint4*>(dq + unit.second) = pack_scaled<T>(second, scale);
}

// The same for rows of any alignment.
template <typename T>
__device__ __forceinline__ void finish_elements(const BackwardParams& params, const BackwardWorkspace& workspace,
                                                const RowOfThread& place, float scale, T* dq) {
  const ForwardParams& forward = params.forward;
  const int begin = place.unit * 2 * kChunk;
  for (int d = begin; d < forward.shape.head_dim && d < begin + 2 * kChunk; ++d) {
    float sum = 0.f;
    for_each_regime(params, workspace, place, [&](Regime regime, int row) {
      const GradientRow source = gradient_row(params, workspace, place, regime, row);
      const int table_row = rotation_back(forward, place, regime);
      sum += table_row < 0 ? source[d] : rotated_back_element(source, d, forward.rotary, table_row);
    });
    dq[d] = from_float<T>(sum * scale);
  }
}

template <typename T, bool kInPieces>
__global__ void __launch_bounds__(kRowThreads)
    finish_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardWorkspace workspace,
                  int lanes, bool vectorized) {
  for_each_row(params.forward, lanes, [&](const RowOfThread& place) {
    if (!place.valid) return;
    const float scale = logit_scale(params.forward, place.batch);
    T* dq = place.of(static_cast<T*>(params.dq), params.dq_strides);
    if (vectorized) {
      finish_unit<T, kInPieces>(params, workspace, place, scale, dq);
    } else {
      finish_elements(params, workspace, place, scale, dq);
    }
  });
}

// The grid's second dimension says which of the two, its third counts batch rows. A thread has a chunk of a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    round_key_gradients_kernel(const __grid_constant__ BackwardParams params, KeyGradientSums sums, bool dk_aligned,
                               bool dv_aligned) {
  const AttentionShape& shape = params.forward.shape;
  const bool keys = blockIdx.y == 0;
  const Strides& strides = keys ? params.dk_strides : params.dv_strides;
  const int chunks = (shape.head_dim + kChunk - 1) / kChunk;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int64_t row = index / chunks;  // of [seqlen, kv_heads]
  const int d = static_cast<int>(index % chunks) * kChunk;
  const int64_t token = row / shape.kv_heads;
  const int head = static_cast<int>(row % shape.kv_heads);
  if (token >= shape.seqlen_k) return;
  const GradientPieces pieces{shape.seqlen_k, shape.head_dim};
  for (int batch = blockIdx.z; batch < shape.batch; batch += gridDim.z) {
    const int64_t plane = static_cast<int64_t>(batch) * shape.kv_heads + head;
    const float* source = (keys ? sums.dk : sums.dv) + pieces.offset(plane, static_cast<int>(token)) +
                          d / GradientPieces::kColumns * GradientPieces::kElements;
    T* target = static_cast<T*>(keys ? params.dk : params.dv) + batch * strides.batch + token * strides.seq +
                head * strides.head + d;
    if (keys ? dk_aligned : dv_aligned) {
      float x[kChunk];
      load_floats(source, x);
      *reinterpret_cast<uint4*>(target) = pack8<T>(x);
    } else {
      for (int i = 0; i < kChunk && d + i < shape.head_dim; ++i) target[i] = from_float<T>(source[i]);
    }
  }
}

template <typename T>
const char* launch_round_key_gradients(const BackwardParams& params, const KeyGradientSums& sums, cudaStream_t stream) {
  const AttentionShape& shape = params.forward.shape;
  const int64_t chunks = (shape.head_dim + kChunk - 1) / kChunk;
  const int64_t threads = static_cast<int64_t>(shape.seqlen_k) * shape.kv_heads * chunks;
  const int64_t blocks = (threads + kRowThreads - 1) / kRowThreads;
  if (blocks > INT32_MAX) return "k has too many elements for one launch";
  const dim3 grid(static_cast<unsigned>(blocks), 2, shape.batch < 65535 ? shape.batch : 65535);
  round_key_gradients_kernel<T>
      <<<grid, kRowThreads, 0, stream>>>(params, sums, rows_aligned(params.dk, params.dk_strides, shape.head_dim),
                                         rows_aligned(params.dv, params.dv_strides, shape.head_dim));
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

const char* launch_round_key_gradients(const BackwardParams& params, const KeyGradientSums& sums, cudaStream_t stream) {
  return params.forward.dtype == DataType::kBFloat16 ? launch_round_key_gradients<BFloat16>(params, sums, stream)
                                                     : launch_round_key_gradients<Float16>(params, sums, stream);
}

const char* launch_finish(const BackwardParams& params, const BackwardWorkspace& workspace,
                          const BackwardVectorPaths& vectorized, int most_blocks, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    return launch_over_rows(kernel, params, workspace, vectorized.finish, most_blocks, stream);
  };
  if (params.forward.dtype == DataType::kBFloat16) {
    return workspace.dq_in_pieces ? launch(&finish_kernel<BFloat16, true>) : launch(&finish_kernel<BFloat16, false>);
  }
  return workspace.dq_in_pieces ? launch(&finish_kernel<Float16, true>) : launch(&finish_kernel<Float16, false>);
}

}  // namespace chunkattn::cuda
