// Scores of the rows that choose for a group and the regions before it, and each row's best, by mma.sync: sm_80 and
// everything after it.
//
// The rows of a plane are few and the regions many, so that thread blocks share the regions, in splits. A block cuts
// the sums into pairs of float16 on their way into shared memory (split_mean.cuh), each row with a scale of its own;
// the scores are multiplied by what the scales of their columns leave. Where no group begins, all blocks return at
// once.
#include "cuda/common/launch_step.cuh"
#include "cuda/common/warp_multiply.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/select/row_candidates.cuh"
#include "cuda/select/split_mean.cuh"
#include "cuda/select_merge_decode/chooser.cuh"

namespace chunkattn::cuda {

namespace {

__device__ __forceinline__ float float_of_bits(uint16_t bits, DataType dtype) {
  if (dtype == DataType::kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return to_float(Float16{bits});
}

// Eight elements of a row of sums from `begin` on, zeros behind its end.
__device__ __forceinline__ void load_sums(const float* row, int begin, int head_dim, bool vectorized,
                                          float (&x)[kChunk]) {
  if (vectorized) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      const float4 four =
          begin + i < head_dim ? *reinterpret_cast<const float4*>(row + begin + i) : float4{0.f, 0.f, 0.f, 0.f};
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = begin + i < head_dim ? row[begin + i] : 0.f;
}

template <int kHeadDim, int kInRegisters>
struct CacheScores {
  static constexpr int kTileM = CacheScoreTile<kHeadDim>::kRows;
  static constexpr int kTileN = CacheScoreTile<kHeadDim>::kColumns;
  static constexpr int kThreads = kTileM / 16 * 32;
  static constexpr int kTeam = kHeadDim / kChunk;  // threads that share a row of sums
  static constexpr int kRowsAtOnce = kThreads / kTeam;
  static constexpr int kSteps = kTileN / kRowsAtOnce;
  static_assert(kSteps * kRowsAtOnce == kTileN && kTileM % kRowsAtOnce == 0);

  using QueryShared = RowTile<kTileM, kHeadDim>;
  using KeyShared = RowTile<kTileN, kHeadDim>;
  static constexpr size_t kSharedBytes = 2 * QueryShared::kBytes + 2 * KeyShared::kBytes + kTileN * sizeof(float);

  using Scores = float[1][kTileN / 8][4];
  using Sums = float[kSteps][kChunk];

  const SpanStep& step;
  uint32_t shared;  // both parts of Q, then both of a tile of K
  float* factors;   // [kTileN], of the tile's columns
  int plane;
  int first_row;
  int begin_tile, end_tile;
  Chooser choice;
  bool vectorized;

  __device__ __forceinline__ QueryShared query_tile(int part) const { return {shared + part * QueryShared::kBytes}; }
  __device__ __forceinline__ KeyShared key_tile(int part) const {
    return {shared + 2 * QueryShared::kBytes + part * KeyShared::kBytes};
  }

  static __device__ __forceinline__ int team_row() { return threadIdx.x / kTeam; }
  static __device__ __forceinline__ int team_chunk() { return threadIdx.x % kTeam; }
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * 16; }

  __device__ __forceinline__ bool warp_votes() const { return first_row + warp_row() < step.plan.voters; }

  // A token that chooses for itself has the queries of its heads added up here.
  __device__ __forceinline__ void load_query(int row, float (&x)[kChunk]) const {
    const SelectMergeDecodeParams& params = step.params;
    const int begin = team_chunk() * kChunk;
    if (!params.each_token_chooses) {
      const int64_t place = static_cast<int64_t>(plane) * params.voters + first_row + row;
      load_sums(static_cast<const float*>(params.query_sums) + place * params.head_dim, begin, params.head_dim,
                vectorized, x);
      return;
    }
    const int batch = step.sequence(plane), head = plane % params.index_heads * step.plan.heads_per_plane;
    const Strides& strides = params.select_q_strides;
    const uint16_t* rows = static_cast<const uint16_t*>(params.select_q) + batch * strides.batch +
                           step.index * strides.seq + head * strides.head;
#pragma unroll 1
    for (int n = 0; n < step.plan.heads_per_plane; ++n) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int d = begin + i;
        if (d < params.head_dim) x[i] += float_of_bits(rows[n * strides.head + d], params.dtype);
      }
    }
  }

