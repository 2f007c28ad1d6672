// Adds up what several groups found of one sequence.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/common/softmax_state.cuh"
#include "cuda/decode/plan.h"
#include "cuda/decode/sequences.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace chunkattn::cuda {

// One thread block for every row of every sequence. Its warps, DecodePlan::combine_warps, share the row's groups.
template <typename T, int kHeadDim>
struct DecodeCombine {
  static constexpr int kPerLane = kHeadDim / 32;
  static constexpr int kAtOnce = 8;  // groups that a warp has under way

  static __device__ __forceinline__ void run(const DecodeParams& params, const DecodePlan& plan,
                                             const DecodeWorkspace& workspace, int index) {
    __shared__ float sums[kMostCombineWarps][kHeadDim];
    __shared__ SoftmaxState states[kMostCombineWarps];
    const int heads_per_kv = params.heads / params.kv_heads;
    const int head = index % params.heads;
    const int query = index / params.heads % params.seqlen_q;
    const int batch = index / params.heads / params.seqlen_q;
    const int kv_head = head / heads_per_kv;
    const int row = query * heads_per_kv + head % heads_per_kv;
    const int row_tile = row / plan.tile_rows;
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();

    const int* groups = workspace.groups + 2 * (static_cast<int64_t>(row_tile) * params.batch + batch);
    const int first = groups[0], count = groups[1] - first + 1;
    if (count == 1) return;
    // Rows fit 32 bits: they are float32 vectors in one workspace.
    const int slot_rows = plan.planes * plan.tile_rows;
    const int row_of_slot = (row_tile * params.kv_heads + kv_head) * plan.tile_rows + row % plan.tile_rows;
    const auto row_of_group = [&](int i) { return partial_slot(first + i, i == 0) * slot_rows + row_of_slot; };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = plan.combine_warps;
    SoftmaxState state{-INFINITY, 0.f};
    float sum[kPerLane] = {};
#pragma unroll 1
    for (int begin = warp; begin < count; begin += kAtOnce * warps) {
      SoftmaxState next_states[kAtOnce];
      float next[kAtOnce][kPerLane];
      float maximum = state.maximum;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int group = begin + i * warps;
        next_states[i] = {-INFINITY, 0.f};
        if (group < count) {
          const int partial = row_of_group(group);
          next_states[i] = reinterpret_cast<const SoftmaxState*>(workspace.states)[partial];
          load_vector(workspace.out + int64_t{partial} * kHeadDim + lane * kPerLane, next[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) maximum = fmaxf(maximum, next_states[i].maximum);
      const float shrink = state.weight_in(maximum);
      state = {maximum, state.sum * shrink};
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum[j] *= shrink;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i * warps >= count) continue;
        const float weight = next_states[i].weight_in(maximum);
        state.sum += next_states[i].sum * weight;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) sum[j] += next[i][j] * weight;
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sums[warp][lane * kPerLane + j] = sum[j];
    if (lane == 0) states[warp] = state;
    __syncthreads();
    SoftmaxState parts[kMostCombineWarps];
#pragma unroll
    for (int i = 0; i < kMostCombineWarps; ++i) parts[i] = i < warps ? states[i] : SoftmaxState{-INFINITY, 0.f};
    const SoftmaxState whole = whole_state(parts, kMostCombineWarps);
    const float v_scale = params.cache.v_scale == nullptr ? 1.f : __ldg(params.cache.v_scale + kv_head);
    const float factor = whole.normalise() * v_scale;
    T* out = static_cast<T*>(params.out) + batch * params.out_strides.batch + query * params.out_strides.seq +
             head * params.out_strides.head;
#pragma unroll 1
    for (int d = threadIdx.x; d < params.head_dim; d += warps * 32) {
      float x = 0.f;
#pragma unroll
      for (int i = 0; i < kMostCombineWarps; ++i) {
        if (i < warps) x += sums[i][d] * parts[i].weight_in(whole.maximum);
      }
      out[d] = from_float<T>(x * factor);
    }
    if (threadIdx.x == 0) {
      params.softmax_lse[(static_cast<int64_t>(batch) * params.heads + head) * params.seqlen_q + query] =
          whole.log_sum_exp();
    }
  }

  static __device__ __forceinline__ void load_vector(const float* source, float (&x)[kPerLane]) {
    if constexpr (kPerLane == 2) {
      const float2 pair = *reinterpret_cast<const float2*>(source);
      x[0] = pair.x, x[1] = pair.y;
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(source + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
      }
    }
  }
};

}  // namespace chunkattn::cuda
