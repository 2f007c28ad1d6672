// The Hopper forward main loop: wgmma, TMA and warp specialisation (sm_90a).
//
// Thread blocks are persistent. Of the first warpgroup, warp 0 takes tiles from the schedule and loads K and V; its
// other three warps prepare queries: they read them, rotate them for a regime and write them to the next free Q slot,
// so that the rotation the next segment (or the next tile) needs is ready before its keys arrive. Queries that are
// attended as they are warp 0 loads itself. The other warpgroups each own 64 rows of the tile and walk its key tiles
// with one softmax state that regimes do not interrupt. Everybody waits on full/empty pairs of mbarriers: see Control.
#pragma once

#include "cuda/common/key_tiles.cuh"
#include "cuda/common/mask.cuh"
#include "cuda/common/query_tile.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/tile_schedule.h"
#include "cuda/common/vector_paths.h"
#include "cuda/common/warpgroup_multiply.cuh"
#include "cuda/forward/key_source.cuh"
#include "cuda/forward/tile_sizes.h"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warpgroup.cuh"

namespace chunkattn::cuda {

// A tile of the schedule, decoded once for all warps of the block.
struct TileWork {
  int batch;  // -1 ends the kernel
  int head;
  int kv_head;
  int first_query;  // row of q of the tile's first query
  int first_key;    // row of k and v of the sequence's first key
  int box_batch;    // what the copy engine calls the batch
  int seqlen_k;     // of the sequence, if anything may lie behind it: otherwise there are zeros
  QueryTile queries;
  SegmentList segments;
};

template <typename T, int kHeadDim, typename Keys>
struct ForwardSm90 {
  using Sizes = ForwardSm90Tile<kHeadDim>;
  static constexpr int kTileM = Sizes::kTileM;
  static constexpr int kTileN = Sizes::kTileN;
  static constexpr int kConsumers = Sizes::kConsumers;
  static constexpr int kStages = Sizes::kStages;
  static constexpr int kQueryStages = Sizes::kQueryStages;
  static constexpr int kWorkStages = 4;  // the tile in work at either end, and the one published ahead
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kQueryThreads = 96;

  using QueryShared = PanelTile<kTileM, kHeadDim>;
  using KeyShared = PanelTile<kTileN, kHeadDim>;
  using Logits = float[1][kTileN / 8][4];
  using Output = float[1][kHeadDim / 8][4];
  using Weights = uint32_t[kTileN / 16][4];  // P, rounded to T: the a operand of P V

  struct Control {
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_empty[kStages];
    uint64_t work_full[kWorkStages], work_empty[kWorkStages];
    TileWork work[kWorkStages];
  };

  static constexpr size_t kSharedBytes =
      kQueryStages * QueryShared::kBytes + 2 * kStages * KeyShared::kBytes + sizeof(Control);

  const ForwardParams& params;
  const VectorPaths& vectorized;
  const Keys& source;
  uint32_t shared;  // Q slots, then K stages, then V stages
  Control& control;

