// Scores of query regions and key regions, and each row's best, by mma.sync and cp.async: sm_80 and everything after
// it.
//
// A thread block takes blocks of 64 rows from a counter, 16 rows for each warp, and walks their key tiles from right to
// left. A score is high * high + high * low + low * high of the two parts of the means, as on Hopper.
#include "cuda/common/copy_rows.cuh"
#include "cuda/common/persistent_launch.cuh"
#include "cuda/common/warp_multiply.cuh"
#include "cuda/select/row_block.cuh"
#include "cuda/select/row_candidates.cuh"

namespace chunkattn::cuda {

namespace {

template <int kHeadDim, int kInRegisters>
struct ScoresSm80 {
  static constexpr int kTileM = kSmallestRowBlock;
  static constexpr int kTileN = kHeadDim == 256 ? 32 : 64;
  static constexpr int kStages = kHeadDim == 256 ? 1 : 2;  // 96 KB of shared memory fit every sm_8x
  static constexpr int kThreads = kTileM / 16 * 32;

  using QueryShared = RowTile<kTileM, kHeadDim>;
  using KeyShared = RowTile<kTileN, kHeadDim>;
  static constexpr size_t kSharedBytes = 2 * QueryShared::kBytes + kStages * 2 * KeyShared::kBytes;

  using Scores = float[1][kTileN / 8][4];

  uint32_t shared;  // both parts of Q, then both of each stage of K

  __device__ __forceinline__ QueryShared query_tile(int part) const { return {shared + part * QueryShared::kBytes}; }
  __device__ __forceinline__ KeyShared key_tile(int stage, int part) const {
    return {shared + 2 * QueryShared::kBytes + (stage * 2 + part) * KeyShared::kBytes};
  }

  static __device__ __forceinline__ const Float16* row_of(const void* means, const SelectPass& pass, int plane,
                                                          int row) {
    return static_cast<const Float16*>(means) + (static_cast<int64_t>(plane) * pass.rule.regions + row) * 2 * kHeadDim;
  }

  __device__ __forceinline__ void load_queries(const SelectPass& pass, const RowBlock& work) const {
    const Float16* rows = row_of(pass.workspace.q_means, pass, work.plane, work.first_row);
    for (int part = 0; part < 2; ++part) {
      copy_rows_async<kThreads>(query_tile(part), rows + part * kHeadDim, 2 * kHeadDim,
                                pass.rule.regions - work.first_row, kHeadDim, true);
    }
  }

  __device__ __forceinline__ void load_keys(const SelectPass& pass, const RowBlock& work, int tile) const {
    if (tile < 0) return;
    const Float16* rows = row_of(pass.workspace.k_means, pass, work.kv_plane, tile * kTileN);
    for (int part = 0; part < 2; ++part) {
      copy_rows_async<kThreads>(key_tile(tile % kStages, part), rows + part * kHeadDim, 2 * kHeadDim,
                                pass.rule.regions - tile * kTileN, kHeadDim, true);
    }
  }

  __device__ __forceinline__ void multiply(Scores& scores, int stage) const {
    const int row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int block = 0; block < kTileN / 8; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][block][i] = 0.f;
    }
    constexpr Inner kAlong = Inner::kAlongRows;
    warp_multiply<Float16, kAlong, kAlong, kHeadDim>(scores, query_tile(0), row, key_tile(stage, 1), 0);
    warp_multiply<Float16, kAlong, kAlong, kHeadDim>(scores, query_tile(1), row, key_tile(stage, 0), 0);
    warp_multiply<Float16, kAlong, kAlong, kHeadDim>(scores, query_tile(0), row, key_tile(stage, 0), 0);
  }

