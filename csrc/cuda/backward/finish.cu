// dQ: the sum of the regimes' float32 gradients, each rotated back to the queries that were passed in, and scaled.
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

template <typename T>
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

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    finish_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardWorkspace workspace,
                  int lanes, bool vectorized) {
  for_each_row(params.forward, lanes, [&](const RowOfThread& place) {
    if (!place.valid) return;
    const float scale = logit_scale(params.forward, place.batch);
    T* dq = place.of(static_cast<T*>(params.dq), params.dq_strides);
    if (vectorized) {
      finish_unit(params, workspace, place, scale, dq);
    } else {
      finish_elements(params, workspace, place, scale, dq);
    }
  });
}

}  // namespace

const char* launch_finish(const BackwardParams& params, const BackwardWorkspace& workspace,
                          const BackwardVectorPaths& vectorized, cudaStream_t stream) {
  return params.forward.dtype == DataType::kBFloat16
             ? launch_over_rows(&finish_kernel<__nv_bfloat16>, params, workspace, vectorized.finish, stream)
             : launch_over_rows(&finish_kernel<__half>, params, workspace, vectorized.finish, stream);
}

}  // namespace chunkattn::cuda
