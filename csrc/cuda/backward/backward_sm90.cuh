// The Hopper backward main loop: wgmma, TMA and warp specialisation (sm_90a). What surrounds it is in
// backward_sm90_block.cuh.
//
// The consumer warpgroups each own 64 keys. They compute S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are
// already the a operands of dV += P^T dO and dK += dS^T Q and stay in registers; only dS goes through shared memory,
// for dQ = dS K, of which every warpgroup computes a part, from the dS of both.
//
// Either the warpgroups meet at each tile when they have stored their dS, and products are cut so that the tensor cores
// work beside the exponentials. Or (kDelayed) dQ is made while the next tile is worked on: then neither waits for the
// other unless it is a tile ahead, and one has the tensor cores while the other makes P and dS.
#pragma once

#include "cuda/backward/backward_sm90_block.cuh"
#include "cuda/ptx/mma_sync.cuh"

namespace chunkattn::cuda {

template <typename T, int kHeadDim, typename Keys>
struct BackwardSm90 {
  using Block = BackwardSm90Block<T, kHeadDim, Keys>;
  using Steps = typename Block::Steps;
  using Logits = typename Steps::Logits;
  using Operand = typename Steps::Operand;
  using KeyGradients = typename Steps::KeyGradients;
  using QueryGradients = typename Steps::QueryGradients;
  using Statistics = typename Block::Statistics;
  using Shifts = typename Block::Shifts;
  static_assert(Block::kTileN == Block::kConsumers * 64);

  static constexpr int kQueryArrivals = Block::kConsumers * 4;
  static constexpr int kDoutArrivals = Block::kConsumers * 4;

  const Block& block;

  __device__ __forceinline__ uint32_t dq_part(int warpgroup) const {
    return block.ds_tile(kBackwardLogitBuffers).base + warpgroup * Steps::kGradientPanels * Steps::kGradientPanelBytes;
  }

  __device__ __forceinline__ void add_query_gradients(int warpgroup) const {
    block.add_query_gradients(warpgroup, [&](int /*stage*/) { return dq_part(warpgroup); }, [](int /*stage*/) {});
  }

  __device__ __forceinline__ void store_query_gradients(const QueryGradients& dq, int warpgroup, int thread) const {
    Block::wait_part_free(warpgroup);
    Steps::store_part(dq, dq_part(warpgroup), thread);
    Block::pass_part_on(warpgroup);
  }

  // For K, V and the first Q, with its statistics.
  __device__ __forceinline__ void wait_for_first_tile() const {
    ptx::mbarrier_wait(&block.control.keys_full, 0);
    block.clear_missing_keys(threadIdx.x - (Block::kThreads - Block::kConsumerThreads));
    Ring<Block::kStages>{}.wait_full(block.control.query_full);
  }

  // S becomes P and goes into dV, kStepsAtOnce steps of 16 queries at a time: beside their products the next are made.
  // lse_log2: of the first step.
  static constexpr int kStepsAtOnce = 2, kValueProducts = Block::kTileM / 16 / kStepsAtOnce;
  __device__ __forceinline__ void add_values(KeyGradients& dv, Operand& p_operand, Logits& p, float4 lse_log2,
                                             float scale_log2, int stage, int thread) const {
    const Statistics& statistics = block.control.statistics[stage];
#pragma unroll
    for (int step = 0; step < Block::kTileM / 16; ++step) {
      const float4 next = Steps::per_query(statistics.lse_log2, (step + 1) % (Block::kTileM / 16), thread);
      Steps::exponentiate(p, step, lse_log2, scale_log2);
      pack_operand<T>(p_operand[step], p, step);
      lse_log2 = next;
      if (step % kStepsAtOnce == kStepsAtOnce - 1) {
        start_steps_by_rows<T, kStepsAtOnce>(dv[0], p_operand, block.dout_tile(stage), step + 1 - kStepsAtOnce);
      }
    }
  }

  // dP becomes dS, in registers and in shared memory. delta: of the first step.
  __device__ __forceinline__ void make_differences(Operand& ds_operand, Logits& ds, const Operand& p_operand,
                                                   float4 delta, int stage, uint32_t ds_row, int thread) const {
    const Statistics& statistics = block.control.statistics[stage];
#pragma unroll
    for (int step = 0; step < Block::kTileM / 16; ++step) {
      const float4 next = Steps::per_query(statistics.delta, (step + 1) % (Block::kTileM / 16), thread);
      Steps::subtract_delta(ds, step, delta);
      Steps::differentiate_rounded(ds_operand, p_operand, ds, step);
      Steps::store_ds(ds_row, ds_operand[step], step);
      delta = next;
    }
  }

