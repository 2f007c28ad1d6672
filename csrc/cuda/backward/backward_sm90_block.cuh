// What surrounds the Hopper backward kernels: the tiles in shared memory, the warps that bring them and take dQ away,
// and who waits for whom. What consumer warpgroups make of a tile is in backward_sm90_steps.cuh.
//
// One thread block owns one tile of keys of one KV head, and with it dK and dV. Of its first warpgroup, one thread
// loads K and V once and then Q and dO of the query tiles that attend the keys (QueryTileWalk), of all query heads that
// share them; one warp reads their statistics and says what the tile is; two warps have the copy engine add dQ. The
// regime of a pair of tiles says which rotation of Q is read and which dQ is added to. Two more warpgroups consume: a
// kernel is what they do (backward_sm90.cuh, backward_sm90_pair.cuh).
//
// Or two thread blocks, a cluster, share a tile of keys, half of it each. They meet the same queries, so each loads
// half of every Q and dO for both, and adds half the columns of dQ.
#pragma once

#include <type_traits>

#include "cuda/backward/backward_sm90_steps.cuh"
#include "cuda/backward/key_source.cuh"
#include "cuda/backward/query_shifts.cuh"
#include "cuda/backward/tile_sizes.h"
#include "cuda/common/ring.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/swizzled_tile.cuh"
#include "cuda/common/warpgroup_multiply.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warpgroup.cuh"

namespace chunkattn::cuda {

// What the copy engine reads and adds to.
struct BackwardMaps {
  CUtensorMap q[3];  // of each regime
  CUtensorMap dout;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap dq[3];  // of each regime; what it adds to
};

template <typename T, int kHeadDim, typename Keys>
struct BackwardSm90Block {
  using Sizes = BackwardSm90Tile<kHeadDim>;
  using Steps = BackwardSm90Steps<T, kHeadDim>;
  static constexpr int kTileM = Steps::kTileM;
  static constexpr int kTileN = Sizes::kTileN;
  static constexpr int kClusterSize = Sizes::kClusterSize;
  static constexpr int kBlockKeys = Steps::kBlockKeys;
  static constexpr int kStages = Sizes::kStages;
  static constexpr bool kDelayed = Sizes::kDelayed;
  static constexpr int kConsumers = Steps::kConsumers;
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  // A block starts with as many registers as fit all threads, in eights. What producers give up consumers may take.
  static_assert(kConsumers * Sizes::kConsumerRegisters + Sizes::kProducerRegisters <= 3 * 168);

  using QueryShared = typename Steps::QueryShared;
  using KeyShared = typename Steps::KeyShared;
  using KeyColumns = typename Steps::KeyColumns;
  using LogitShared = typename Steps::LogitShared;
  using Staged = StagedRows<kBlockKeys, kHeadDim>;
  using Logits = typename Steps::Logits;
  using KeyGradients = typename Steps::KeyGradients;

  // What a query tile is. Rows without a query have a log-sum-exp of +inf, which makes P zero.
  struct TileState {
    AttendingTile tile;
    bool masked;  // some query of the tile does not see some key
    int plane;    // Block::plane(); -1 behind the last tile
  };
  struct alignas(16) TileStatistics : TileState {
    float lse_log2[kTileM];  // by Steps::per_query_index()
    float delta[kTileM];     // the same
  };
  struct NoShifts {};
  // Where kDelayed, log-sum-exp and delta come as shifts.
  using Statistics = std::conditional_t<kDelayed, TileState, TileStatistics>;
  using Shifts = std::conditional_t<kDelayed, QueryShifts<kTileM>, NoShifts>;

  struct Control {
    Shifts shifts;
    uint64_t keys_full;
    uint64_t query_full[kStages], query_empty[kStages];
    uint64_t dout_full[kStages], dout_empty[kStages];
    uint64_t statistics_empty[kStages];  // they are full with the queries
    uint64_t other_ds_full, ds_taken;    // of a cluster: backward_sm90_pair.cuh
    Statistics statistics[kStages];
    int key_rows[Keys::kInRegions ? kTileN / 8 : 1];  // where the boxes of K and V lie that come one by one
    typename Keys::Work work;
  };