  __device__ __forceinline__ QueryShared query_tile(int slot) const { return {shared + slot * QueryShared::kBytes}; }
  __device__ __forceinline__ KeyShared key_tile(int stage) const {
    return {shared + kQueryStages * QueryShared::kBytes + stage * KeyShared::kBytes};
  }
  __device__ __forceinline__ KeyShared value_tile(int stage) const { return key_tile(kStages + stage); }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kQueryStages; ++i) {
      ptx::mbarrier_init(control.query_full + i, Keys::kRotatesQueries ? kQueryThreads : 1);
      ptx::mbarrier_init(control.query_empty + i, kConsumers * 128);  // every thread: each wrote output there
    }
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(control.key_full + i, 1);
      ptx::mbarrier_init(control.key_empty + i, kConsumerWarps);
      ptx::mbarrier_init(control.value_full + i, 1);
      ptx::mbarrier_init(control.value_empty + i, kConsumerWarps);
    }
    for (int i = 0; i < kWorkStages; ++i) {
      ptx::mbarrier_init(control.work_full + i, 1);
      // Every thread has read it: of the first warpgroup those that prepare queries, or those that load regions.
      ptx::mbarrier_init(control.work_empty + i, kConsumers * 128 + (Keys::kRotatesQueries ? kQueryThreads : 32));
    }
    ptx::mbarrier_init_fence();
  }

  // One arrival per warp, once all its lanes are past.
  static __device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
  }

  // Fills in the work of a schedule's item. Where sequences have their own lengths the schedule may have room for the
  // longest, and some items are nothing: false.
  __device__ __forceinline__ bool describe(TileWork& work, const TileSchedule::Item& item) const {
    const int batch = item.plane / params.shape.heads;
    const Sequence sequence = source.sequence(params, batch);
    const QueryTiling tiling = sequence.query_tiling(params.geometry, kTileM);
    if (item.tile >= tiling.count()) return false;
    work.batch = batch;
    work.head = item.plane % params.shape.heads;
    work.kv_head = work.head / (params.shape.heads / params.shape.kv_heads);
    work.queries = tiling.tile(item.tile);
    work.first_query = static_cast<int>(sequence.first_q) + work.queries.begin - sequence.first_position();
    work.first_key = static_cast<int>(sequence.first_k);
    work.box_batch = params.packed() ? 0 : batch;
    work.seqlen_k = source.ends_in_zeros(params) ? INT32_MAX : sequence.seqlen_k;
    work.segments = source.segments(params, work.batch, work.head, work.queries);
    return true;
  }

  // The item after those that the blocks start with, in the order of the blocks that ask.
  static __device__ __forceinline__ int64_t next_item(int* tile_counter) {
    return static_cast<int64_t>(gridDim.x) + atomicAdd(tile_counter, 1);
  }

  __device__ __forceinline__ void publish(Ring<kWorkStages>& ring, const TileSchedule& schedule, int64_t index,
                                          int* tile_counter) const {
    ring.wait_empty(control.work_empty);
    TileWork& work = control.work[ring.index];
    work.batch = -1;
    while (schedule.has(index) && !describe(work, schedule.item(static_cast<int>(index)))) {
      index = next_item(tile_counter);
    }
    ptx::mbarrier_arrive(control.work_full + ring.index);
    ring.advance();
  }

  static __device__ __forceinline__ void load_tile(const KeyShared& tile, const CUtensorMap* map, uint64_t* full,
                                                   int token, const TileWork& work) {
    ptx::mbarrier_arrive_expect(full, KeyShared::kBytes);
#pragma unroll
    for (int panel = 0; panel < KeyShared::kPanels; ++panel) {
      ptx::tma_load_4d(tile.base + panel * KeyShared::kPanelBytes, map, full, panel * 64, work.first_key + token,
                       work.kv_head, work.box_batch);
    }
  }

  // One thread. K runs a tile ahead of V, in the order the consumers free them.
  __device__ __forceinline__ void load_keys_and_values(const CUtensorMap* key_map, const CUtensorMap* value_map,
                                                       const TileSchedule& schedule, int* tile_counter) const {
    Ring<kWorkStages> published;
    Ring<kWorkStages> ring;
    Ring<kStages> keys, values;
    publish(published, schedule, blockIdx.x, tile_counter);
    while (true) {
      const TileWork& work = control.work[ring.index];
      if (work.batch < 0) return;
      int pending = -1;  // the tile whose keys are under way and whose values are not
      for (KeyTileWalk<kTileN> walk(work.segments, work.queries.begin);; walk.advance()) {
        const int token = walk.done() ? -1 : walk.tile().begin;
        if (token >= 0) {
          keys.wait_empty(control.key_empty);
          load_tile(key_tile(keys.index), key_map, control.key_full + keys.index, token, work);
          keys.advance();
        }
        // The next tile is announced once this one's first keys are on their way.
        if (pending < 0) publish(published, schedule, next_item(tile_counter), tile_counter);
        if (pending >= 0) {
          values.wait_empty(control.value_empty);
          load_tile(value_tile(values.index), value_map, control.value_full + values.index, pending, work);
          values.advance();
        }
        if (token < 0) break;
        pending = token;
      }
      ring.advance();
    }
  }

  // One warp. Each lane knows where its box begins, the first has the copy engine bring all of them.
  __device__ __forceinline__ void load_boxes(const KeyShared& tile, const CUtensorMap* map, uint64_t* full,
                                             const BoxPlace& place, const TileWork& work) const {
    const int lane = threadIdx.x % 32;
    if (lane == 0) ptx::mbarrier_arrive_expect(full, KeyShared::kBytes);
    for (int row = 0, box = 0; row < kTileN; row += source.box_rows, ++box) {
      const BoxPlace from{__shfl_sync(0xffffffffu, place.row, box), __shfl_sync(0xffffffffu, place.batch, box)};
      if (lane != 0) continue;
#pragma unroll
      for (int panel = 0; panel < KeyShared::kPanels; ++panel) {
        ptx::tma_load_4d(tile.base + panel * KeyShared::kPanelBytes + row * 128, map, full, panel * 64, from.row,
                         work.kv_head, from.batch);
      }
    }
  }

  // One warp, whose first lane alone waits and publishes. K runs a tile ahead of V, as above.
  __device__ __forceinline__ void load_in_boxes(const CUtensorMap* key_map, const CUtensorMap* value_map,
                                                const TileSchedule& schedule, int* tile_counter) const {
    const bool leads = threadIdx.x % 32 == 0;
    const int first_key = threadIdx.x % 32 * source.box_rows;  // of this lane's box in a tile
    Ring<kWorkStages> published;
    Ring<kWorkStages> ring;
    Ring<kStages> keys, values;
    if (leads) publish(published, schedule, blockIdx.x, tile_counter);
    while (true) {
      __syncwarp();  // the tile is published
      const TileWork& work = control.work[ring.index];
      if (work.batch < 0) return;
      const auto boxes = source.boxes(params, work.batch, work.head, work.queries, work.seqlen_k);
      bool first = true;
      BoxPlace pending{};  // of the tile whose keys are under way and whose values are not
      for (KeyTileWalk<kTileN> walk(work.segments, work.queries.begin);; walk.advance()) {
        const bool done = walk.done();
        BoxPlace place{};
        if (!done) {
          place = boxes.place(walk.tile(), first_key);
          if (leads) keys.wait_empty(control.key_empty);
          load_boxes(key_tile(keys.index), key_map, control.key_full + keys.index, place, work);
          keys.advance();
        }
        if (!first) {
          if (leads) values.wait_empty(control.value_empty);
          load_boxes(value_tile(values.index), value_map, control.value_full + values.index, pending, work);
          values.advance();
        } else if (leads) {
          publish(published, schedule, next_item(tile_counter), tile_counter);
        }
        if (done) break;
        first = false;
        pending = place;
      }
      ring.advance();
    }
  }

  // One thread.
  __device__ __forceinline__ void load_query_tile(const CUtensorMap* map, int slot, const TileWork& work) const {
    ptx::mbarrier_arrive_expect(control.query_full + slot, QueryShared::kBytes);
#pragma unroll
    for (int panel = 0; panel < QueryShared::kPanels; ++panel) {
      ptx::tma_load_4d(query_tile(slot).base + panel * QueryShared::kPanelBytes, map, control.query_full + slot,
                       panel * 64, work.first_query, work.head, work.batch);
    }
  }

  // One warp. Lane i knows the first row of the tile's box i. One thread has to start the copy of every box's every
  // panel, and this must not take longer than the products of the tile: it would with a division, a load or a divergent
  // branch around each copy. So the loop is unrolled for every number of rows that a box may have, and ptxas is told
  // that the thread is alone.
  template <int kBoxRows = 8>
  __device__ __forceinline__ void load_regions(const KeyShared& tile, const CUtensorMap* map, uint64_t* full, int row,
                                               int kv_head, int batch) const {
    if constexpr (kTileN % kBoxRows != 0) {
      load_regions<kBoxRows + 8>(tile, map, full, row, kv_head, batch);
    } else {
      if constexpr (kBoxRows < kTileN) {
        if (source.box_rows != kBoxRows) {
          return load_regions<kBoxRows + 8>(tile, map, full, row, kv_head, batch);
        }
      }
      constexpr int kBoxes = kTileN / kBoxRows;
      int rows[kBoxes];
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) rows[box] = __shfl_sync(0xffffffffu, row, box);
      if (ptx::elect_one()) {
        ptx::mbarrier_arrive_expect(full, KeyShared::kBytes);
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
          for (int panel = 0; panel < KeyShared::kPanels; ++panel) {
            ptx::tma_load_4d(tile.base + panel * KeyShared::kPanelBytes + box * kBoxRows * 128, map, full, panel * 64,
                             rows[box], kv_head, batch);
          }
        }
      }
      __syncwarp();
    }
  }

  // One warp, whose first lane publishes. K runs a tile ahead of V, as above. Where the boxes of a tile lie is looked
  // up a tile ahead, before the wait for room, so that no copy waits for global memory.
  __device__ __forceinline__ void load_queries_and_regions(const CUtensorMap* query_map, const CUtensorMap* key_map,
                                                           const CUtensorMap* value_map, const TileSchedule& schedule,
                                                           int* tile_counter) const {
    const bool leads = threadIdx.x % 32 == 0;
    const int first_key = threadIdx.x % 32 * source.box_rows;  // of this lane's box in a tile
    Ring<kWorkStages> published;
    Ring<kWorkStages> ring;
    Ring<kQueryStages> queries;
    Ring<kStages> keys, values;
    if (leads) publish(published, schedule, blockIdx.x, tile_counter);
    while (true) {
      ring.wait_full(control.work_full);
      const TileWork& work = control.work[ring.index];
      if (work.batch < 0) return;
      // Barriers make the compiler read memory anew, so what every copy needs is kept in registers.
      const int batch = work.batch;
      const int kv_head = work.kv_head;
      const auto boxes = source.boxes(params, batch, work.head, work.queries);
      KeyTileWalk<kTileN> walk(work.segments, work.queries.begin);
      int next = boxes.row(walk.tile(), first_key);
      int pending = -1;  // this lane's box of the tile whose keys are under way and whose values are not
      while (true) {
        const int row = next;  // -1 behind the last tile
        if (row >= 0) {
          walk.advance();
          next = walk.done() ? -1 : boxes.row(walk.tile(), first_key);
          keys.wait_empty(control.key_empty);
          load_regions(key_tile(keys.index), key_map, control.key_full + keys.index, row, kv_head, batch);
          keys.advance();
        }
        if (pending >= 0) {
          values.wait_empty(control.value_empty);
          load_regions(value_tile(values.index), value_map, control.value_full + values.index, pending, kv_head, batch);
          values.advance();
        } else {
          if (leads) {
            queries.wait_empty(control.query_empty);
            load_query_tile(query_map, queries.index, work);
            publish(published, schedule, next_item(tile_counter), tile_counter);
          }
          __syncwarp();
        }
        if (row < 0) break;
        pending = row;
      }
      ptx::mbarrier_arrive(control.work_empty + ring.index);
      queries.advance();
      ring.advance();
    }
  }

  // kQueryThreads threads.
  __device__ __forceinline__ void prepare_queries(int thread) const {
    Ring<kWorkStages> ring;
    Ring<kQueryStages> slot;
    while (true) {
      ring.wait_full(control.work_full);
      const TileWork& work = control.work[ring.index];
      if (work.batch < 0) return;
      const T* q = static_cast<const T*>(params.q) + work.batch * params.q_strides.batch +
                   work.head * params.q_strides.head + work.first_query * params.q_strides.seq;
      for (int segment = 0; segment < work.segments.count; ++segment) {
        slot.wait_empty(control.query_empty);
        load_queries<kTileM, kQueryThreads, Sizes::kQueryBatch>(query_tile(slot.index), params, q, work.queries,
                                                                work.segments.items[segment].regime,
                                                                vectorized.rotation, thread);
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(control.query_full + slot.index);
        slot.advance();
      }
      ptx::mbarrier_arrive(control.work_empty + ring.index);
      ring.advance();
    }
  }

  // Starts S = Q K^T for the warpgroup's 64 rows.
  static __device__ __forceinline__ void start_logits(Logits& logits, const QueryShared& q, const KeyShared& k,
                                                      int warpgroup) {
    start_rows_by_rows<T>(logits[0], q, warpgroup * 64, k);
  }

  // Starts O += P V.
  static __device__ __forceinline__ void start_output(Output& output, const Weights& weights, const KeyShared& v) {
    start_operand_by_rows<T>(output[0], weights, v);
  }

  static __device__ __forceinline__ void round_weights(Weights& weights, const Logits& p) {
#pragma unroll
    for (int step = 0; step < kTileN / 16; ++step) pack_operand<T>(weights[step], p[0], step);
  }

  // The consumer warpgroups take turns at the tensor cores: while one multiplies, the others do their softmax.
  static constexpr int kTurnBarrier = 1;                           // + warpgroup
  static constexpr int kStoreBarrier = kTurnBarrier + kConsumers;  // + warpgroup
  static __device__ __forceinline__ void wait_turn(int warpgroup) {
    ptx::named_barrier_sync(kTurnBarrier + warpgroup, 256);
  }
  static __device__ __forceinline__ void pass_turn(int warpgroup) {
    ptx::named_barrier_arrive(kTurnBarrier + (warpgroup + 1 == kConsumers ? 0 : warpgroup + 1), 256);
  }

  struct ConsumerState {
    Ring<kQueryStages> queries;
    Ring<kStages> keys, values;
    int storing = -1;  // the Q slot from which the copy engine may still be reading output; known to one thread
  };

  // The thread that has the copy engine store a warpgroup's output frees the Q slot once it is read.
  __device__ __forceinline__ void finish_store(ConsumerState& state) const {
    if (state.storing < 0) return;
    ptx::bulk_wait_read();
    ptx::mbarrier_arrive(control.query_empty + state.storing);
    state.storing = -1;
  }

  // Writes the warpgroup's rows of the tile, through its rows of the last Q slot, and frees the slot.
  __device__ __forceinline__ void store(const Output& output, const TileWork& work, int warpgroup,
                                        const CUtensorMap* output_map, ConsumerState& state) const {
    const QueryShared staging = query_tile(state.queries.index);
    const int warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
    const int valid = work.queries.end - work.queries.begin;
    // None of the warpgroup's warps multiplies from these rows any more.
    ptx::named_barrier_sync(kStoreBarrier + warpgroup, 128);
    stage_output<T>(staging, output, warp_row);
    bool frees = true;
    if (valid == kTileM && vectorized.out) {
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(kStoreBarrier + warpgroup, 128);
      if (threadIdx.x % 128 == 0) {
#pragma unroll
        for (int panel = 0; panel < QueryShared::kPanels; ++panel) {
          ptx::tma_store_4d(output_map, staging.base + panel * QueryShared::kPanelBytes + warpgroup * 64 * 128,
                            panel * 64, work.first_query + warpgroup * 64, work.head, work.box_batch);
        }
        ptx::bulk_commit();
        state.storing = state.queries.index;
        frees = false;
      }
    } else {
      T* out = static_cast<T*>(params.out) + work.batch * params.out_strides.batch +
               work.head * params.out_strides.head + work.first_query * params.out_strides.seq;
      store_staged_output<16>(staging, out, params.out_strides.seq, warp_row, valid, params.shape.head_dim,
                              vectorized.out);
    }
    if (frees) ptx::mbarrier_arrive(control.query_empty + state.queries.index);
    state.queries.advance();
  }

  // Behind the end of a sequence lies anything: 0 times infinity would spoil the output. Clears the rows of V there, of
  // which `written` are the sequence's own, when they have arrived. Every warpgroup writes the same zeros, so none
  // waits for another.
  __device__ __forceinline__ void clear_values(const Ring<kStages>& values, int written, int warpgroup) const {
    if (written >= kTileN) return;
    values.wait_full(control.value_full);
    const KeyShared v = value_tile(values.index);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < (kTileN - written) * KeyShared::kChunksPerRow; i += 128) {
      const int row = written + i / KeyShared::kChunksPerRow;
      store_shared(v.address(row, i % KeyShared::kChunksPerRow), uint4{0, 0, 0, 0});
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(kStoreBarrier + warpgroup, 128);
  }

  __device__ __forceinline__ void attend(const TileWork& work, int warpgroup, const CUtensorMap* output_map,
                                         ConsumerState& rings) const {
    const float scale_log2 = logit_scale(params, work.batch) * kLog2E;
    const int warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
    Output output = {};
    Logits logits;
    Weights weights;
    float shrink[1][2];
    OnlineSoftmax<1> softmax;
    KeyTileWalk<kTileN> walk(work.segments, work.queries.begin);
    // The softmax of a key tile in two parts, between which P V of the tile before is awaited, since P needs its
    // registers. Each part has exponentials, so that their unit is never idle for long: while it works on one half of
    // the rows, the maxima of the other half are found. `values` is where the tile's own V arrives.
    const auto softmax_first = [&](Ring<kStages> values, bool next) {
      const KeyTile tile = walk.tile();
      if (tile.causal || tile.valid < kTileN) {
        hide_keys(logits, tile, work.queries.begin + warp_row);
        if constexpr (Keys::kRotatesQueries) {
          if (next) values.advance();
          clear_values(values, work.seqlen_k - tile.begin, warpgroup);
        }
      }
      bool grown = softmax.template raise_maximum<0>(logits, scale_log2, shrink);
      softmax.template exponentiate<0>(logits, scale_log2);
      grown |= softmax.template raise_maximum<1>(logits, scale_log2, shrink);
      return __any_sync(0xffffffffu, grown) != 0;
    };
    const auto softmax_second = [&] {
      softmax.template exponentiate<1>(logits, scale_log2);
      round_weights(weights, logits);
    };
    if (kQueryStages == 1) finish_store(rings);  // the queries wait for the only slot
    rings.queries.wait_full(control.query_full);
    rings.keys.wait_full(control.key_full);
    // Moves on to the next key tile, and with the segment to the queries rotated for it.
    const auto advance = [&] {
      if (!walk.advance_in_segment()) {
        if (!walk.open_segment()) return false;
        if constexpr (Keys::kRotatesQueries) {
          ptx::mbarrier_arrive(control.query_empty + rings.queries.index);
          rings.queries.advance();
          rings.queries.wait_full(control.query_full);
        }
      }
      rings.keys.wait_full(control.key_full);
      return true;
    };
    const auto release_keys = [&] {
      arrive_warp(control.key_empty + rings.keys.index);
      rings.keys.advance();
    };
    const auto release_values = [&] {
      arrive_warp(control.value_empty + rings.values.index);
      rings.values.advance();
    };

    start_logits(logits, query_tile(rings.queries.index), key_tile(rings.keys.index), warpgroup);
    if (kQueryStages > 1) finish_store(rings);
    ptx::wgmma_wait<0>();
    ptx::pin(logits[0]);
    release_keys();
    softmax_first(rings.values, false);
    softmax_second();

    for (bool more = advance(); more;) {
      rings.values.wait_full(control.value_full);
      wait_turn(warpgroup);
      start_logits(logits, query_tile(rings.queries.index), key_tile(rings.keys.index), warpgroup);
      start_output(output, weights, value_tile(rings.values.index));
      pass_turn(warpgroup);
      ptx::wgmma_wait<1>();
      ptx::pin(logits[0]);
      release_keys();
      const bool shrinks = softmax_first(rings.values, true);
      // ptxas moves a wait up over arithmetic that does not need it, but not over the branches of advance(); the pin
      // keeps the arithmetic on this side of them.
      ptx::pin(logits[0]);
      more = advance();
      ptx::wgmma_wait<0>();
      ptx::pin(output[0]);
      release_values();
      softmax_second();
      if (shrinks) scale_rows(output, shrink);
    }

    rings.values.wait_full(control.value_full);
    start_output(output, weights, value_tile(rings.values.index));
    ptx::wgmma_wait<0>();
    ptx::pin(output[0]);
    release_values();

    float normalise[1][2], lse[1][2];
    softmax.finish(scale_log2, normalise, lse);
    scale_rows(output, normalise);
    store(output, work, warpgroup, output_map, rings);
    float* const plane_lse = params.softmax_lse + params.plane(work.batch, work.head) * params.rows_q();
    store_lse(lse, plane_lse + work.first_query, warp_row, work.queries.end - work.queries.begin);
  }

  __device__ __forceinline__ void consume(int warpgroup, const CUtensorMap* output_map) const {
    Ring<kWorkStages> ring;
    ConsumerState rings;
    if (warpgroup == kConsumers - 1) pass_turn(warpgroup);
    while (true) {
      ring.wait_full(control.work_full);
      const TileWork& work = control.work[ring.index];
      if (work.batch < 0) break;
      attend(work, warpgroup, output_map, rings);
      ptx::mbarrier_arrive(control.work_empty + ring.index);
      ring.advance();
    }
    finish_store(rings);  // shared memory lasts until then
  }

  // Without a query_map queries are rotated on their way.
  static __device__ __forceinline__ void run(const ForwardParams& params, const VectorPaths& vectorized,
                                             const Keys& source, const TileSchedule& schedule,
                                             const CUtensorMap* query_map, const CUtensorMap& key_map,
                                             const CUtensorMap& value_map, const CUtensorMap& output_map,
                                             int* tile_counter) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    constexpr size_t kControlOffset = kSharedBytes - sizeof(Control);
    const ForwardSm90 self{params, vectorized, source, ptx::shared_address(shared_memory),
                           *reinterpret_cast<Control*>(shared_memory + kControlOffset)};
    // The shuffle tells ptxas that the index is uniform, and so are the descriptors made of it.
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) self.init_barriers();
    __syncthreads();
    if (warpgroup == 0) {
      ptx::registers_decrease<Sizes::kProducerRegisters>();
      if (threadIdx.x >= 32) {
        if constexpr (Keys::kRotatesQueries) self.prepare_queries(threadIdx.x - 32);
      } else if constexpr (!Keys::kRotatesQueries) {
        self.load_queries_and_regions(query_map, &key_map, &value_map, schedule, tile_counter);
      } else if constexpr (Keys::kInBoxes) {
        self.load_in_boxes(&key_map, &value_map, schedule, tile_counter);
      } else if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&key_map);
        ptx::prefetch_tensor_map(&value_map);
        self.load_keys_and_values(&key_map, &value_map, schedule, tile_counter);
      }
    } else {
      ptx::registers_increase<Sizes::kConsumerRegisters>();
      self.consume(warpgroup - 1, &output_map);
    }
  }
};

}  // namespace chunkattn::cuda