  __device__ __forceinline__ void accumulate(KeyGradients& dk, KeyGradients& dv, int warpgroup) const {
    auto& control = block.control;
    const float scale_log2 = logit_scale(block.params.forward, block.own.batch) * kLog2E;
    const int thread = Block::warpgroup_thread();
    const int key_row = warpgroup * 64 + thread / 32 * 16;
    const uint32_t ds_row = Steps::ds_row(block.ds_tile(0), key_row, thread);
    Ring<Block::kStages> ring;
    int buffer = 0;
    wait_for_first_tile();
    Logits p, ds;
    start_rows_by_rows<T>(p, block.k_tile(), warpgroup * 64, block.q_tile(ring.index));
    ptx::wgmma_wait<0>();
    ptx::pin(p);
#pragma unroll 1
    for (bool more = true; more;) {
      const Statistics& statistics = control.statistics[ring.index];
      const bool masked = statistics.masked;
      // Values that queries have are read before they are needed: loads from shared memory come behind the operands of
      // products that have started.
      const float4 lse_log2 = Steps::per_query(statistics.lse_log2, 0, thread);
      ring.wait_full(control.dout_full);
      start_rows_by_rows<T>(ds, block.v_tile(), warpgroup * 64, block.dout_tile(ring.index));
      if (masked) block.hide_keys(p, statistics.tile, key_row);
      Operand p_operand, ds_operand;
      add_values(dv, p_operand, p, lse_log2, scale_log2, ring.index, thread);
      const float4 delta = Steps::per_query(statistics.delta, 0, thread);
      ptx::wgmma_wait<kValueProducts>();
      ptx::pin(ds);
      // dS is made of what P was rounded to: there are no registers to keep both.
      make_differences(ds_operand, ds, p_operand, delta, ring.index, ds_row + buffer * Steps::LogitShared::kBytes,
                       thread);
      start_operand_by_rows<T>(dk[0], ds_operand, block.q_tile(ring.index));
      ptx::fence_async_proxy();
      // Who stores dS in a buffer has met, at the tile before, everybody done with what was in it.
      Block::sync_consumers();
      QueryGradients dq;
      Steps::start_query_gradients(dq, block.ds_tile(buffer), block.k_tile(), warpgroup);
      ptx::mbarrier_arrive(control.statistics_empty + ring.index);
      ptx::wgmma_wait<1>();
      ptx::pin(dv[0]);
      ptx::pin(dk[0]);
      Block::arrive_warp(control.dout_empty + ring.index, thread);
      Block::arrive_warp(control.query_empty + ring.index, thread);
      ring.advance();
      buffer ^= 1;
      ring.wait_full(control.query_full);
      more = control.statistics[ring.index].plane >= 0;
      // Behind the last tile the next S is of no use and does no harm.
      start_rows_by_rows<T>(p, block.k_tile(), warpgroup * 64, block.q_tile(ring.index));
      ptx::wgmma_wait<1>();
      ptx::pin(dq[0]);
      store_query_gradients(dq, warpgroup, thread);
      ptx::wgmma_wait<0>();
      ptx::pin(p);
    }
  }

  // A warpgroup has stored its part of dS in a buffer, and finished with the dS of the other one: + 2 * warpgroup +
  // buffer.
  static constexpr int kDifferencesBarrier = 4;
  static __device__ __forceinline__ void pass_differences_on(int warpgroup, int buffer) {
    ptx::named_barrier_arrive(kDifferencesBarrier + 2 * warpgroup + buffer, Block::kConsumerThreads);
  }

  // Starts this warpgroup's part of dQ of the tile whose dS is in the buffer, once the other one has stored it.
  __device__ __forceinline__ void start_query_gradients(QueryGradients& dq, int buffer, int warpgroup) const {
    ptx::named_barrier_sync(kDifferencesBarrier + 2 * (1 - warpgroup) + buffer, Block::kConsumerThreads);
    Steps::start_query_gradients(dq, block.ds_tile(buffer), block.k_tile(), warpgroup);
  }

