// Adds up what several groups found of one sequence.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/common/softmax_state.cuh"
#include "cuda/decode/plan.h"
#include "cuda/decode/sequences.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace chunkattn::cuda {

constexpr int kCombineWarps = 8;

// One thread block for every row of every sequence. Warps share its groups.
template <typename T, int kHeadDim>
struct DecodeCombine {
  static constexpr int kPerLane = kHeadDim / 32;
  static constexpr int kAtOnce = 8;  // groups of which a warp has the sums under way

  static __device__ __forceinline__ void run(const DecodeParams& params, const DecodePlan& plan,
                                             const DecodeWorkspace& workspace, int index) {
    __shared__ float sums[kCombineWarps][kHeadDim];
    __shared__ SoftmaxState states[kMaxDecodeGroups];
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
    const int64_t slot_rows = int64_t{plan.planes} * plan.tile_rows;
    const int64_t row_of_slot = (int64_t{row_tile} * params.kv_heads + kv_head) * plan.tile_rows + row % plan.tile_rows;
    const auto row_of_group = [&](int i) { return partial_slot(first + i, i == 0) * slot_rows + row_of_slot; };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float next[kAtOnce][kPerLane];
    const auto load_sums = [&](int begin) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int group = begin + i * kCombineWarps;
        if (group < count) {
          load_vector(workspace.out + row_of_group(group) * kHeadDim + lane * kPerLane, next[i]);
        }
      }
    };
    load_sums(warp);
    for (int i = threadIdx.x; i < count; i += kCombineWarps * 32) {
      states[i] = reinterpret_cast<const SoftmaxState*>(workspace.states)[row_of_group(i)];
    }
    __syncthreads();
    const SoftmaxState whole = whole_state(states, count);
    float sum[kPerLane] = {};
    for (int begin = warp; begin < count; begin += kAtOnce * kCombineWarps) {
      if (begin > warp) load_sums(begin);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int group = begin + i * kCombineWarps;
        if (group >= count) continue;
        const float weight = states[group].weight_in(whole.maximum);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) sum[j] += weight * next[i][j];
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sums[warp][lane * kPerLane + j] = sum[j];
    __syncthreads();
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

  // Of all groups' states; every warp finds it by itself.
  static __device__ __forceinline__ SoftmaxState whole_state(const SoftmaxState* states, int count) {
    const int lane = threadIdx.x % 32;
    SoftmaxState whole{-INFINITY, 0.f};
    for (int i = lane; i < count; i += 32) whole.maximum = fmaxf(whole.maximum, states[i].maximum);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      whole.maximum = fmaxf(whole.maximum, __shfl_xor_sync(0xffffffffu, whole.maximum, lanes));
    }
    for (int i = lane; i < count; i += 32) whole.sum += states[i].sum * states[i].weight_in(whole.maximum);
    for (int lanes = 16; lanes > 0; lanes /= 2) whole.sum += __shfl_xor_sync(0xffffffffu, whole.sum, lanes);
    return whole;
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
