// The portable backward main loop: mma.sync and cp.async, for sm_80 and everything after it.
//
// One thread block owns one tile of keys of one KV head, and with it dK and dV, in registers. It walks the query tiles
// that attend the keys, of all query heads that share them: S = Q K^T again, P from the log-sum-exp, dP = dO V^T,
// dS = P (dP - delta), then dV += P^T dO, dK += dS^T Q and dQ += dS K, the last in global memory. The regime of a pair
// of tiles says which rotation of Q is read and which dQ is added to. P and dS pass through shared memory: the products
// that need them transposed cut them among the warps in another way.
#pragma once

#include "cuda/backward/gradient_pieces.h"
#include "cuda/backward/key_source.cuh"
#include "cuda/backward/tile_sizes.h"
#include "cuda/common/mask.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/warp_multiply.cuh"

namespace chunkattn::cuda {

// How the warps of a block share a product's result.
template <int kRows, int kColumns, int kWarps, int kWarpRows>
struct WarpGrid {
  static constexpr int kWarpColumns = kWarps / kWarpRows;
  static constexpr int kSlabs = kRows / kWarpRows / 16;
  static constexpr int kBlocks = kColumns / kWarpColumns / 8;
  static_assert(kSlabs * 16 * kWarpRows == kRows && kBlocks * 8 * kWarpColumns == kColumns);

  using Accumulators = float[kSlabs][kBlocks][4];

  // The first row and column of this warp's part.
  static __device__ __forceinline__ int row() { return threadIdx.x / 32 / kWarpColumns * (kSlabs * 16); }
  static __device__ __forceinline__ int column() { return threadIdx.x / 32 % kWarpColumns * (kBlocks * 8); }
};

template <typename T, int kHeadDim, int kSharedKilobytes, typename Keys>
struct BackwardSm80 {
  using Sizes = BackwardSm80Tile<kHeadDim, kSharedKilobytes>;
  static constexpr int kTileM = Sizes::kTileM;
  static constexpr int kTileN = Sizes::kTileN;
  static constexpr int kThreads = Sizes::kWarps * 32;
  static constexpr int kQueryStages = Sizes::kQueryStages;
  static constexpr int kDoutStages = Sizes::kDoutStages;
  static_assert(kDoutStages <= kQueryStages);
  static constexpr size_t kSharedBytes = backward_sm80_shared_bytes<kHeadDim, kSharedKilobytes>();

  using LogitGrid = WarpGrid<kTileM, kTileN, Sizes::kWarps, Sizes::kLogitRows>;
  using KeyGrid = WarpGrid<kTileN, kHeadDim, Sizes::kWarps, Sizes::kKeyRows>;
  using QueryGrid = WarpGrid<kTileM, kHeadDim, Sizes::kWarps, Sizes::kQueryRows>;
  using Logits = typename LogitGrid::Accumulators;
  using KeyGradients = typename KeyGrid::Accumulators;
  using QueryGradients = typename QueryGrid::Accumulators;
  using Statistics = float[LogitGrid::kSlabs][2];  // of this thread's rows

  using QueryShared = RowTile<kTileM, kHeadDim>;
  using KeyShared = RowTile<kTileN, kHeadDim>;
  using LogitShared = RowTile<kTileM, kTileN>;
  using Staged = StagedRows<kTileN, kHeadDim>;
  static_assert(Staged::kBytes <= kSharedBytes);

  const BackwardParams& params;
  const BackwardWorkspace& workspace;
  const BackwardVectorPaths& vectorized;
  const Keys& source;
  uint32_t shared;                  // K, V, dO, the stages of Q, P, dS
  typename Keys::Tile own;          // the keys of this block
  const AttendingQueries& queries;  // in shared memory