  // Start S^T less the log-sum-exp, of which `k` is the first 16 columns of the warpgroup's keys, and dP^T less delta.
  __device__ __forceinline__ void start_logits(Logits& p, const uint32_t (&k)[4], int warpgroup, int stage,
                                               int shift_stage) const {
    const auto q = block.q_tile(stage);
    ptx::wgmma_fence();
    block.control.shifts.start(p, Shifts::kLogSumExp, shift_stage);
    ptx::Wgmma<T, Block::kTileM>::rs_rows(p, k, ptx::descriptor_k_major(q.base), true);
    add_rows_by_rows<T, 1>(p, block.k_tile(), warpgroup * 64, q);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void start_differences(Logits& ds, int warpgroup, int stage, int shift_stage) const {
    ptx::wgmma_fence();
    block.control.shifts.start(ds, Shifts::kDelta, shift_stage);
    add_rows_by_rows<T, 0>(ds, block.v_tile(), warpgroup * 64, block.dout_tile(stage));
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void accumulate_delayed(KeyGradients& dk, KeyGradients& dv, int warpgroup) const {
    auto& control = block.control;
    const float scale_log2 = block.shifted_scale() * kLog2E;
    const int thread = Block::warpgroup_thread();
    const int key_row = warpgroup * 64 + thread / 32 * 16;
    const uint32_t ds_row = Steps::ds_row(block.ds_tile(0), key_row, thread);
    Ring<Block::kStages> ring;
    Ring<Shifts::kStages> shift_ring;
    int buffer = 0;
    wait_for_first_tile();
    Logits p, ds;
    uint32_t k[4];  // more does not fit
    ptx::ldmatrix_x4(k, block.k_tile().address(key_row + thread % 16, thread % 32 / 16));
    // With the first tile comes the dQ of none: whatever lies in the other buffer, and nobody adds it.
    pass_differences_on(warpgroup, 1);
#pragma unroll 1
    for (bool more = true; more;) {
      const Statistics& statistics = control.statistics[ring.index];
      const bool masked = statistics.masked;
      start_logits(p, k, warpgroup, ring.index, shift_ring.index);
      ring.wait_full(control.dout_full);
      start_differences(ds, warpgroup, ring.index, shift_ring.index);
      ptx::wgmma_wait<1>();
      ptx::pin(p);
      if (masked) block.hide_keys(p, statistics.tile, key_row);
      Steps::exponentiate(p, scale_log2);
      Operand p_operand, ds_operand;
      Steps::round(p_operand, p);
      start_operand_by_rows<T>(dv[0], p_operand, block.dout_tile(ring.index));
      // P gives way to dQ: dS is made of what P was rounded to.
      QueryGradients dq;
      start_query_gradients(dq, buffer ^ 1, warpgroup);
      // ptxas moves a wait up over arithmetic that does not need it, but not over the branches of a wait for a barrier.
      Ring<Block::kStages> next = ring;
      next.advance();
      next.wait_full(control.query_full);
      more = control.statistics[next.index].plane >= 0;
      ptx::wgmma_wait<2>();
      ptx::pin(ds);
      Block::arrive_warp(control.shifts.empty + shift_ring.index, thread);
      shift_ring.advance();
      Steps::differentiate_rounded(ds_operand, p_operand, ds);
      // The other warpgroup read what was in this buffer two tiles ago, and has passed on another dS since.
      Steps::store_ds(ds_row + buffer * Steps::LogitShared::kBytes, ds_operand);
      ptx::fence_async_proxy();
      start_operand_by_rows<T>(dk[0], ds_operand, block.q_tile(ring.index));
      ptx::mbarrier_arrive(control.statistics_empty + ring.index);
      ptx::wgmma_wait<2>();
      ptx::pin(dv[0]);
      Block::arrive_warp(control.dout_empty + ring.index, thread);
      ptx::wgmma_wait<1>();
      ptx::pin(dq[0]);
      pass_differences_on(warpgroup, buffer);
      buffer ^= 1;
      store_query_gradients(dq, warpgroup, thread);
      ptx::wgmma_wait<0>();
      ptx::pin(dk[0]);
      Block::arrive_warp(control.query_empty + ring.index, thread);
      ring = next;
    }
    QueryGradients dq;
    start_query_gradients(dq, buffer ^ 1, warpgroup);
    ptx::wgmma_wait<0>();
    ptx::pin(dq[0]);
    store_query_gradients(dq, warpgroup, thread);
  }

  __device__ __forceinline__ void consume(int warpgroup, float* staging, const BackwardVectorPaths& vectorized) const {
    KeyGradients dk = {}, dv = {};
    if constexpr (Block::kDelayed) {
      accumulate_delayed(dk, dv, warpgroup);
    } else {
      accumulate(dk, dv, warpgroup);
    }
    const typename Block::Staged staged{staging};
    static_assert(Block::Staged::kBytes <= Block::kTileBytes);
    const int thread = threadIdx.x - (Block::kThreads - Block::kConsumerThreads);
    const int key_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
    const auto sync = [] { Block::sync_consumers(); };
    sync();  // everybody has finished with the tiles
    block.template store_values<Block::kConsumerThreads>(dv, key_row, staged, vectorized, thread, sync);
    block.template store_keys<Block::kConsumerThreads>(dk, key_row, staged, vectorized, thread, sync);
    Block::wait_part_free(warpgroup);
  }
};

}  // namespace chunkattn::cuda
