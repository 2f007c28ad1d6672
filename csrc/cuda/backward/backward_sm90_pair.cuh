// The Hopper backward main loop for head_dim 256: wgmma, TMA, warp specialisation and pairs of thread blocks (sm_90a).
// What surrounds it is in backward_sm90_block.cuh.
//
// A block's 64 keys are as many as dK and dV leave registers for, so both consumer warpgroups work on all of them. The
// first makes S^T = K Q^T and dV += P^T dO, the second dP^T = V dO^T and dK += dS^T Q: each result is the a operand of
// what follows and stays in registers. The second needs P for dS = P (dP - delta); a thread of the first holds just
// what the same thread of the second lacks, and hands it on, rounded.
//
// dQ = dS K would be added to by every block, and that is more than the L2 cache can take. So the two blocks of a
// cluster send each other their dS, and each adds half the columns of dQ for the keys of both, a quarter for each
// warpgroup. The next S and dP are under way meanwhile.
#pragma once

#include "cuda/backward/backward_sm90_block.cuh"

namespace chunkattn::cuda {

template <typename T, int kHeadDim, typename Keys>
struct BackwardSm90Pair {
  using Block = BackwardSm90Block<T, kHeadDim, Keys>;
  using Steps = typename Block::Steps;
  using Logits = typename Steps::Logits;
  using Operand = typename Steps::Operand;
  using KeyGradients = typename Steps::KeyGradients;
  using QueryGradients = typename Steps::QueryGradients;
  using Statistics = typename Block::Statistics;
  using Stages = Ring<Block::kStages>;
  static_assert(Block::kTileM == 64 && Block::kBlockKeys == 64 && Block::kClusterSize == 2);

  static constexpr int kValues = 0, kKeys = 1;  // the warpgroups, by what they compute the gradient of

  // The second warpgroup says that a tile of Q may be overwritten, the warps of dQ that one of dO may: each to the
  // block that loads the half in which its part lay.
  static constexpr int kQueryArrivals = 4, kDoutArrivals = 1;

  static constexpr int kWeightsBarrier = 4;       // P is handed on
  static constexpr int kDifferencesBarrier = 5;   // dS is in shared memory, for the warpgroup that did not make it
  static constexpr int kStoredBarrier = 10;       // and for the one that did
  static constexpr int kStagedBarrier = 6;        // + warpgroup: its gradient is in shared memory
  static constexpr int kWeightsFreeBarrier = 11;  // the warpgroup that made dS has read it: P may lie there again
  static constexpr int kDoutReadBarrier = 12;     // dV has read dO: dQ may lie there

  const Block& block;

  // P, later dS, of this block's keys; and dS of the other's. A warp's 16 keys are 2 KB, of P in its own order.
  __device__ __forceinline__ typename Steps::LogitShared ds_tile() const { return block.ds_tile(0); }
  __device__ __forceinline__ typename Steps::LogitShared other_ds_tile() const { return block.ds_tile(1); }
  static __device__ __forceinline__ uint32_t warp_chunk(uint32_t tile, int step, int thread) {
    return tile + thread / 32 * 2048 + step * 512 + thread % 32 * 16;
  }

  // Where a warpgroup leaves its part of dQ: in the tile of dO that both have read.
  __device__ __forceinline__ uint32_t dq_part(int warpgroup, int stage) const {
    static_assert(Block::kConsumers * Steps::kGradientPanels * Steps::kGradientPanelBytes ==
                  Block::QueryShared::kBytes);
    return block.dout_tile(stage).base + warpgroup * Steps::kGradientPanels * Steps::kGradientPanelBytes;
  }

  __device__ __forceinline__ void add_query_gradients(int warpgroup) const {
    block.add_query_gradients(
        warpgroup, [&](int stage) { return dq_part(warpgroup, stage); },
        [&](int stage) {
          // The block that loads this half of dO.
          Block::arrive_warp_in_block(block.control.dout_empty + stage, warpgroup, threadIdx.x);
        });
  }

  // S^T becomes P^T.
  __device__ __forceinline__ void make_weights(Operand& operand, Logits& logits, const Statistics& statistics,
                                               float scale_log2, int thread) const {
    constexpr int kSteps = Block::kTileM / 16;
    float4 lse_log2[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) lse_log2[step] = Steps::per_query(statistics.lse_log2, step, thread);
    if (statistics.masked) block.hide_keys(logits, statistics.tile, thread / 32 * 16);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) Steps::exponentiate(logits, step, lse_log2[step], scale_log2);
    Steps::round(operand, logits);
  }

  __device__ __forceinline__ void hand_on(const Operand& weights, int thread) const {
#pragma unroll
    for (int step = 0; step < Block::kTileM / 16; ++step) {
      store_shared(warp_chunk(ds_tile().base, step, thread),
                   uint4{weights[step][0], weights[step][1], weights[step][2], weights[step][3]});
    }
    ptx::named_barrier_arrive(kWeightsBarrier, Block::kConsumerThreads);
  }

