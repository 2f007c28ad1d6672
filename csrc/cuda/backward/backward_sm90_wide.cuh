// The Hopper backward main loop for head_dim 256: wgmma, TMA and warp specialisation (sm_90a). What surrounds it is in
// backward_sm90_block.cuh.
//
// A block's 64 keys are as many as dK and dV leave registers for, so both consumer warpgroups work on all of them. The
// first makes S^T = K Q^T and dV += P^T dO, the second dP^T = V dO^T and dK += dS^T Q: each result is the a operand of
// what follows and stays in registers. The second needs P for dS = P (dP - delta); a thread of the first holds just
// what the same thread of the second lacks, and hands it on, rounded. dS goes through shared memory for dQ = dS K, of
// which each warpgroup computes half the columns. Its half has the size of a tile of dO or Q, and goes where the tile
// lies that the warpgroup was the last to read.
#pragma once

#include "cuda/backward/backward_sm90_block.cuh"

namespace chunkattn::cuda {

template <typename T, int kHeadDim, typename Keys>
struct BackwardSm90Wide {
  using Block = BackwardSm90Block<T, kHeadDim, Keys>;
  using Logits = typename Block::Logits;
  using Operand = typename Block::Operand;
  using KeyGradients = typename Block::KeyGradients;
  using QueryGradients = typename Block::QueryGradients;
  using Stages = Ring<Block::kStages>;
  static_assert(Block::kTileM == 64 && Block::kTileN == 64 && Block::kLogitBuffers == 2);
  static_assert(Block::kGradientPanels * Block::kGradientPanelBytes == Block::QueryShared::kBytes);

  static constexpr int kValues = 0, kKeys = 1;  // the warpgroups, by what they compute the gradient of

  // Only a warp of dQ says that a tile of Q or dO may be overwritten.
  static constexpr int kQueryArrivals = 1, kDoutArrivals = 1;

  static constexpr int kWeightsBarrier = 4;      // P is handed on
  static constexpr int kDifferencesBarrier = 5;  // dS is in shared memory, for the warpgroup that did not make it
  static constexpr int kStoredBarrier = 10;      // and for the one that did
  static constexpr int kStagedBarrier = 6;       // + warpgroup: its gradient is in shared memory

  const Block& block;

  template <int kGradient>
  __device__ __forceinline__ typename Block::QueryShared rows(int stage) const {
    return kGradient == kValues ? block.dout_tile(stage) : block.q_tile(stage);
  }
  __device__ __forceinline__ typename Block::LogitShared ds_tile() const { return block.ds_tile(0); }
  // Where a thread leaves its P, rounded.
  __device__ __forceinline__ uint32_t weights(int step, int thread) const {
    return block.ds_tile(1).base + (step * 128 + thread) * 16;
  }

  __device__ __forceinline__ void add_query_gradients(int warpgroup) const {
    if (warpgroup == kValues) {
      block.add_query_gradients(kValues, block.control.dout_empty,
                                [&](int stage) { return rows<kValues>(stage).base; });
    } else {
      block.add_query_gradients(kKeys, block.control.query_empty, [&](int stage) { return rows<kKeys>(stage).base; });
    }
  }

  // Starts S^T or dP^T.
  template <int kGradient>
  __device__ __forceinline__ void start_logits(Logits& logits, int stage, int thread) const {
    if constexpr (kGradient == kValues) {
      start_rows_by_rows<T>(logits, block.k_tile(), 0, block.q_tile(stage));
    } else {
      Block::set_minus_delta(logits, block.control.statistics[stage], thread);
      start_rows_by_rows<T, true>(logits, block.v_tile(), 0, block.dout_tile(stage));
    }
  }