  __device__ __forceinline__ KeyShared k_tile() const { return {shared}; }
  __device__ __forceinline__ KeyShared v_tile() const { return {shared + KeyShared::kBytes}; }
  __device__ __forceinline__ QueryShared dout_tile(int stage) const {
    return {shared + 2 * KeyShared::kBytes + (kDoutStages == 1 ? 0 : stage) * QueryShared::kBytes};
  }
  __device__ __forceinline__ QueryShared q_tile(int stage) const {
    return {shared + 2 * KeyShared::kBytes + (kDoutStages + stage) * QueryShared::kBytes};
  }
  __device__ __forceinline__ LogitShared p_tile() const {
    return {shared + 2 * KeyShared::kBytes + (kDoutStages + kQueryStages) * QueryShared::kBytes};
  }
  __device__ __forceinline__ LogitShared ds_tile() const { return {p_tile().base + LogitShared::kBytes}; }

  __device__ __forceinline__ void load_keys() const {
    const ForwardParams& forward = params.forward;
    const T* k =
        static_cast<const T*>(forward.k) + own.batch * forward.k_strides.batch + own.kv_head * forward.k_strides.head;
    const T* v =
        static_cast<const T*>(forward.v) + own.batch * forward.v_strides.batch + own.kv_head * forward.v_strides.head;
    const int head_dim = forward.shape.head_dim;
    source.template copy<kThreads>(k_tile(), k, forward.k_strides.seq, own, head_dim, vectorized.k);
    source.template copy<kThreads>(v_tile(), v, forward.v_strides.seq, own, head_dim, vectorized.v);
  }

  __device__ __forceinline__ void load_queries(int stage, const AttendingTile& tile, int head) const {
    const int regime = static_cast<int>(tile.regime);
    const Strides& strides = workspace.regimes[regime].q_strides;
    const T* q = static_cast<const T*>(workspace.regimes[regime].q) + own.batch * strides.batch +
                 tile.row * strides.seq + head * strides.head;
    copy_rows_async<kThreads>(q_tile(stage), q, strides.seq, tile.count, params.forward.shape.head_dim,
                              vectorized.q[regime]);
  }

  __device__ __forceinline__ void load_out_gradients(int stage, const AttendingTile& tile, int head) const {
    const Strides& strides = params.dout_strides;
    const T* dout =
        static_cast<const T*>(params.dout) + own.batch * strides.batch + tile.query * strides.seq + head * strides.head;
    copy_rows_async<kThreads>(dout_tile(stage), dout, strides.seq, tile.count, params.forward.shape.head_dim,
                              vectorized.dout);
  }