  // dP^T less delta becomes dS^T.
  __device__ __forceinline__ void make_differences(Operand& operand, Logits& logits, int thread) const {
    ptx::named_barrier_sync(kWeightsBarrier, Block::kConsumerThreads);
    Logits p;
#pragma unroll
    for (int step = 0; step < Block::kTileM / 16; ++step) {
      const uint4 pairs = load_shared(warp_chunk(ds_tile().base, step, thread));
      Steps::unround(p, {pairs.x, pairs.y, pairs.z, pairs.w}, step);
    }
    Steps::differentiate(operand, p, logits);
  }

  // Gives dS to both warpgroups of both blocks. A warp stores it where it has read P.
  __device__ __forceinline__ void give_differences(const Operand& operand, int lap, int thread) const {
    __syncwarp();
    Steps::store_ds(Steps::ds_row(ds_tile(), thread / 32 * 16, thread), operand);
    ptx::fence_async_proxy();
    ptx::named_barrier_arrive(kDifferencesBarrier, Block::kConsumerThreads);
    __syncwarp();
    // The other block has finished with the dS before. It need not expect this one yet: the phase stays open until it
    // does.
    ptx::mbarrier_wait(&block.control.ds_taken, lap ^ 1);
    const int other = 1 - block.rank;
    const uint32_t target = ptx::address_in_block(other_ds_tile().base, other);
    const uint32_t full = ptx::address_in_block(ptx::shared_address(&block.control.other_ds_full), other);
#pragma unroll
    for (int step = 0; step < Block::kTileM / 16; ++step) {
      ptx::store_in_block(warp_chunk(target, step, thread), load_shared(warp_chunk(ds_tile().base, step, thread)),
                          full);
    }
  }

  // Starts a warpgroup's part of dQ.
  __device__ __forceinline__ void start_query_gradients(QueryGradients& dq, int warpgroup, int lap) const {
    constexpr int kPanels = Steps::kQueryColumns / 64;
    ptx::wgmma_fence();
    Steps::add_keys(
        dq, ds_tile().base,
        block.k_tile().base + (block.rank * Block::kConsumers + warpgroup) * kPanels * Block::KeyShared::kPanelBytes,
        false);
    // Every thread that waited orders what arrived before the products that read it.
    ptx::mbarrier_wait(&block.control.other_ds_full, lap);
    ptx::fence_async_proxy();
    Steps::add_keys(dq, other_ds_tile().base,
                    block.other_k_tile().base + warpgroup * kPanels * Block::KeyColumns::kPanelBytes, true);
    ptx::wgmma_commit();
  }

  // A warp has finished with the other block's dS.
  __device__ __forceinline__ void take_differences(int thread) const {
    Block::arrive_warp_in_block(&block.control.ds_taken, 1 - block.rank, thread);
  }

  __device__ __forceinline__ void expect_differences(int thread) const {
    if (thread == 0) ptx::mbarrier_arrive_expect(&block.control.other_ds_full, Steps::LogitShared::kBytes);
  }

  // Adds to dV whatever the tile's queries contribute.
  __device__ __forceinline__ void accumulate_values(KeyGradients& dv) const {
    auto& control = block.control;
    const float scale_log2 = logit_scale(block.params.forward, block.own.batch) * kLog2E;
    const int thread = Block::warpgroup_thread();
    Stages ring;
    ring.wait_full(control.query_full);
    Logits logits;
    start_rows_by_rows<T>(logits, block.k_tile(), 0, block.q_tile(ring.index));
    ptx::wgmma_wait<0>();
    ptx::pin(logits);
    Operand weights;
    make_weights(weights, logits, control.statistics[ring.index], scale_log2, thread);
    bool more = control.statistics[ring.index].plane >= 0;
    ptx::mbarrier_arrive(control.statistics_empty + ring.index);
    if (more) hand_on(weights, thread);
    int lap = 0;
#pragma unroll 1
    for (; more; lap ^= 1) {
      ring.wait_full(control.dout_full);
      start_operand_by_rows<T>(dv[0], weights, block.dout_tile(ring.index));
      Stages next = ring;
      next.advance();
      next.wait_full(control.query_full);
      const Statistics& next_statistics = control.statistics[next.index];
      more = next_statistics.plane >= 0;
      // Behind the last tile these logits, and the statistics read for them, are of no use and do no harm.
      start_rows_by_rows<T>(logits, block.k_tile(), 0, block.q_tile(next.index));
      ptx::named_barrier_sync(kDifferencesBarrier, Block::kConsumerThreads);
      QueryGradients dq;
      start_query_gradients(dq, kValues, lap);
      ptx::wgmma_wait<1>();
      ptx::pin(dv[0]);
      ptx::pin(logits);
      ptx::named_barrier_arrive(kDoutReadBarrier, Block::kConsumerThreads);
      ptx::wgmma_wait<0>();
      ptx::pin(dq[0]);
      take_differences(thread);
      Block::wait_part_free(kValues);
      Steps::store_part(dq, dq_part(kValues, ring.index), thread);
      Block::pass_part_on(kValues);
      make_weights(weights, logits, next_statistics, scale_log2, thread);
      ptx::mbarrier_arrive(control.statistics_empty + next.index);
      ptx::named_barrier_sync(kWeightsFreeBarrier, Block::kConsumerThreads);
      if (more) hand_on(weights, thread);
      ring = next;
    }
    Block::wait_part_free(kValues);
  }