  __device__ __forceinline__ void load_queries() const {
#pragma unroll 1
    for (int row = team_row(); row < kTileM; row += kRowsAtOnce) {
      float x[kChunk] = {};
      if (first_row + row < step.plan.voters) load_query(row, x);
      uint4 high, low;
      split_mean(&high, &low, x, scale_for(largest_magnitude<kHeadDim>(x)));
      store_shared(query_tile(0).address(row, team_chunk()), high);
      store_shared(query_tile(1).address(row, team_chunk()), low);
    }
  }

  __device__ __forceinline__ void load_keys(int tile, Sums& sums) const {
    const SelectMergeDecodeParams& params = step.params;
    const int64_t kv_plane = static_cast<int64_t>(step.sequence(plane)) * params.kv_heads + step.kv_head(plane);
    const float* rows = static_cast<const float*>(params.region_sums) + kv_plane * params.regions * params.head_dim;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int region = tile * kTileN + i * kRowsAtOnce + team_row();
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sums[i][j] = 0.f;
      if (region < choice.eligible) {
        load_sums(rows + static_cast<int64_t>(region) * params.head_dim, team_chunk() * kChunk, params.head_dim,
                  vectorized, sums[i]);
      }
    }
  }

  __device__ __forceinline__ void store_keys(const Sums& sums) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = i * kRowsAtOnce + team_row();
      const float scale = scale_for(largest_magnitude<kHeadDim>(sums[i]));
      uint4 high, low;
      split_mean(&high, &low, sums[i], scale);
      store_shared(key_tile(0).address(row, team_chunk()), high);
      store_shared(key_tile(1).address(row, team_chunk()), low);
      if (team_chunk() == 0) factors[row] = 1.f / scale;
    }
  }

  __device__ __forceinline__ void multiply(Scores& scores) const {
#pragma unroll
    for (int block = 0; block < kTileN / 8; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][block][i] = 0.f;
    }
    constexpr Inner kAlong = Inner::kAlongRows;
#pragma unroll 1  // keeps the code and the registers of one product: the smallest terms come first
    for (int product = 2; product >= 0; --product) {
      warp_multiply<Float16, kAlong, kAlong, kHeadDim>(scores, query_tile(product / 2), warp_row(),
                                                       key_tile(product % 2), 0);
    }
#pragma unroll
    for (int block = 0; block < kTileN / 8; ++block) {
      const float2 factor = *reinterpret_cast<const float2*>(factors + block * 8 + threadIdx.x % 4 * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][block][i] *= i % 2 == 0 ? factor.x : factor.y;
    }
  }

  // Scores of regions that a row may not list are no candidates, and rows that do not exist list none.
  __device__ __forceinline__ void hide(Scores& scores, int tile, const int (&end)[2]) const {
    const int first = tile * kTileN + threadIdx.x % 4 * 2;
#pragma unroll
    for (int block = 0; block < kTileN / 8; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + block * 8 + i % 2 >= end[i / 2]) scores[0][block][i] = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void run(RowCandidates<kInRegisters>& rows, uint64_t* lists) const {
    const int warp_begin = first_row + warp_row(), voters = step.plan.voters;
    int end[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_begin + threadIdx.x % 32 / 4 + half * 8;
      end[half] = row < voters ? choice.row_end(step, row) : 0;
    }
    const int whole_end = __reduce_min_sync(0xffffffffu, end[0] < end[1] ? end[0] : end[1]);
    uint64_t* warp_lists = lists + static_cast<int64_t>(warp_begin) * step.params.top_k;
    rows.restart();
    load_queries();
    Sums sums;
    if (begin_tile < end_tile) load_keys(end_tile - 1, sums);
#pragma unroll 1
    for (int tile = end_tile - 1;; --tile) {
      const bool last = tile < begin_tile;
      // Every warp has finished with the tile before. Where one has no room for another, all that soon have none make
      // it.
      const bool full = __syncthreads_or(rows.template full<kTileN>()) != 0;
      if ((last || full) && warp_votes()) {
        rows.template reduce_or_finish<kTileN>(last, warp_lists, voters - warp_begin);
      }
      if (last) break;
      store_keys(sums);
      __syncthreads();  // the tile is there, and so are the queries
      if (tile > begin_tile) load_keys(tile - 1, sums);
      if (!warp_votes()) continue;
      Scores scores;
      multiply(scores);
      if ((tile + 1) * kTileN > whole_end) hide(scores, tile, end);
      rows.append(scores[0], tile * kTileN + threadIdx.x % 4 * 2);
    }
  }
};