  static constexpr size_t kTileBytes = backward_sm90_tile_bytes<kHeadDim>();
  static constexpr size_t kSharedBytes = kTileBytes + sizeof(Control);
  static_assert(kSharedBytes <= 227 * 1024);

  const BackwardParams& params;
  const BackwardWorkspace& workspace;
  const BackwardMaps& maps;
  const Keys& source;
  uint32_t shared;  // K, V, the other block's K, the stages of Q, of dO, and what the kernel puts behind them
  Control& control;
  typename Keys::Tile own;  // the keys of this block's cluster
  int rank;                 // in the cluster

  // Where the block's part of the tile begins, and how many keys a part has that begins at `first`.
  __device__ __forceinline__ int key_offset() const { return kClusterSize == 1 ? 0 : rank * kBlockKeys; }
  __device__ __forceinline__ int count_keys(int first) const {
    const int count = own.keys.end - own.keys.begin - first;
    return count < 0 ? 0 : count < kBlockKeys ? count : kBlockKeys;
  }

  __device__ __forceinline__ KeyShared k_tile() const { return {shared}; }
  __device__ __forceinline__ KeyShared v_tile() const { return {shared + KeyShared::kBytes}; }
  __device__ __forceinline__ KeyColumns other_k_tile() const { return {shared + 2 * KeyShared::kBytes}; }
  __device__ __forceinline__ QueryShared q_tile(int stage) const {
    return {shared + 2 * KeyShared::kBytes + (kClusterSize - 1) * KeyColumns::kBytes + stage * QueryShared::kBytes};
  }
  __device__ __forceinline__ QueryShared dout_tile(int stage) const { return q_tile(kStages + stage); }
  __device__ __forceinline__ LogitShared ds_tile(int buffer) const {
    return {q_tile(2 * kStages).base + buffer * LogitShared::kBytes};
  }

  __device__ __forceinline__ decltype(auto) tiling() const {
    if constexpr (Keys::kInSequences) {
      return (source.work->queries.tiling);
    } else {
      return QueryTiling{params.forward.geometry, params.forward.first_position(), params.forward.shape.seqlen_k,
                         kTileM};
    }
  }

  __device__ __forceinline__ const RegimeRows& rows() const {
    if constexpr (Keys::kInSequences) {
      return source.work->queries.rows;
    } else {
      return workspace.rows;
    }
  }

  // Of the first head's query tiles that may attend to the keys.
  __device__ __forceinline__ int* turns() const {
    if constexpr (Keys::kInSequences) {
      return workspace.turns + source.work->queries.first_turn;
    } else {
      return workspace.turns;
    }
  }

  // Of a tile's first query in q and dout, and in what has a value for every query of a plane.
  static __device__ __forceinline__ int query_row(const QueryTiling& tiles, const AttendingTile& tile) {
    return Keys::kInSequences ? tile.query : tile.begin - tiles.begin;
  }

  __device__ __forceinline__ int plane(int head) const {
    return Keys::kInSequences ? head : own.batch * params.forward.shape.heads + head;
  }

  // What S is multiplied by once it is shifted.
  __device__ __forceinline__ float shifted_scale() const {
    return QueryShifts<kTileM>::scale(logit_scale(params.forward, own.batch));
  }

  // How often a block's consumers and warps of dQ arrive when they need Q, and dO, of a stage no longer.
  __device__ __forceinline__ void init_barriers(int query_arrivals, int dout_arrivals) const {
    ptx::mbarrier_init(&control.keys_full, 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(control.query_full + i, 1 + 32);  // the copy and the warp of the statistics
      ptx::mbarrier_init(control.query_empty + i, kClusterSize * query_arrivals);
      ptx::mbarrier_init(control.dout_full + i, 1);
      ptx::mbarrier_init(control.dout_empty + i, kClusterSize * dout_arrivals);
      ptx::mbarrier_init(control.statistics_empty + i,
                         kConsumerThreads + kConsumers * 32);  // every thread has read them
    }
    if constexpr (kDelayed) {
      for (uint64_t& empty : control.shifts.empty) ptx::mbarrier_init(&empty, kConsumers * 4);
    }
    if constexpr (kClusterSize > 1) {
      ptx::mbarrier_init(&control.other_ds_full, 1);
      ptx::mbarrier_init(&control.ds_taken, kConsumers * 4);
    }
    ptx::mbarrier_init_fence();
  }