  // Rows without a query get what makes P zero. Nothing is computed from the values here: that would wait for them.
  __device__ __forceinline__ void load_statistics(Statistics& lse, Statistics& delta, const AttendingTile& tile,
                                                  int plane) const {
    const int row = LogitGrid::row() + threadIdx.x % 32 / 4;
    const int64_t first = static_cast<int64_t>(plane) * params.forward.rows_q() + tile.query + row;
    const float* tile_lse = params.forward.softmax_lse + first;
    const float* tile_delta = workspace.delta + first;
#pragma unroll
    for (int slab = 0; slab < LogitGrid::kSlabs; ++slab) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = slab * 16 + half * 8;
        const bool valid = row + offset < tile.count;
        lse[slab][half] = valid ? tile_lse[offset] : INFINITY;
        delta[slab][half] = valid ? tile_delta[offset] : 0.f;
      }
    }
  }

  // Sets S of keys that queries of the tile do not attend to -inf.
  __device__ __forceinline__ void mask(Logits& s, const AttendingTile& tile) const {
    const int valid = own.keys.end - own.keys.begin;
    const bool causal = tile.regime == Regime::kIntra && own.keys.end - 1 > tile.begin;
    if (causal || valid < kTileN) {
      const int column = LogitGrid::column();
      hide_keys(s, KeyTile{own.keys.begin + column, valid - column, tile.regime, causal},
                tile.begin + LogitGrid::row());
    }
  }

  // S becomes P, and dP - delta becomes dS, which lacks the logits' scale.
  __device__ __forceinline__ void differentiate(Logits& s, Logits& dp, const Statistics& lse, float scale_log2) const {
#pragma unroll
    for (int slab = 0; slab < LogitGrid::kSlabs; ++slab) {
      const float lse_log2[2] = {lse[slab][0] * kLog2E, lse[slab][1] * kLog2E};
#pragma unroll
      for (int block = 0; block < LogitGrid::kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[slab][block][i] = exp2_approx(s[slab][block][i] * scale_log2 - lse_log2[i / 2]);
          dp[slab][block][i] *= s[slab][block][i];
        }
      }
    }
  }

  // Writes P and dS of a query tile to shared memory. The exponentials do not wait for dP: nothing between the mask and
  // them keeps the compiler from placing them beside that product.
  __device__ __forceinline__ void differentiate_logits(int stage, const AttendingTile& tile, const Statistics& lse,
                                                       const Statistics& delta, float scale_log2) const {
    constexpr Inner kAlong = Inner::kAlongRows;
    const int row = LogitGrid::row(), column = LogitGrid::column();
    Logits s = {};
    warp_multiply<T, kAlong, kAlong, kHeadDim>(s, q_tile(stage), row, k_tile(), column);
    mask(s, tile);
    Logits dp;
#pragma unroll
    for (int slab = 0; slab < LogitGrid::kSlabs; ++slab) {
#pragma unroll
      for (int block = 0; block < LogitGrid::kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[slab][block][i] = -delta[slab][i / 2];
      }
    }
    warp_multiply<T, kAlong, kAlong, kHeadDim>(dp, dout_tile(stage), row, v_tile(), column);
    differentiate(s, dp, lse, scale_log2);
    store_accumulators<T>(p_tile(), s, row, column);
    store_accumulators<T>(ds_tile(), dp, row, column);
  }

  // dQ += dS K in global memory and dK += dS^T Q. The additions come out of registers and queue at the load/store unit,
  // which the products need for their fragments. So half of the warps add before dK and half behind it: while the ones
  // wait in that queue the others multiply. Of eight warps each tensor core has one of either half. Where blocks take
  // turns all add before dK: the next block waits for them.
  __device__ __forceinline__ void multiply_logit_gradients(KeyGradients& dk, int stage, const AttendingTile& tile,
                                                           int plane) const {
    constexpr Inner kAlong = Inner::kAlongRows, kDown = Inner::kDownRows;
    const int row = QueryGrid::row(), column = QueryGrid::column();
    QueryGradients dq = {};
    warp_multiply<T, kAlong, kDown, kTileN>(dq, ds_tile(), row, k_tile(), column);
    int* turn = workspace.turns == nullptr ? nullptr
                                           : workspace.turns + static_cast<int64_t>(plane) * workspace.turns_per_plane +
                                                 queries.first_turn + tile.index;
    if (turn != nullptr) {
      if (threadIdx.x == 0) wait_for_turn(turn, own.order);
      __syncthreads();
    }
    const RegimeQueries& regime = workspace.regimes[static_cast<int>(tile.regime)];
    const int head_dim = params.forward.shape.head_dim;
    const GradientPieces pieces{regime.rows, head_dim};
    const int first_row = row + threadIdx.x % 32 / 4;
    float* target = regime.dq + pieces.offset(plane, tile.row + first_row) +
                    column / GradientPieces::kColumns * GradientPieces::kElements + threadIdx.x % 4 * 2;
    constexpr int kPitch = kHeadDim * GradientPieces::kRows;
    const bool whole = tile.count == kTileM && head_dim == kHeadDim;
    const bool late = whole && turn == nullptr && threadIdx.x >= kThreads / 2;
    if (!whole) {
      add_pieces<false>(target, pieces.pitch(), dq, tile.count - first_row, head_dim - column);
    } else if (!late) {
      add_pieces<true>(target, kPitch, dq, kTileM, kHeadDim);
    }
    if (turn != nullptr) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) pass_turn_on(turn);
    }
    warp_multiply<T, kDown, kDown, kTileM>(dk, ds_tile(), KeyGrid::row(), q_tile(stage), KeyGrid::column());
    if (late) add_pieces<true>(target, kPitch, dq, kTileM, kHeadDim);
  }

  __device__ __forceinline__ void accumulate(KeyGradients& dk, KeyGradients& dv) const {
    constexpr Inner kDown = Inner::kDownRows;
    const ForwardParams& forward = params.forward;
    const QueryTiling& tiling = queries.tiling;
    const RegimeRows& rows = queries.rows;
    const HeadRange heads = source.heads(forward.shape, own);
    const float scale_log2 = logit_scale(forward, own.batch) * kLog2E;
    const int row = KeyGrid::row(), column = KeyGrid::column();

    int head = heads.begin;
    auto walk = source.walk(params, tiling, rows, own);
    AttendingTile next = walk.tile(tiling, rows);
    load_keys();
    load_queries(0, next, head);
    load_out_gradients(0, next, head);
    ptx::cp_async_commit();
    int stage = 0;
    for (bool more = true; more;) {
      const AttendingTile tile = next;
      const int plane = static_cast<int>(forward.plane(own.batch, head));
      Statistics lse, delta;
      load_statistics(lse, delta, tile, plane);
      walk.advance(tiling, rows);
      if (walk.done(tiling)) {
        walk = source.walk(params, tiling, rows, own);
        more = ++head < heads.end;
      }
      next = walk.tile(tiling, rows);

      ptx::cp_async_wait<0>();
      __syncthreads();  // Q and dO are there, and every warp has finished with dS and the Q of the tile before
      const int next_stage = kQueryStages == 1 ? 0 : stage ^ 1;
      differentiate_logits(stage, tile, lse, delta, scale_log2);
      if (kQueryStages > 1 && more) load_queries(next_stage, next, head);
      if (kDoutStages > 1 && more) load_out_gradients(next_stage, next, head);
      ptx::cp_async_commit();
      __syncthreads();  // P and dS are there
      warp_multiply<T, kDown, kDown, kTileM>(dv, p_tile(), row, dout_tile(stage), column);
      if (kDoutStages == 1) {
        __syncthreads();  // every warp has finished with dO
        if (more) load_out_gradients(0, next, head);
        ptx::cp_async_commit();
      }
      multiply_logit_gradients(dk, stage, tile, plane);
      if (kQueryStages == 1) {
        __syncthreads();  // every warp has finished with Q
        if (more) load_queries(next_stage, next, head);
        ptx::cp_async_commit();
      }
      stage = next_stage;
    }
  }

  // Gives away dK and dV of the keys.
  __device__ __forceinline__ void store_key_gradients(const KeyGradients& dk, const KeyGradients& dv,
                                                      float* staging) const {
    const Staged staged{staging};
    const int row = KeyGrid::row(), column = KeyGrid::column(), keys = own.keys.end - own.keys.begin;
    const auto sync = [] { __syncthreads(); };
    sync();  // every warp has finished with the tiles
    source.template store_values<T, kThreads>(dv, row, column, staged, params, workspace, vectorized, own, 0, keys,
                                              threadIdx.x, sync);
    sync();
    source.template store_keys<T, kThreads>(dk, row, column, staged, params, workspace, vectorized, own, 0, keys,
                                            threadIdx.x, sync);
  }

  static __device__ __forceinline__ void run(const BackwardParams& params, const BackwardWorkspace& workspace,
                                             const BackwardVectorPaths& vectorized, const Keys& source,
                                             const TileSchedule& schedule) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    __shared__ typename Keys::Tile own;
    __shared__ AttendingQueries queries;
    const bool any =
        threadIdx.x == 0 && source.describe(own, queries, params, workspace, schedule, blockIdx.x, kTileM, kTileN);
    if (__syncthreads_or(any) == 0) return;
    const BackwardSm80 self{params, workspace, vectorized, source, ptx::shared_address(shared_memory), own, queries};
    KeyGradients dk = {}, dv = {};
    self.accumulate(dk, dv);
    self.store_key_gradients(dk, dv, reinterpret_cast<float*>(shared_memory));
  }
};

}  // namespace chunkattn::cuda
