// The portable forward main loop: mma.sync and cp.async, for sm_80 and everything after it.
//
// One thread block owns one query tile of one head. Its key tiles come from KeyTileWalk; whenever the regime changes,
// queries that have a rotation for it are read again into the one Q buffer, while the softmax state simply carries on.
// K and V have one buffer each: V(n) arrives while S = Q K(n)^T is computed, K(n + 1) while P V(n) is.
#pragma once

#include "cuda/common/key_tiles.cuh"
#include "cuda/common/mask.cuh"
#include "cuda/common/query_tile.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/tile_schedule.h"
#include "cuda/common/vector_paths.h"
#include "cuda/forward/key_source.cuh"
#include "cuda/forward/tile_sizes.h"
#include "cuda/ptx/mma_sync.cuh"

namespace chunkattn::cuda {

template <typename T, int kHeadDim, typename Keys>
struct ForwardSm80 {
  using Sizes = ForwardSm80Tile<kHeadDim>;
  static constexpr int kTileM = Sizes::kTileM;
  static constexpr int kTileN = Sizes::kTileN;
  static constexpr int kThreads = Sizes::kWarps * 32;
  static constexpr int kWarpRows = kTileM / Sizes::kWarps;
  static constexpr int kSlabs = kWarpRows / 16;
  static constexpr int kKeyBlocks = kTileN / 8;
  static constexpr int kDimBlocks = kHeadDim / 8;

  using QueryShared = RowTile<kTileM, kHeadDim>;
  using KeyShared = RowTile<kTileN, kHeadDim>;
  using Logits = float[kSlabs][kKeyBlocks][4];
  using Output = float[kSlabs][kDimBlocks][4];