  // Everybody meets, of the whole cluster.
  static __device__ __forceinline__ void sync_blocks() {
    if constexpr (kClusterSize == 1) {
      __syncthreads();
    } else {
      ptx::cluster_sync();
    }
  }

  // The second and the fourth coordinate of a box of which `count` rows from `row` on belong to the tile. In sequences
  // the others count as outside the tensor: encode_window_map.
  struct BoxPlace {
    int row;
    int batch;
  };
  template <int kBoxRows>
  __device__ __forceinline__ BoxPlace box_place(int row, int count) const {
    if constexpr (Keys::kInSequences) return {kBoxRows - count, row + count};
    return {row, own.batch};
  }

  // Copies the columns from `first` on.
  template <typename Tile>
  static __device__ __forceinline__ void load_tile(const Tile& tile, const CUtensorMap* map, uint64_t* full,
                                                   const BoxPlace& place, int head, int first = 0) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::tma_load_4d(tile.base + panel * Tile::kPanelBytes, map, full, first + panel * 64, place.row, head,
                       place.batch);
    }
  }

  // Copies Q or dO, or the block's share of it to all blocks of the cluster: the others copy the rest.
  __device__ __forceinline__ void load_queries(const QueryShared& tile, const CUtensorMap* map, uint64_t* full,
                                               const BoxPlace& place, int head) const {
    ptx::mbarrier_arrive_expect(full, QueryShared::kBytes);
    if constexpr (kClusterSize == 1) {
      load_tile(tile, map, full, place, head);
    } else {
      constexpr int kShare = QueryShared::kPanels / kClusterSize;
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const int panel = rank * kShare + i;
        ptx::tma_load_4d_multicast(tile.base + panel * QueryShared::kPanelBytes, map, full, panel * 64, place.row, head,
                                   place.batch, (1 << kClusterSize) - 1);
      }
    }
  }

  // One warp, before anything starts: regions lie anywhere. Boxes behind the keys come from behind the tensor, as
  // zeros.
  __device__ __forceinline__ void find_regions() const {
    const ListedRegions regions = source.regions(own);
    for (int box = threadIdx.x % 32; box < kTileN / source.box_rows; box += 32) {
      const int key = box * source.box_rows;
      control.key_rows[box] =
          key < own.keys.end - own.keys.begin ? source.token(regions, own, key) : params.forward.shape.seqlen_k;
    }
  }

  // One warp. One thread of it starts the copies, and ptxas is told that it is alone: otherwise they take many times as
  // long.
  __device__ __forceinline__ void load_regions() const {
    if (!ptx::elect_one()) return;
    expect_keys();
    const int boxes = kBlockKeys / source.box_rows;
#pragma unroll 1
    for (int box = 0; box < boxes; ++box) {
      load_keys(box * source.box_rows * 128, {control.key_rows[rank * boxes + box], own.batch});
      if constexpr (kClusterSize > 1) {
        load_other_keys(box * source.box_rows * 128, {control.key_rows[(1 - rank) * boxes + box], own.batch});
      }
    }
  }

  __device__ __forceinline__ void expect_keys() const {
    ptx::mbarrier_arrive_expect(&control.keys_full, 2 * KeyShared::kBytes + (kClusterSize - 1) * KeyColumns::kBytes);
  }

  // Copies a box of K and V to where it lies in a panel.
  __device__ __forceinline__ void load_keys(uint32_t offset, const BoxPlace& place) const {
    load_tile(KeyShared{k_tile().base + offset}, &maps.k, &control.keys_full, place, own.kv_head);
    load_tile(KeyShared{v_tile().base + offset}, &maps.v, &control.keys_full, place, own.kv_head);
  }

  // The same of the other block's K, the columns of which this one adds dQ.
  __device__ __forceinline__ void load_other_keys(uint32_t offset, const BoxPlace& place) const {
    load_tile(KeyColumns{other_k_tile().base + offset}, &maps.k, &control.keys_full, place, own.kv_head,
              rank * (kHeadDim / kClusterSize));
  }

  // One thread.
  __device__ __forceinline__ void load_tiles() const {
    if constexpr (!Keys::kInRegions) {
      const int batch = Keys::kInSequences ? 0 : own.batch;
      expect_keys();
      load_keys(0, {own.first_key + key_offset(), batch});
      if constexpr (kClusterSize > 1) load_other_keys(0, {own.first_key + (1 - rank) * kBlockKeys, batch});
    }
    const QueryTiling& tiles = tiling();
    const HeadRange heads = source.heads(params.forward.shape, own);
    Ring<kStages> ring;
#pragma unroll 1
    for (int head = heads.begin; head < heads.end; ++head) {
      for (auto walk = source.walk(params, tiles, rows(), own); !walk.done(tiles); walk.advance(tiles, rows())) {
        const AttendingTile tile = walk.tile(tiles, rows());
        ring.wait_empty(control.query_empty);
        load_queries(q_tile(ring.index), maps.q + static_cast<int>(tile.regime), control.query_full + ring.index,
                     box_place<kTileM>(tile.row, tile.count), head);
        ring.wait_empty(control.dout_empty);
        load_queries(dout_tile(ring.index), &maps.dout, control.dout_full + ring.index,
                     box_place<kTileM>(query_row(tiles, tile), tile.count), head);
        ring.advance();
      }
    }
  }

  // One warp.
  __device__ __forceinline__ void load_statistics() const {
    const QueryTiling& tiles = tiling();
    const int lane = threadIdx.x % 32;
    const HeadRange heads = source.heads(params.forward.shape, own);
    Ring<kStages> ring;
    [[maybe_unused]] Ring<QueryShifts<kTileM>::kStages> shift_ring;
    [[maybe_unused]] const float unscale = 1.f / shifted_scale();
#pragma unroll 1
    for (int head = heads.begin; head < heads.end; ++head) {
      const int plane = this->plane(head);
      for (auto walk = source.walk(params, tiles, rows(), own); !walk.done(tiles); walk.advance(tiles, rows())) {
        const AttendingTile tile = walk.tile(tiles, rows());
        const int rows_q = Keys::kInSequences ? params.forward.total_q : params.forward.shape.seqlen_q;
        const int64_t first = static_cast<int64_t>(plane) * rows_q + query_row(tiles, tile);
        ring.wait_empty(control.statistics_empty);
        Statistics& statistics = control.statistics[ring.index];
        if constexpr (kDelayed) shift_ring.wait_empty(control.shifts.empty);
#pragma unroll
        for (int row = lane; row < kTileM; row += 32) {
          const bool valid = row < tile.count;
          const float lse = valid ? params.forward.softmax_lse[first + row] : INFINITY;
          const float delta = valid ? workspace.delta[first + row] : 0.f;
          if constexpr (kDelayed) {
            control.shifts.set(shift_ring.index, row, lse * unscale, delta);
          } else {
            const int index = Steps::per_query_index(row);
            statistics.lse_log2[index] = lse * kLog2E;
            statistics.delta[index] = delta;
          }
        }
        if constexpr (kDelayed) {
          ptx::fence_async_proxy();
          shift_ring.advance();
        }
        if (lane == 0) {
          statistics.tile = tile;
          const int keys = count_keys(key_offset());
          statistics.masked =
              (tile.regime == Regime::kIntra && own.keys.begin + key_offset() + keys - 1 > tile.begin) ||
              keys < kBlockKeys;
          statistics.plane = plane;
        }
        ptx::mbarrier_arrive(control.query_full + ring.index);
        ring.advance();
      }
    }
    ring.wait_empty(control.statistics_empty);
    if (lane == 0) {
      control.statistics[ring.index].plane = -1;
      ptx::mbarrier_arrive(control.query_full + ring.index);  // for the copy, which has no more to bring
    }
    ptx::mbarrier_arrive(control.query_full + ring.index);
  }

  // This thread's index in its warpgroup. ptxas would sooner read the special register again, tile after tile, which
  // takes as long as shared memory, than keep the index; what a shuffle returned it has to keep.
  static __device__ __forceinline__ int warpgroup_thread() {
    return __shfl_sync(0xffffffffu, threadIdx.x, threadIdx.x % 32) % 128;
  }

  static __device__ __forceinline__ void arrive_warp(uint64_t* barrier, int thread) {
    __syncwarp();
    if (thread % 32 == 0) ptx::mbarrier_arrive(barrier);
  }

  // The same in one block of the cluster, and in all of them.
  static __device__ __forceinline__ void arrive_warp_in_block(uint64_t* barrier, int block, int thread) {
    __syncwarp();
    if (thread % 32 == 0) ptx::mbarrier_arrive_in_block(barrier, block);
  }
  static __device__ __forceinline__ void arrive_warp_in_cluster(uint64_t* barrier, int thread) {
    __syncwarp();
    if (thread % 32 < kClusterSize) ptx::mbarrier_arrive_in_block(barrier, thread % 32);
  }

  // Behind a partial tile the copy engine brought keys of the next chunk. Their P is zero, but they must be finite too.
  // Boxes of regions end where the tile does.
  __device__ __forceinline__ void clear_missing_keys(int thread) const {
    if constexpr (Keys::kInRegions) return;
    if (own.keys.end - own.keys.begin == kTileN) return;
    const int valid = count_keys(key_offset());
    clear_rows(k_tile(), valid, thread);
    clear_rows(v_tile(), valid, thread);
    if constexpr (kClusterSize > 1) clear_rows(other_k_tile(), count_keys((1 - rank) * kBlockKeys), thread);
    ptx::fence_async_proxy();
    sync_consumers();
  }

  template <typename Tile>
  static __device__ __forceinline__ void clear_rows(const Tile& tile, int first, int thread) {
#pragma unroll 1
    for (int i = thread; i < (kBlockKeys - first) * Tile::kChunksPerRow; i += kConsumerThreads) {
      store_shared(tile.address(first + i / Tile::kChunksPerRow, i % Tile::kChunksPerRow), uint4{0, 0, 0, 0});
    }
  }

  static constexpr int kConsumerBarrier = 1;
  // Barriers of one of the warpgroups: + warpgroup. Kernels have 4 to 7 and 10 on for themselves.
  static constexpr int kPartFullBarrier = 2;  // its part of dQ is in shared memory
  static constexpr int kPartFreeBarrier = 8;  // and may be written again
  static constexpr int kPartThreads = 128 + 32;
  static __device__ __forceinline__ void sync_consumers() {
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
  }

  // Hides keys from queries where the tiles are not wholly visible to each other. A thread's rows are keys here.
  __device__ __forceinline__ void hide_keys(Logits& logits, const AttendingTile& tile, int key_row) const {
    const int lane = threadIdx.x % 32;
    const bool causal = tile.regime == Regime::kIntra;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = own.keys.begin + key_offset() + key_row + half * 8 + lane / 4;
      // The first query of the tile that sees the key.
      const int first = position >= own.keys.end ? kTileM : causal ? position - tile.begin : 0;
      const int begin = first - lane % 4 * 2;
#pragma unroll
      for (int block = 0; block < kTileM / 8; ++block) {
        if (block * 8 < begin) logits[block][2 * half] = -INFINITY;
        if (block * 8 + 1 < begin) logits[block][2 * half + 1] = -INFINITY;
      }
    }
  }

  // Between these a warpgroup writes its part of dQ, for the warp that has it added. Behind its last part it waits once
  // more: that warp has arrived once more.
  static __device__ __forceinline__ void wait_part_free(int warpgroup) {
    ptx::named_barrier_sync(kPartFreeBarrier + warpgroup, kPartThreads);
  }
  static __device__ __forceinline__ void pass_part_on(int warpgroup) {
    ptx::fence_async_proxy();
    ptx::named_barrier_arrive(kPartFullBarrier + warpgroup, kPartThreads);
  }

  // One warp for each warpgroup: has the copy engine add the warpgroup's part of dQ, tile after tile. The part lies at
  // part(stage); once it is read, the warp calls release(stage).
  template <typename Part, typename Release>
  __device__ __forceinline__ void add_query_gradients(int warpgroup, Part&& part, Release&& release) const {
    const int query_tiles = workspace.turns == nullptr ? 0
                            : Keys::kInSequences       ? workspace.turns_per_plane
                                                       : tiling().count();
    Ring<kStages> ring;
    if constexpr (kDelayed) {
      // The part that comes with the first tile belongs to none.
      ptx::named_barrier_arrive(kPartFreeBarrier + warpgroup, kPartThreads);
      ptx::named_barrier_sync(kPartFullBarrier + warpgroup, kPartThreads);
    }
    while (true) {
      ptx::named_barrier_arrive(kPartFreeBarrier + warpgroup, kPartThreads);
      ring.wait_full(control.query_full);
      const Statistics& statistics = control.statistics[ring.index];
      if (statistics.plane < 0) return;
      // With two stages those of the next tile but one are needed before this one's dQ, which may also come a tile
      // late.
      constexpr bool kHeld = kStages == 2 || kDelayed;
      const int plane = statistics.plane;
      std::conditional_t<kHeld, const AttendingTile, const AttendingTile&> tile = statistics.tile;
      if constexpr (kHeld) ptx::mbarrier_arrive(control.statistics_empty + ring.index);
      ptx::named_barrier_sync(kPartFullBarrier + warpgroup, kPartThreads);
      if (threadIdx.x % 32 == 0) {
        const CUtensorMap* map = maps.dq + static_cast<int>(tile.regime);
        const int row = tile.row + (Steps::kCutRows ? warpgroup * 64 : 0);
        const int column = Steps::kCutRows ? 0 : (rank * kConsumers + warpgroup) * Steps::kQueryColumns;
        int* turn =
            workspace.turns == nullptr ? nullptr : turns() + static_cast<int64_t>(plane) * query_tiles + tile.index;
        if (turn != nullptr) {
          // Each warpgroup of each block of the tiles before passes one on.
          wait_for_turn(turn, kClusterSize * kConsumers * own.order);
          ptx::fence_async_proxy_all();
        }
#pragma unroll
        for (int panel = 0; panel < Steps::kGradientPanels; ++panel) {
          const uint32_t source_panel = part(ring.index) + panel * Steps::kGradientPanelBytes;
          if constexpr (Keys::kInSequences) {
            const int left = tile.count - (row - tile.row);
            const BoxPlace place = box_place<64>(row, left < 0 ? 0 : left < 64 ? left : 64);
            ptx::tma_add_4d(map, source_panel, column + panel * 32, place.row, plane, place.batch);
          } else {
            ptx::tma_add_3d(map, source_panel, column + panel * 32, row, plane);
          }
        }
        ptx::bulk_commit();
        if (turn == nullptr) {
          ptx::bulk_wait_read();
        } else {
          ptx::bulk_wait();
          ptx::fence_async_proxy_all();
          __threadfence();
          pass_turn_on(turn);
        }
      }
      if constexpr (!kHeld) ptx::mbarrier_arrive(control.statistics_empty + ring.index);
      release(ring.index);
      ring.advance();
    }
  }

  // Gives away dV, and dK, of the keys: this thread's rows begin at key_row. Called by kStoring threads, which sync()
  // brings together, when all have finished with the tiles: what K and V took has room for 16-bit rows.
  template <int kStoring, typename Sync>
  __device__ __forceinline__ void store_values(const KeyGradients& dv, int key_row, const Staged& staged,
                                               const BackwardVectorPaths& vectorized, int thread, Sync&& sync) const {
    const int count = count_keys(key_offset());
    if constexpr (kRowsByWarp) {
      source.template store_value_rows<T>(dv, key_row, k_tile(), params, vectorized, own, count);
    } else {
      source.template store_values<T, kStoring>(dv, key_row, 0, staged, params, workspace, vectorized, own,
                                                key_offset(), count, thread, sync);
    }
  }
  template <int kStoring, typename Sync>
  __device__ __forceinline__ void store_keys(KeyGradients& dk, int key_row, const Staged& staged,
                                             const BackwardVectorPaths& vectorized, int thread, Sync&& sync) const {
    const int count = count_keys(key_offset());
    if constexpr (kRowsByWarp) {
      if (source.template has_whole_pairs<kHeadDim>(params, workspace, vectorized)) {
        source.template store_key_rows<T>(dk, key_row, v_tile(), params, workspace, vectorized, own, count);
        return;
      }
      sync();  // dV has left what `staged` overlaps
    }
    source.template store_keys<T, kStoring>(dk, key_row, 0, staged, params, workspace, vectorized, own, key_offset(),
                                            count, thread, sync);
  }

 private:
  // Regions are added to float32 sums, and at head_dim 256 the registers do not reach for it.
  static constexpr bool kRowsByWarp = !Keys::kInRegions && kClusterSize == 1;
};