  // Adds to dK whatever the tile's queries contribute.
  __device__ __forceinline__ void accumulate_keys(KeyGradients& dk) const {
    auto& control = block.control;
    const int thread = Block::warpgroup_thread();
    Stages ring;
    ring.wait_full(control.query_full);
    bool more = control.statistics[ring.index].plane >= 0;
    if (more) ring.wait_full(control.dout_full);
    Logits logits;
    Steps::set_minus_delta(logits, control.statistics[ring.index].delta, thread);
    ptx::mbarrier_arrive(control.statistics_empty + ring.index);
    start_rows_by_rows<T, true>(logits, block.v_tile(), 0, block.dout_tile(ring.index));
    ptx::wgmma_wait<0>();
    ptx::pin(logits);
    int lap = 0;
#pragma unroll 1
    for (; more; lap ^= 1) {
      expect_differences(thread);
      Operand differences;
      make_differences(differences, logits, thread);
      give_differences(differences, lap, thread);
      start_operand_by_rows<T>(dk[0], differences, block.q_tile(ring.index));
      ptx::named_barrier_sync(kStoredBarrier, 128);
      QueryGradients dq;
      start_query_gradients(dq, kKeys, lap);
      ptx::wgmma_wait<1>();
      ptx::pin(dk[0]);
      // Before the wait for dO, which comes late: the next Q but one is needed first.
      Block::arrive_warp_in_cluster(control.query_empty + ring.index, thread);
      Stages next = ring;
      next.advance();
      next.wait_full(control.query_full);
      const Statistics& next_statistics = control.statistics[next.index];
      more = next_statistics.plane >= 0;
      Steps::set_minus_delta(logits, next_statistics.delta, thread);
      ptx::mbarrier_arrive(control.statistics_empty + next.index);
      ptx::pin(logits);
      if (more) next.wait_full(control.dout_full);
      start_rows_by_rows<T, true>(logits, block.v_tile(), 0, block.dout_tile(next.index));
      ptx::wgmma_wait<1>();
      ptx::pin(dq[0]);
      ptx::named_barrier_arrive(kWeightsFreeBarrier, Block::kConsumerThreads);
      take_differences(thread);
      ptx::named_barrier_sync(kDoutReadBarrier, Block::kConsumerThreads);
      Block::wait_part_free(kKeys);
      Steps::store_part(dq, dq_part(kKeys, ring.index), thread);
      Block::pass_part_on(kKeys);
      ptx::wgmma_wait<0>();
      ptx::pin(logits);
      ring = next;
    }
    Block::wait_part_free(kKeys);
  }

  __device__ __forceinline__ void consume(int warpgroup, float* staging, const BackwardVectorPaths& vectorized) const {
    constexpr int kWarpgroupThreads = 128;
    static_assert(2 * Block::Staged::kBytes <= Block::kTileBytes);
    const typename Block::Staged staged{staging + warpgroup * (Block::Staged::kBytes / 4)};
    const int thread = threadIdx.x % kWarpgroupThreads;
    const int key_row = thread / 32 * 16;
    KeyGradients gradients = {};
    ptx::mbarrier_wait(&block.control.keys_full, 0);
    block.clear_missing_keys(threadIdx.x - (Block::kThreads - Block::kConsumerThreads));
    if (warpgroup == kValues) {
      accumulate_values(gradients);
    } else {
      accumulate_keys(gradients);
    }
    Block::sync_consumers();  // everybody has finished with the tiles
    if (warpgroup == kValues) {
      const auto sync = [] { ptx::named_barrier_sync(kStagedBarrier + kValues, kWarpgroupThreads); };
      block.template store_values<kWarpgroupThreads>(gradients, key_row, staged, vectorized, thread, sync);
    } else {
      const auto sync = [] { ptx::named_barrier_sync(kStagedBarrier + kKeys, kWarpgroupThreads); };
      block.template store_keys<kWarpgroupThreads>(gradients, key_row, staged, vectorized, thread, sync);
    }
  }
};

}  // namespace chunkattn::cuda
