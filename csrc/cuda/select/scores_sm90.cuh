// Scores of query regions and key regions, and each row's best, on Hopper: wgmma and TMA (sm_90a).
//
// Thread blocks are persistent. One warp hands out blocks of 128 rows and has the copy engine bring their key tiles,
// from right to left. Two consumer warpgroups own 64 rows each: they keep both parts of their means in registers,
// multiply, and hand the scores to RowCandidates. They take turns at the tensor cores, so that one multiplies while the
// other compares. A score is high * high + high * low + low * high; what is left out is below float32's rounding.
#pragma once

#include "cuda/common/ring.cuh"
#include "cuda/common/swizzled_tile.cuh"
#include "cuda/common/tile_schedule.h"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/select/launchers.h"
#include "cuda/select/row_block.cuh"
#include "cuda/select/row_candidates.cuh"

namespace chunkattn::cuda {

template <int kHeadDim, int kInRegisters>
struct ScoresSm90 {
  static constexpr int kTileM = 128;
  static constexpr int kTileN = 128;
  static constexpr int kStages = 384 / kHeadDim;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kConsumers * 128 + 32;
  static constexpr int kSteps = kHeadDim / 16;

  using KeyShared = PanelTile<kTileN, 2 * kHeadDim>;  // the float16 nearest to the means, then what is left
  using Scores = float[kTileN / 8][4];
  using Operand = uint32_t[kSteps][4];

  struct Control {
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t work_full[2], work_empty[2];
    RowBlock work[2];
    int reductions;  // that a warp of this thread block has asked for
  };

  static constexpr size_t kSharedBytes = kStages * KeyShared::kBytes + sizeof(Control);

  const SelectPass& pass;
  uint32_t shared;
  Control& control;

