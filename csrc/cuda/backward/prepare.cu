// What the backward main loop reads beside its inputs: delta = rowsum(dout * out), and Q rotated for every regime. And
// what it adds to: zeros.
#include "cuda/backward/launchers.h"
#include "cuda/backward/rows.cuh"

namespace chunkattn::cuda {

namespace {

// The sources of a row of q, and where its rotated copies go.
template <typename T>
struct PreparedRow {
  const BackwardParams& params;
  const BackwardWorkspace& workspace;
  const RowOfThread& place;
  const T* q;
  const T* out;
  const T* dout;

  // Calls copy(destination, table row) for each rotated copy. Queries that arrive rotated are their own intra copy.
  template <typename Copy>
  __device__ __forceinline__ void for_each_copy(Copy&& copy) const {
    const ForwardParams& forward = params.forward;
    for_each_regime(params, workspace, place, [&](Regime regime, int row) {
      if (regime == Regime::kIntra && forward.q_rotated) return;
      const RegimeQueries& target = workspace.regimes[static_cast<int>(regime)];
      copy(static_cast<T*>(const_cast<void*>(target.q)) + place.entry * target.q_strides.batch +
               row * target.q_strides.seq + place.head * target.q_strides.head,
           forward.geometry.query_rotation(regime, place.position, forward.q_rotated));
    });
  }
};

template <typename T>
__device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
  float x[kChunk], y[kChunk];
  unpack8<T>(a, x);
  unpack8<T>(b, y);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum += x[i] * y[i];
  return sum;
}

// Returns the unit's share of delta.
template <typename T>
__device__ __forceinline__ float prepare_unit(const PreparedRow<T>& row, int unit_index) {
  const ForwardParams& forward = row.params.forward;
  const RotaryUnit unit = rotary_unit(forward.rotary, unit_index);
  if (unit.first >= forward.shape.head_dim) return 0.f;
  const bool has_second = unit.second < forward.shape.head_dim;
  const uint4 zero{0, 0, 0, 0};
  const uint4 first = load_chunk(row.q, unit.first);
  const uint4 second = has_second ? load_chunk(row.q, unit.second) : zero;
  float delta = dot<T>(load_chunk(row.out, unit.first), load_chunk(row.dout, unit.first));
  if (has_second) delta += dot<T>(load_chunk(row.out, unit.second), load_chunk(row.dout, unit.second));
  row.for_each_copy([&](T* copy, int table_row) {
    uint4 rotated_first = first, rotated_second = second;
    rotate_unit<T>(rotated_first, rotated_second, unit, forward.rotary, table_row);
    *reinterpret_cast<uint4*>(copy + unit.first) = rotated_first;
    if (has_second) *reinterpret_cast<uint4*>(copy + unit.second) = rotated_second;
  });
  return delta;
}

// The same for rows of any alignment.
template <typename T>
__device__ __forceinline__ float prepare_elements(const PreparedRow<T>& row, int unit_index) {
  const ForwardParams& forward = row.params.forward;
  const int begin = unit_index * 2 * kChunk;
  float delta = 0.f;
  for (int d = begin; d < forward.shape.head_dim && d < begin + 2 * kChunk; ++d) {
    delta += to_float(row.out[d]) * to_float(row.dout[d]);
    row.for_each_copy(
        [&](T* copy, int table_row) { copy[d] = from_float<T>(rotated_element(row.q, d, forward.rotary, table_row)); });
  }
  return delta;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    prepare_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardWorkspace workspace,
                   int lanes, bool vectorized) {
  const ForwardParams& forward = params.forward;
  for_each_row(forward, lanes, [&](const RowOfThread& place) {
    float delta = 0.f;
    if (place.valid) {
      const PreparedRow<T> row{params,
                               workspace,
                               place,
                               place.of(static_cast<const T*>(forward.q), forward.q_strides),
                               place.of(static_cast<const T*>(forward.out), forward.out_strides),
                               place.of(static_cast<const T*>(params.dout), params.dout_strides)};
      delta = vectorized ? prepare_unit(row, place.unit) : prepare_elements(row, place.unit);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    }
    if (place.valid && place.unit == 0) {
      workspace.delta[place.plane(forward.shape) * forward.rows_q() + place.query] = delta;
    }
  });
}

constexpr int kClearThreads = 256;

__global__ void __launch_bounds__(kClearThreads) clear_kernel(uint4* memory, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kClearThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kClearThreads) {
    memory[i] = {0, 0, 0, 0};
  }
}

}  // namespace

const char* launch_clear(const BackwardWorkspace& workspace, int most_blocks, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(workspace.zeroed_bytes / sizeof(uint4));
  return launch_strided(&clear_kernel, (count + kClearThreads - 1) / kClearThreads, most_blocks, 1, kClearThreads,
                        stream, static_cast<uint4*>(workspace.zeroed), count);
}

const char* launch_prepare(const BackwardParams& params, const BackwardWorkspace& workspace,
                           const BackwardVectorPaths& vectorized, int most_blocks, cudaStream_t stream) {
  return params.forward.dtype == DataType::kBFloat16
             ? launch_over_rows(&prepare_kernel<BFloat16>, params, workspace, vectorized.prepare, most_blocks, stream)
             : launch_over_rows(&prepare_kernel<Float16>, params, workspace, vectorized.prepare, most_blocks, stream);
}

}  // namespace chunkattn::cuda