// The body of a kernel. Kernel is made of its Block and says what consumer warpgroups do, where they leave dQ, and how
// often they and the warps of dQ say that a stage is free.
template <typename Kernel, typename Keys>
__device__ __forceinline__ void run_backward_sm90(const BackwardParams& params, const BackwardWorkspace& workspace,
                                                  const BackwardVectorPaths& vectorized, const TileSchedule& schedule,
                                                  const Keys& source, const BackwardMaps& maps) {
  using Block = typename Kernel::Block;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const Block block{params,
                    workspace,
                    maps,
                    source,
                    ptx::shared_address(shared_memory),
                    *reinterpret_cast<typename Block::Control*>(shared_memory + Block::kTileBytes),
                    source.tile(params, key_tile_item(schedule, blockIdx.x / Block::kClusterSize), Block::kTileN),
                    Block::kClusterSize == 1 ? 0 : ptx::cluster_block_rank()};
  if constexpr (Keys::kInRegions || Keys::kInSequences) {
    if (block.own.keys.begin >= block.own.keys.end) return;
  }
  const Kernel kernel{block};
  // The shuffle tells ptxas that the index is uniform, and so are the descriptors made of it.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) block.init_barriers(Kernel::kQueryArrivals, Kernel::kDoutArrivals);
  if constexpr (Keys::kInRegions) {
    if (threadIdx.x / 32 == 1) block.find_regions();
  }
  if constexpr (Block::kDelayed) {
    if (threadIdx.x / 32 == 2) block.control.shifts.init(threadIdx.x % 32);
  }
  Block::sync_blocks();
  if (warpgroup == 0) {
    ptx::registers_decrease<Block::Sizes::kProducerRegisters>();
    if constexpr (Keys::kInRegions) {
      if (threadIdx.x / 32 == 0) block.load_regions();
    }
    if (threadIdx.x == 0) block.load_tiles();
    if (threadIdx.x / 32 == 1) block.load_statistics();
    if (threadIdx.x / 32 >= 2) kernel.add_query_gradients(threadIdx.x / 32 - 2);
  } else {
    ptx::registers_increase<Block::Sizes::kConsumerRegisters>();
    kernel.consume(warpgroup - 1, reinterpret_cast<float*>(shared_memory), vectorized);
  }
  // A block stays as long as others of its cluster reach into its memory.
  if constexpr (Block::kClusterSize > 1) Block::sync_blocks();
}

}  // namespace chunkattn::cuda