  __device__ __forceinline__ KeyShared key_tile(int stage) const { return {shared + stage * KeyShared::kBytes}; }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(control.key_full + i, 1);
      ptx::mbarrier_init(control.key_empty + i, kConsumers * 128);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(control.work_full + i, 1);
      ptx::mbarrier_init(control.work_empty + i, kConsumers * 128);
    }
    control.reductions = 0;
    ptx::mbarrier_init_fence();
  }

  // One warp; its first lane loads and publishes.
  __device__ __forceinline__ void produce(const CUtensorMap* key_map, const TileSchedule& schedule) const {
    Ring<2> works;
    Ring<kStages> keys;
    const bool leader = threadIdx.x % 32 == 0;
    int64_t index = blockIdx.x;
    while (true) {
      const RowBlock work = row_block<kTileM>(pass, schedule, index);
      if (work.plane >= 0 && work.end == 0) {
        index = next_row_block(pass.workspace.tile_counter);
        continue;
      }
      if (leader) {
        works.wait_empty(control.work_empty);
        control.work[works.index] = work;
        ptx::mbarrier_arrive(control.work_full + works.index);
      }
      works.advance();
      if (work.plane < 0) return;
      for (int tile = work.tiles<kTileN>() - 1; tile >= 0; --tile) {
        if (leader) {
          keys.wait_empty(control.key_empty);
          ptx::mbarrier_arrive_expect(control.key_full + keys.index, KeyShared::kBytes);
#pragma unroll
          for (int panel = 0; panel < KeyShared::kPanels; ++panel) {
            ptx::tma_load_4d(key_tile(keys.index).base + panel * KeyShared::kPanelBytes, key_map,
                             control.key_full + keys.index, panel * 64, tile * kTileN, 0, work.kv_plane);
          }
        }
        keys.advance();
      }
      index = next_row_block(pass.workspace.tile_counter);
    }
  }

  // The a operands of the warp's 16 rows: `part` 0 for the means, 1 for what is left of them.
  __device__ __forceinline__ void load_rows(Operand& a, const RowBlock& work, int first_row, int part) const {
    const int lane = threadIdx.x % 32;
    const Float16* means = static_cast<const Float16*>(pass.workspace.q_means);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane / 4 + half * 8;
      const int64_t index = static_cast<int64_t>(work.plane) * pass.rule.regions + row;
      const uint32_t* source = reinterpret_cast<const uint32_t*>(means + (index * 2 + part) * kHeadDim) + lane % 4;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        a[step][half] = row < pass.rule.regions ? source[step * 8] : 0;
        a[step][half + 2] = row < pass.rule.regions ? source[step * 8 + 4] : 0;
      }
    }
  }

  // Starts the products that make up a tile's scores.
  static __device__ __forceinline__ void start_scores(Scores& scores, const Operand& high, const Operand& low,
                                                      const KeyShared& keys) {
    constexpr int kPartBytes = kHeadDim / 64 * KeyShared::kPanelBytes;
    const uint64_t descriptor = ptx::descriptor_k_major(keys.base);
    const auto offset = [](int step) { return (step / 4 * KeyShared::kPanelBytes + step % 4 * 32) / 16; };
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::Wgmma<Float16, kTileN>::rs_rows(scores, high[step], descriptor + offset(step) + kPartBytes / 16, step > 0);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::Wgmma<Float16, kTileN>::rs_rows(scores, low[step], descriptor + offset(step), true);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::Wgmma<Float16, kTileN>::rs_rows(scores, high[step], descriptor + offset(step), true);
    }
    ptx::wgmma_commit();
  }

  static constexpr int kTurnBarrier = 1;  // + warpgroup
  static __device__ __forceinline__ void wait_turn(int warpgroup) {
    ptx::named_barrier_sync(kTurnBarrier + warpgroup, 256);
  }
  static __device__ __forceinline__ void pass_turn(int warpgroup) {
    ptx::named_barrier_arrive(kTurnBarrier + 1 - warpgroup, 256);
  }

  // A warp that reduces keeps all others waiting for key tiles before long. So when one has to, all do what they have
  // to do about then.
  __device__ __forceinline__ void reduce(RowCandidates<kInRegisters>& rows, int& reductions) const {
    const bool full = rows.template full<kTileN>();
    const int begun = __shfl_sync(0xffffffffu, *static_cast<volatile int*>(&control.reductions), 0);
    if (!full && begun <= reductions) return;
    reductions = begun > reductions ? begun : reductions + 1;
    if (full && threadIdx.x % 32 == 0) atomicMax(&control.reductions, reductions);
    rows.template reduce<kTileN>();
  }

  __device__ __forceinline__ void consume(int warpgroup) const {
    const int warp = threadIdx.x / 32;
    const int capacity = pass.candidates_per_row;
    RowCandidates<kInRegisters> rows(
        pass.workspace.candidates + (static_cast<int64_t>(blockIdx.x) * kTileM + warp * 16) * capacity, capacity,
        pass.listed);
    Ring<2> works;
    Ring<kStages> keys;
    int reductions = 0;
    if (warpgroup == kConsumers - 1) pass_turn(warpgroup);
    while (true) {
      works.wait_full(control.work_full);
      const RowBlock work = control.work[works.index];
      ptx::mbarrier_arrive(control.work_empty + works.index);
      works.advance();
      if (work.plane < 0) return;
      const int first_row = work.first_row + warp * 16;
      Operand high, low;
      load_rows(high, work, first_row, 0);
      load_rows(low, work, first_row, 1);
      const int end[2] = {pass.row_end(work.plane, first_row + threadIdx.x % 32 / 4),
                          pass.row_end(work.plane, first_row + threadIdx.x % 32 / 4 + 8)};
      rows.restart();
      for (int tile = work.tiles<kTileN>() - 1; tile >= 0; --tile) {
        Scores scores;
        keys.wait_full(control.key_full);
        wait_turn(warpgroup);
        start_scores(scores, high, low, key_tile(keys.index));
        pass_turn(warpgroup);
        ptx::wgmma_wait<0>();
        ptx::pin(scores);
        ptx::mbarrier_arrive(control.key_empty + keys.index);
        keys.advance();
        const int first = tile * kTileN + threadIdx.x % 4 * 2;
        if ((tile + 1) * kTileN > work.whole_end) hide_regions(scores, first, end);
        rows.append(scores, first);
        if (tile != 0) reduce(rows, reductions);
      }
      rows.finish(row_lists(pass, work, first_row), pass.rule.regions - first_row);
    }
  }

  static __device__ __forceinline__ void run(const SelectPass& pass, const TileSchedule& schedule,
                                             const CUtensorMap& key_map) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const ScoresSm90 self{pass, ptx::shared_address(shared_memory),
                          *reinterpret_cast<Control*>(shared_memory + kStages * KeyShared::kBytes)};
    // The shuffle tells ptxas that the index is uniform.
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) self.init_barriers();
    __syncthreads();
    if (warpgroup == kConsumers) {
      if (threadIdx.x % 32 == 0) ptx::prefetch_tensor_map(&key_map);
      self.produce(&key_map, schedule);
    } else {
      self.consume(warpgroup);
    }
  }
};

}  // namespace chunkattn::cuda