template <int kHeadDim, int kInRegisters>
__global__ void __launch_bounds__(CacheScores<kHeadDim, kInRegisters>::kThreads, 1)
    cache_scores_kernel(const __grid_constant__ SpanStep step) {
  using Kernel = CacheScores<kHeadDim, kInRegisters>;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const StepPlan& plan = step.plan;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  if (blockIdx.x == 0) {
    for (int plane = threadIdx.x; plane < plan.planes; plane += Kernel::kThreads) step.workspace.counters[plane] = 0;
  }
  const int capacity = plan.candidates_per_row;
  const int64_t candidate_row = static_cast<int64_t>(blockIdx.x) * Kernel::kTileM + Kernel::warp_row();
  RowCandidates<kInRegisters> rows(step.workspace.candidates + candidate_row * capacity, capacity, step.params.top_k);
  const int64_t works = static_cast<int64_t>(plan.planes) * plan.row_tiles * plan.splits;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int split = static_cast<int>(work % plan.splits);
    const int row_tile = static_cast<int>(work / plan.splits % plan.row_tiles);
    const int plane = static_cast<int>(work / plan.splits / plan.row_tiles);
    const Chooser choice = chooser(step, step.first_span(step.sequence(plane)));
    if (!choice.begins || choice.keeps_all) continue;
    __syncthreads();  // every warp has finished with the work before
    const int64_t tiles = (choice.eligible + Kernel::kTileN - 1) / Kernel::kTileN;
    const Kernel kernel{step,
                        ptx::shared_address(shared_memory),
                        reinterpret_cast<float*>(shared_memory + Kernel::kSharedBytes) - Kernel::kTileN,
                        plane,
                        row_tile * Kernel::kTileM,
                        static_cast<int>(tiles * split / plan.splits),
                        static_cast<int>(tiles * (split + 1) / plan.splits),
                        choice,
                        step.params.head_dim % 4 == 0};
    const int64_t list = (static_cast<int64_t>(plane) * plan.splits + split) * plan.voters;
    kernel.run(rows, step.workspace.lists + list * step.params.top_k);
  }
}

template <int kHeadDim, int kInRegisters>
const char* launch(const SpanStep& step, cudaStream_t stream) {
  using Kernel = CacheScores<kHeadDim, kInRegisters>;
  const auto kernel = &cache_scores_kernel<kHeadDim, kInRegisters>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Kernel::kSharedBytes));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return launch_step(kernel, step.plan.score_blocks, Kernel::kThreads, Kernel::kSharedBytes, step.plan.dependent_launch,
                     stream, step);
}

}  // namespace

const char* launch_cache_scores(const SpanStep& step, cudaStream_t stream) {
  switch (step.plan.score_dim) {
    case 128:
      return launch<128, kMostInRegisters>(step, stream);
    default:
      return step.plan.candidates_per_row == kMostInRegisters ? launch<256, kMostInRegisters>(step, stream)
                                                              : launch<256, 0>(step, stream);
  }
}

}  // namespace chunkattn::cuda