  // S^T becomes P^T, which is handed on.
  __device__ __forceinline__ void make_weights(Operand& operand, Logits& logits,
                                               const typename Block::Statistics& statistics, float scale_log2,
                                               int thread) const {
    typename Block::PerQuery lse_log2;
    Block::load_per_query(lse_log2, statistics.lse_log2, thread);
    if (statistics.masked) block.hide_keys(logits, statistics.tile, thread / 32 * 16);
    Block::exponentiate(logits, lse_log2, scale_log2);
    Block::round(operand, logits);
    // The buffer is free: the dS of the tile before, which this warpgroup has used, was made of what it held.
#pragma unroll
    for (int step = 0; step < Block::kTileM / 16; ++step) {
      store_shared(weights(step, thread),
                   uint4{operand[step][0], operand[step][1], operand[step][2], operand[step][3]});
    }
    ptx::named_barrier_arrive(kWeightsBarrier, Block::kConsumerThreads);
  }

  // dP^T less delta becomes dS^T, which is stored.
  __device__ __forceinline__ void make_differences(Operand& operand, Logits& logits, int thread) const {
    ptx::named_barrier_sync(kWeightsBarrier, Block::kConsumerThreads);
    Logits p;
#pragma unroll
    for (int step = 0; step < Block::kTileM / 16; ++step) {
      const uint4 pairs = load_shared(weights(step, thread));
      Block::unround(p, {pairs.x, pairs.y, pairs.z, pairs.w}, step);
    }
    Block::differentiate(operand, p, logits);
  }

  // Adds to dV or dK whatever the tile's queries contribute.
  template <int kGradient>
  __device__ __forceinline__ void accumulate(KeyGradients& gradients) const {
    auto& control = block.control;
    const float scale_log2 = logit_scale(block.params.forward, block.own.batch) * kLog2E;
    const int thread = Block::warpgroup_thread();
    Stages ring;
    ring.wait_full(control.query_full);
    if constexpr (kGradient == kKeys) ring.wait_full(control.dout_full);
    Logits logits;
    start_logits<kGradient>(logits, ring.index, thread);
    ptx::wgmma_wait<0>();
    ptx::pin(logits);
#pragma unroll 1
    for (bool more = true; more;) {
      const typename Block::Statistics& statistics = control.statistics[ring.index];
      Operand operand;
      if constexpr (kGradient == kValues) {
        make_weights(operand, logits, statistics, scale_log2, thread);
        ring.wait_full(control.dout_full);
      } else {
        make_differences(operand, logits, thread);
      }
      start_operand_by_rows<T>(gradients[0], operand, rows<kGradient>(ring.index));
      if constexpr (kGradient == kValues) {
        ptx::named_barrier_sync(kDifferencesBarrier, Block::kConsumerThreads);
      } else {
        // The buffer is free: both warpgroups have finished with the dS of the tile before, this one itself and the
        // other before it handed P on.
        Block::store_ds(Block::ds_row(ds_tile(), thread / 32 * 16, thread), operand);
        ptx::fence_async_proxy();
        ptx::named_barrier_arrive(kDifferencesBarrier, Block::kConsumerThreads);
        ptx::named_barrier_sync(kStoredBarrier, 128);
      }
      QueryGradients dq;
      Block::start_query_gradients(dq, ds_tile(), block.k_tile(), kGradient);
      ptx::mbarrier_arrive(control.statistics_empty + ring.index);
      Stages next = ring;
      next.advance();
      next.wait_full(control.query_full);
      more = control.statistics[next.index].plane >= 0;
      if constexpr (kGradient == kKeys) {
        if (more) next.wait_full(control.dout_full);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(gradients[0]);
      ptx::pin(dq[0]);
      const uint32_t part = rows<kGradient>(ring.index).base;
      Block::wait_part_free(kGradient);
      Block::store_part(dq, part, thread);
      Block::pass_part_on(kGradient);
      // There is no room for dQ beside the next logits. Behind the last tile these are of no use and do no harm.
      start_logits<kGradient>(logits, next.index, thread);
      ptx::wgmma_wait<0>();
      ptx::pin(logits);
      ring = next;
    }
    Block::wait_part_free(kGradient);
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
      accumulate<kValues>(gradients);
    } else {
      accumulate<kKeys>(gradients);
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