  __device__ __forceinline__ void score(const SelectPass& pass, const RowBlock& work,
                                        RowCandidates<kInRegisters>& rows) const {
    const int first_row = work.first_row + threadIdx.x / 32 * 16;
    const int end[2] = {pass.row_end(work.plane, first_row + threadIdx.x % 32 / 4),
                        pass.row_end(work.plane, first_row + threadIdx.x % 32 / 4 + 8)};
    rows.restart();
    const int last = work.tiles<kTileN>() - 1;
    load_queries(pass, work);
    for (int ahead = 0; ahead < kStages; ++ahead) {
      load_keys(pass, work, last - ahead);
      ptx::cp_async_commit();
    }
    for (int tile = last; tile >= 0; --tile) {
      ptx::cp_async_wait<kStages - 1>();
      __syncthreads();  // the tile is there
      Scores scores;
      multiply(scores, tile % kStages);
      __syncthreads();  // every warp has finished with it
      load_keys(pass, work, tile - kStages);
      ptx::cp_async_commit();
      const int first = tile * kTileN + threadIdx.x % 4 * 2;
      if ((tile + 1) * kTileN > work.whole_end) hide_regions(scores[0], first, end);
      rows.append(scores[0], first);
      if (tile == 0 || rows.template full<kTileN>()) {
        rows.template reduce_or_finish<kTileN>(tile == 0, row_lists(pass, work, first_row),
                                               pass.rule.regions - first_row);
      }
    }
    ptx::cp_async_wait<0>();
  }

  static __device__ __forceinline__ void run(const SelectPass& pass, const TileSchedule& schedule) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    __shared__ RowBlock work;
    const ScoresSm80 self{ptx::shared_address(shared_memory)};
    const int warp = threadIdx.x / 32;
    const int capacity = pass.candidates_per_row;
    RowCandidates<kInRegisters> rows(
        pass.workspace.candidates + (static_cast<int64_t>(blockIdx.x) * kTileM + warp * 16) * capacity, capacity,
        pass.listed);
    for (int64_t index = blockIdx.x;;) {
      __syncthreads();  // every warp has read the block before, and has finished with its keys
      if (warp == 0) {
        const RowBlock next = row_block<kTileM>(pass, schedule, index);
        index = next_row_block(pass.workspace.tile_counter);
        if (threadIdx.x == 0) work = next;
      }
      __syncthreads();
      if (work.plane < 0) return;
      if (work.end > 0) self.score(pass, work, rows);
    }
  }
};

template <int kHeadDim, int kInRegisters>
__global__ void __launch_bounds__(ScoresSm80<kHeadDim, kInRegisters>::kThreads)
    select_scores_sm80(const __grid_constant__ SelectPass pass, const __grid_constant__ TileSchedule schedule) {
  ScoresSm80<kHeadDim, kInRegisters>::run(pass, schedule);
}

template <int kHeadDim, int kInRegisters>
const char* launch(const SelectPass& pass, cudaStream_t stream) {
  using Kernel = ScoresSm80<kHeadDim, kInRegisters>;
  const TileSchedule schedule = row_schedule(pass, Kernel::kTileM);
  // The candidates have room for kMaximumBlocks of the largest block of rows.
  constexpr int kRoom = kMaximumBlocks * (kLargestRowBlock / Kernel::kTileM);
  const PersistentGrid grid{schedule.count(), Kernel::kThreads, Kernel::kSharedBytes, 0, kRoom};
  return launch_persistent(&select_scores_sm80<kHeadDim, kInRegisters>, grid, pass.workspace.tile_counter, stream, pass,
                           schedule);
}

template <int kHeadDim>
const char* launch(const SelectPass& pass, cudaStream_t stream) {
  switch (pass.candidates_per_row) {
    case kFewInRegisters:
      return launch<kHeadDim, kFewInRegisters>(pass, stream);
    case kMostInRegisters:
      return launch<kHeadDim, kMostInRegisters>(pass, stream);
    default:
      return launch<kHeadDim, 0>(pass, stream);
  }
}

}  // namespace

const char* launch_scores_sm80(const SelectPass& pass, cudaStream_t stream) {
  switch (pass.workspace.padded_dim) {
    case 64:
      return launch<64>(pass, stream);
    case 128:
      return launch<128>(pass, stream);
    default:
      return launch<256>(pass, stream);
  }
}

}  // namespace chunkattn::cuda