  // S = Q K^T for this warp's rows.
  static __device__ __forceinline__ void multiply_keys(Logits& logits, const QueryShared& q, const KeyShared& k) {
    const int lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 32 * kWarpRows;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[slab][block][i] = 0.f;
      }
    }
    // Fragments are loaded one product ahead, so that their latency hides behind it.
    constexpr int kPairs = kKeyBlocks / 2;
    const uint32_t first_a = q.address(warp_row + lane % 16, lane / 16);
    const uint32_t first_b = k.address(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    uint32_t a[2][kSlabs][4], b[2][4];
    const auto load_a = [&](int step) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        ptx::ldmatrix_x4(a[step % 2][slab], QueryShared::along(first_a, step * 2) + slab * 16 * QueryShared::kPitch);
      }
    };
    const auto load_b = [&](int step, int pair) {
      ptx::ldmatrix_x4(b[pair % 2], KeyShared::along(first_b, step * 2) + pair * 16 * KeyShared::kPitch);
    };
    static_assert(kPairs % 2 == 0, "the next step starts in the other fragment buffer");
    load_a(0);
    load_b(0, 0);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const bool last_pair = pair + 1 == kPairs;
        if (last_pair && step + 1 < kHeadDim / 16) load_a(step + 1);
        if (!last_pair || step + 1 < kHeadDim / 16) load_b(last_pair ? step + 1 : step, last_pair ? 0 : pair + 1);
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          ptx::mma_m16n8k16<T>(logits[slab][2 * pair], a[step % 2][slab], b[pair % 2][0], b[pair % 2][1]);
          ptx::mma_m16n8k16<T>(logits[slab][2 * pair + 1], a[step % 2][slab], b[pair % 2][2], b[pair % 2][3]);
        }
      }
    }
  }

  // O += P V for this warp's rows; P is rounded to T.
  static __device__ __forceinline__ void multiply_values(Output& output, const Logits& p, const KeyShared& v) {
    const int lane = threadIdx.x % 32;
    constexpr int kPairs = kDimBlocks / 2;
    const uint32_t first_b = v.address(lane % 16, lane / 16);
    uint32_t a[kSlabs][4], b[2][4];
    const auto load_b = [&](int step, int pair) {
      ptx::ldmatrix_x4_trans(b[pair % 2], KeyShared::along(first_b, pair * 2) + step * 16 * KeyShared::kPitch);
    };
    load_b(0, 0);
#pragma unroll
    for (int step = 0; step < kTileN / 16; ++step) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) pack_operand<T>(a[slab], p[slab], step);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const bool last_pair = pair + 1 == kPairs;
        if (!last_pair || step + 1 < kTileN / 16) load_b(last_pair ? step + 1 : step, last_pair ? 0 : pair + 1);
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          ptx::mma_m16n8k16<T>(output[slab][2 * pair], a[slab], b[pair % 2][0], b[pair % 2][1]);
          ptx::mma_m16n8k16<T>(output[slab][2 * pair + 1], a[slab], b[pair % 2][2], b[pair % 2][3]);
        }
      }
    }
  }

  static __device__ __forceinline__ void run(const ForwardParams& params, const VectorPaths& vectorized,
                                             const Keys& source, const TileSchedule& schedule) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const QueryShared q_tile{ptx::shared_address(shared_memory)};
    const KeyShared k_tile{q_tile.base + QueryShared::kBytes};
    const KeyShared v_tile{k_tile.base + KeyShared::kBytes};

    if (!schedule.has(blockIdx.x)) return;
    const TileSchedule::Item item = schedule.item(blockIdx.x);
    const int head = item.plane % params.shape.heads;
    const int batch = item.plane / params.shape.heads;
    const Sequence sequence = params.sequence(batch);
    const QueryTiling tiling = sequence.query_tiling(params.geometry, kTileM);
    if (item.tile >= tiling.count()) return;
    const QueryTile queries = tiling.tile(item.tile);
    const int kv_head = head / (params.shape.heads / params.shape.kv_heads);
    const int64_t first_query = sequence.first_q + queries.begin - sequence.first_position();
    const T* q = static_cast<const T*>(params.q) + batch * params.q_strides.batch + head * params.q_strides.head +
                 first_query * params.q_strides.seq;
    const T* k = static_cast<const T*>(params.k) + batch * params.k_strides.batch + kv_head * params.k_strides.head +
                 sequence.first_k * params.k_strides.seq;
    const T* v = static_cast<const T*>(params.v) + batch * params.v_strides.batch + kv_head * params.v_strides.head +
                 sequence.first_k * params.v_strides.seq;
    const float scale_log2 = logit_scale(params, batch) * kLog2E;

    const auto keys = source.reader(batch, head, queries);
    const auto load_k = [&](const KeyTile& tile) {
      keys.template copy<kThreads>(k_tile, k, params.k_strides.seq, tile, params.shape.head_dim, vectorized.k);
      ptx::cp_async_commit();
    };
    const auto load_v = [&](const KeyTile& tile) {
      keys.template copy<kThreads>(v_tile, v, params.v_strides.seq, tile, params.shape.head_dim, vectorized.v);
      ptx::cp_async_commit();
    };
    const auto load_q = [&](Regime regime) {
      load_queries<kTileM, kThreads, 1>(q_tile, params, q, queries, regime, vectorized.rotation, threadIdx.x);
    };

    __shared__ SegmentList segments;
    if (threadIdx.x == 0) segments = source.segments(params, batch, head, queries);
    __syncthreads();
    KeyTileWalk<kTileN> walk(segments, queries.begin);
    KeyTile tile = walk.tile();
    load_k(tile);
    load_q(tile.regime);

    const int warp_row = threadIdx.x / 32 * kWarpRows;
    Output output = {};
    OnlineSoftmax<kSlabs> softmax;
    while (true) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // K and Q are there, and every warp has finished with V of the tile before
      load_v(tile);
      Logits logits;
      multiply_keys(logits, q_tile, k_tile);
      ptx::cp_async_wait<0>();
      __syncthreads();  // V is there, and every warp has finished with Q and K
      const KeyTile current = tile;
      walk.advance();
      const bool last = walk.done();
      if (!last) {
        tile = walk.tile();
        load_k(tile);
      }
      if (current.causal || current.valid < kTileN) hide_keys(logits, current, queries.begin + warp_row);
      float shrink[kSlabs][2];
      if (softmax.update(logits, scale_log2, shrink)) scale_rows(output, shrink);
      multiply_values(output, logits, v_tile);
      if (last) break;
      if (Keys::kRotatesQueries && tile.regime != current.regime) load_q(tile.regime);
    }

    float normalise[kSlabs][2], lse[kSlabs][2];
    softmax.finish(scale_log2, normalise, lse);
    scale_rows(output, normalise);
    const int valid = queries.end - queries.begin;
    T* out = static_cast<T*>(params.out) + batch * params.out_strides.batch + head * params.out_strides.head +
             first_query * params.out_strides.seq;
    store_output(q_tile, output, out, params.out_strides.seq, warp_row, valid, params.shape.head_dim, vectorized.out);
    store_lse(lse, params.softmax_lse + params.plane(batch, head) * params.rows_q() + first_query, warp_row, valid);
  }
};

}  // namespace chunkattn::cuda
