// Adds up what several groups found of one sequence.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/common/softmax_state.cuh"
#include "cuda/decode/sequences.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace chunkattn::cuda {

constexpr int kCombineWarps = 8;

// One thread block for every row of every sequence. Warps share its groups.
template <typename T, int kHeadDim>
struct DecodeCombine {
  static constexpr int kPerLane = kHeadDim / 32;

  static __device__ __forceinline__ void run(const DecodeParams& params, const DecodePlan& plan,
                                             const DecodeWorkspace& workspace, int64_t index) {
    __shared__ float sums[kCombineWarps][kHeadDim];
    __shared__ float weights[kCombineWarps];
    const int heads_per_kv = params.heads / params.kv_heads;
    const int head = static_cast<int>(index % params.heads);
    const int query = static_cast<int>(index / params.heads % params.seqlen_q);
    const int batch = static_cast<int>(index / params.heads / params.seqlen_q);
    const int kv_head = head / heads_per_kv;
    const int row = query * heads_per_kv + head % heads_per_kv;
    const int row_tile = row / plan.tile_rows;
    ptx::wait_for_previous_kernel();

    const int* groups = workspace.groups + 2 * (static_cast<int64_t>(row_tile) * params.batch + batch);
    const int first = groups[0], last = groups[1];
    if (first == last) return;
    const auto row_of_group = [&](int group) {
      const int64_t plane = static_cast<int64_t>(partial_slot(group, group == first)) * plan.planes +
                            row_tile * params.kv_heads + kv_head;
      return plane * plan.tile_rows + row % plan.tile_rows;
    };
    const SoftmaxState* states = reinterpret_cast<const SoftmaxState*>(workspace.states);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float maximum = -INFINITY;
    for (int group = first + lane; group <= last; group += 32) {
      maximum = fmaxf(maximum, states[row_of_group(group)].maximum);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, lanes));
    }
    SoftmaxState whole{maximum, 0.f};
    float sum[kPerLane] = {};
#pragma unroll 4
    for (int group = first + warp; group <= last; group += kCombineWarps) {
      const int64_t from = row_of_group(group);
      const SoftmaxState state = states[from];
      const float weight = state.weight_in(maximum);
      whole.sum += weight * state.sum;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) sum[i] += weight * workspace.out[from * kHeadDim + i * 32 + lane];
    }
    if (lane == 0) weights[warp] = whole.sum;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[warp][i * 32 + lane] = sum[i];
    __syncthreads();
    whole.sum = 0.f;
#pragma unroll
    for (int i = 0; i < kCombineWarps; ++i) whole.sum += weights[i];
    const float v_scale = params.cache.v_scale == nullptr ? 1.f : __ldg(params.cache.v_scale + kv_head);
    const float factor = whole.normalise() * v_scale;
    T* out = static_cast<T*>(params.out) + batch * params.out_strides.batch + query * params.out_strides.seq +
             head * params.out_strides.head;
    for (int d = threadIdx.x; d < params.head_dim; d += kCombineWarps * 32) {
      float x = 0.f;
#pragma unroll
      for (int i = 0; i < kCombineWarps; ++i) x += sums[i][d];
      out[d] = from_float<T>(x * factor);
    }
    if (threadIdx.x == 0) {
      params.softmax_lse[(static_cast<int64_t>(batch) * params.heads + head) * params.seqlen_q + query] =
          whole.log_sum_exp();
    }
  }
};

}  // namespace chunkattn::cuda
