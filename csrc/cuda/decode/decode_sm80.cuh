// The decode main loop: mma.sync and cp.async, for sm_80 and everything after it.
//
// A thread block attends, for one row tile of one KV head, to an equal share of the keys of all sequences
// (DecodeSchedule) piece by piece. Its teams of warps, one warp each when there are few rows, go over tiles of keys of
// their own and meet only at the end of a piece, while the copies of the next are under way. Rows and keys of a tile
// may lie in several chunks: the tile is multiplied once for each regime that occurs in it, and every logit is taken
// from its own.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/common/softmax_state.cuh"
#include "cuda/decode/key_stream.cuh"
#include "cuda/decode/new_rows.cuh"
#include "cuda/decode/paths.h"
#include "cuda/decode/products.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace chunkattn::cuda {

template <typename T, int kHeadDim, bool kFloat8, bool kManyRows>
struct DecodeSm80 {
  using Sizes = DecodeSizes<kHeadDim, kFloat8, kManyRows>;
  using Schedule = DecodeSchedule<Sizes::kTileN, kManyRows>;
  using Products = DecodeProducts<T, kFloat8>;
  using Stream = KeyStream<T, kHeadDim, kFloat8, kManyRows>;
  using KeyTile = typename Stream::Tile;
  static constexpr int kThreads = Sizes::kWarps * 32;
  static constexpr int kTeams = Sizes::kTeams;
  static constexpr int kTileM = Sizes::kTileM;
  static constexpr int kTileN = Sizes::kTileN;
  static constexpr int kBuffers = Sizes::kBuffers;
  static constexpr int kKeyBlocks = kTileN / 8;
  static constexpr int kDimBlocks = kHeadDim / 8;
  static constexpr int kChunks = kHeadDim / kChunk;
  using QueryShared = RowTile<kTileM, kHeadDim>;
  using Logits = float[1][kKeyBlocks][4];
  using Output = float[1][kDimBlocks][4];

  // Where queries were, the rows of a piece are added up in float32.
  static constexpr int kSumStride = kHeadDim + 8;
  static_assert(kTileM * kSumStride * 4 <= 3 * QueryShared::kBytes);

  const DecodeParams& params;
  const DecodePlan& plan;
  const DecodePaths& paths;
  const DecodeWorkspace& workspace;
  int kv_head;
  int row_tile;
  int group;

  // What is known of the rows of a piece.
  struct PieceRows {
    SequenceLengths lengths;
    int first_position;         // of query 0
    int low, high;              // positions of the first and the last query of the tile
    int low_chunk, high_chunk;  // where their chunks begin
    int position[2];            // of this thread's rows, lane / 4 and that + 8
    int chunk[2];
  };

  __device__ __forceinline__ int rows_in_tile() const { return min(plan.rows - row_tile * kTileM, kTileM); }
  __device__ __forceinline__ int group_heads() const { return params.heads / params.kv_heads; }

  // A query before the sequence's first token is rotated as the first.
  __device__ __forceinline__ int chunk_begin(int position) const {
    return params.geometry.chunk_begin(max(position, 0));
  }

  __device__ __forceinline__ PieceRows piece_rows(const Schedule& schedule, const Piece& piece) const {
    PieceRows rows;
    rows.lengths = schedule.lengths(piece.batch);
    rows.first_position = first_query_position(params, rows.lengths);
    rows.low = rows.first_position + schedule.queries().begin;
    rows.high = rows.first_position + schedule.queries().end - 1;
    rows.low_chunk = chunk_begin(rows.low);
    rows.high_chunk = chunk_begin(rows.high);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_tile * kTileM + warp_row() + threadIdx.x % 32 / 4 + half * 8;
      rows.position[half] = rows.first_position + min(row, plan.rows - 1) / group_heads();
      rows.chunk[half] = rows.low_chunk == rows.high_chunk ? rows.low_chunk : chunk_begin(rows.position[half]);
    }
    return rows;
  }

  static __device__ __forceinline__ int team() { return threadIdx.x / 32 / Sizes::kTeamWarps; }
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % Sizes::kTeamWarps * kDecodeWarpRows; }

  // New rows of a tile, which the stream has left alone in both buffers. What they need is read while the other rows
  // are still on their way.
  __device__ __forceinline__ void append(const PieceRows& rows, int batch, int key_begin, const KeyTile& k,
                                         const KeyTile& v) const {
    const int from = max(rows.lengths.stored, key_begin);
    const int to = min(rows.lengths.total, key_begin + kTileN);
    if (from >= to) return;
    const NewRows<T, kHeadDim, kFloat8> new_rows{params, batch, kv_head, rows.lengths.stored};
    new_rows.append(from, to, key_begin, k, v, paths.new_rows, static_cast<int>(threadIdx.x) % (Sizes::kTeamWarps * 32),
                    Sizes::kTeamWarps * 32);
  }

  static __device__ __forceinline__ void sync_team() {
    if constexpr (Sizes::kTeamWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The regimes that occur between the tile's queries and the keys [begin, end).
  __device__ __forceinline__ Regime nearest(const PieceRows& rows, int end) const {
    return params.geometry.regime_from_chunk(rows.low_chunk, end - 1);
  }
  __device__ __forceinline__ Regime farthest(const PieceRows& rows, int begin) const {
    return params.geometry.regime_from_chunk(rows.high_chunk, begin);
  }

  // Writes the queries of the tile, rotated for the regimes that occur in the piece, and zeros below the last row.
  __device__ __forceinline__ void load_queries(const QueryShared (&q_tiles)[3], const Piece& piece,
                                               const PieceRows& rows) const {
    const int first = static_cast<int>(nearest(rows, piece.end * kTileN));
    const int last = static_cast<int>(farthest(rows, piece.begin * kTileN));
    constexpr int kUnits = kChunks / 2;
    const int count = rows_in_tile();
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileM * kUnits; i += kThreads) {
      const int row = i / kUnits;
      const int query = (row_tile * kTileM + row) / group_heads();
      const int head = kv_head * group_heads() + (row_tile * kTileM + row) % group_heads();
      const T* source = static_cast<const T*>(params.q) + piece.batch * params.q_strides.batch +
                        query * params.q_strides.seq + head * params.q_strides.head;
      const int position = max(rows.first_position + query, 0);
#pragma unroll 1
      for (int regime = first; regime <= last; ++regime) {
        const int table_row = params.geometry.query_rotation(static_cast<Regime>(regime), position, params.q_rotated);
        load_query_unit(q_tiles[0].base + regime * QueryShared::kBytes, row, i % kUnits, row < count, source,
                        table_row);
      }
    }
  }

  __device__ __forceinline__ void load_query_unit(uint32_t tile_base, int row, int unit_index, bool exists,
                                                  const T* source, int table_row) const {
    const QueryShared tile{tile_base};
    const int head_dim = params.head_dim;
    if (paths.q) {
      const RotaryUnit unit = rotary_unit(params.rotary, unit_index);
      uint4 first = exists && unit.first < head_dim ? load_chunk(source, unit.first) : uint4{0, 0, 0, 0};
      uint4 second = exists && unit.second < head_dim ? load_chunk(source, unit.second) : uint4{0, 0, 0, 0};
      if (exists) rotate_unit<T>(first, second, unit, params.rotary, table_row);
      Products::store_query_chunk(tile, row, unit.first / kChunk, first);
      Products::store_query_chunk(tile, row, unit.second / kChunk, second);
      return;
    }
#pragma unroll 1
    for (int d = 2 * unit_index * kChunk; d < 2 * (unit_index + 1) * kChunk; ++d) {
      const float x = exists && d < head_dim ? rotated_element(source, d, params.rotary, table_row) : 0.f;
      Products::store_query_element(tile, row, d, from_float<T>(x));
    }
  }

  // The logits of a tile of keys, -inf where a row does not see a key.
  __device__ __forceinline__ void compute_logits(Logits& logits, const QueryShared (&q_tiles)[3], const KeyTile& k,
                                                 const PieceRows& rows, int key_begin) const {
    const int first = static_cast<int>(nearest(rows, key_begin + kTileN));
    const int last = static_cast<int>(farthest(rows, key_begin));
    const auto query_tile = [&](int regime) { return QueryShared{q_tiles[0].base + regime * QueryShared::kBytes}; };
    Products::template multiply_keys<kKeyBlocks, kHeadDim>(logits, query_tile(first), warp_row(), k);
    const auto for_each_logit = [&](auto&& body) {
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          body(block, i, key_begin + block * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2);
      }
    };
#pragma unroll 1
    for (int regime = first + 1; regime <= last; ++regime) {
      Logits other;
      Products::template multiply_keys<kKeyBlocks, kHeadDim>(other, query_tile(regime), warp_row(), k);
      for_each_logit([&](int block, int i, int key) {
        if (static_cast<int>(params.geometry.regime_from_chunk(rows.chunk[i / 2], key)) == regime) {
          logits[0][block][i] = other[0][block][i];
        }
      });
    }
    if (key_begin + kTileN > min(rows.low + 1, rows.lengths.total)) {
      for_each_logit([&](int block, int i, int key) {
        if (key > rows.position[i / 2] || key >= rows.lengths.total) logits[0][block][i] = -INFINITY;
      });
    }
  }

  // Adds up the teams' results in `sums`, [kTileM][kSumStride], and writes the states of whole rows.
  static __device__ __forceinline__ void add_teams(float* sums, SoftmaxState (&states)[kTeams][kTileM], Output& output,
                                                   const OnlineSoftmax<1>& softmax, float scale_log2) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(softmax.row_sum[0][half]);
      const float maximum = softmax.row_max[0][half] == -INFINITY ? -INFINITY : softmax.row_max[0][half] * scale_log2;
      if (lane % 4 == 0) states[team()][warp_row() + lane / 4 + half * 8] = SoftmaxState{maximum, sum};
    }
    __syncthreads();  // the states are there, and no warp reads queries any more
    float weight[1][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row() + lane / 4 + half * 8;
      weight[0][half] = states[team()][row].weight_in(whole_row(states, row).maximum);
    }
    scale_rows(output, weight);
    // The teams take turns with the columns: in every round each adds to a part of its own. Parts are constants,
    // because registers have no index.
#pragma unroll 1
    for (int round = 0; round < kTeams; ++round) {
      if (round > 0) __syncthreads();
      const int part = (team() + round) % kTeams;
      [&]<int... kParts>(std::integer_sequence<int, kParts...>) {
        ((part == kParts ? add_part<kParts>(sums, output, round == 0) : void()), ...);
      }(std::make_integer_sequence<int, kTeams>{});
    }
    __syncthreads();
  }

  template <int kPart>
  static __device__ __forceinline__ void add_part(float* sums, const Output& output, bool is_first) {
    constexpr int kBlocks = kDimBlocks / kTeams;
#pragma unroll
    for (int block = kPart * kBlocks; block < (kPart + 1) * kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row() + threadIdx.x % 32 / 4 + i / 2 * 8;
        float& sum = sums[row * kSumStride + Products::output_column(block, i)];
        sum = is_first ? output[0][block][i] : sum + output[0][block][i];
      }
    }
  }

  static __device__ __forceinline__ SoftmaxState whole_row(const SoftmaxState (&states)[kTeams][kTileM], int row) {
    return whole_state(&states[0][row], kTeams, kTileM);
  }

  // Writes output and log-sum-exp of a sequence that nobody else attends to.
  __device__ __forceinline__ void store_output(const float* sums, const SoftmaxState (&states)[kTeams][kTileM],
                                               int batch) const {
    const float v_scale = params.cache.v_scale == nullptr ? 1.f : __ldg(params.cache.v_scale + kv_head);
#pragma unroll 1
    for (int i = threadIdx.x; i < rows_in_tile() * kChunks; i += kThreads) {
      const int row = i / kChunks;
      const int begin = i % kChunks * kChunk;
      const int query = (row_tile * kTileM + row) / group_heads();
      const int head = kv_head * group_heads() + (row_tile * kTileM + row) % group_heads();
      const SoftmaxState state = whole_row(states, row);
      const float factor = state.normalise() * v_scale;
      T* out = static_cast<T*>(params.out) + batch * params.out_strides.batch + query * params.out_strides.seq +
               head * params.out_strides.head;
      float x[kChunk];
      load_floats(sums + row * kSumStride + begin, x);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] *= factor;
      if (paths.out) {
        if (begin < params.head_dim) *reinterpret_cast<uint4*>(out + begin) = pack8<T>(x);
      } else {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (begin + j < params.head_dim) out[begin + j] = from_float<T>(x[j]);
        }
      }
      if (begin == 0) {
        params.softmax_lse[(static_cast<int64_t>(batch) * params.heads + head) * params.seqlen_q + query] =
            state.log_sum_exp();
      }
    }
  }

  // Leaves sums and states for the combine kernel.
  __device__ __forceinline__ void store_partial(const float* sums, const SoftmaxState (&states)[kTeams][kTileM],
                                                int slot) const {
    const int plane = row_tile * params.kv_heads + kv_head;
    const int64_t first_row = (static_cast<int64_t>(slot) * plan.planes + plane) * kTileM;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows_in_tile() * (kHeadDim / 4); i += kThreads) {
      const int row = i / (kHeadDim / 4);
      const int begin = i % (kHeadDim / 4) * 4;
      *reinterpret_cast<float4*>(workspace.out + (first_row + row) * kHeadDim + begin) =
          *reinterpret_cast<const float4*>(sums + row * kSumStride + begin);
      if (begin == 0) reinterpret_cast<SoftmaxState*>(workspace.states)[first_row + row] = whole_row(states, row);
    }
  }

  __device__ __forceinline__ void store_piece(const float* sums, const SoftmaxState (&states)[kTeams][kTileM],
                                              const Schedule& schedule, const Piece& piece) const {
    if (piece.whole()) {
      store_output(sums, states, piece.batch);
    } else {
      store_partial(sums, states, partial_slot(group, piece.begin == 0));
    }
    if (plan.combine_warps > 0 && piece.begin == 0 && kv_head == 0 && threadIdx.x == 0) {
      int* groups = workspace.groups + 2 * (static_cast<int64_t>(row_tile) * params.batch + piece.batch);
      groups[0] = group;
      groups[1] = piece.whole() ? group : schedule.last_group(piece);
    }
  }

  __device__ __forceinline__ void run() const {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    __shared__ SoftmaxState states[kTeams][kTileM];
    const uint32_t base = ptx::shared_address(shared_memory);
    const QueryShared q_tiles[3] = {{base}, {base + QueryShared::kBytes}, {base + 2 * QueryShared::kBytes}};
    const uint32_t buffers = base + 3 * QueryShared::kBytes + team() * kBuffers * KeyTile::kBytes;
    float* sums = reinterpret_cast<float*>(shared_memory);

    // The combine kernel may come as soon as there is room for it: it waits.
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    const Schedule schedule(params, plan, row_tile, group);
    if (!schedule.has_work()) return;
    Stream stream(params, schedule, kv_head, plan.fused_append, paths.cache);

    // Item n of K, V, K, ... lies in buffer n % kBuffers. The buffer that is filled was read by the item before.
    int buffer = 0, free_buffer = kBuffers - 1;
    const auto next_of = [](int index) { return index + 1 == kBuffers ? 0 : index + 1; };
    const auto tile_at = [&](int index) { return KeyTile{buffers + index * KeyTile::kBytes}; };
    const auto load_item = [&](bool keys, int index) {
      stream.load(keys, tile_at(index));
      ptx::cp_async_commit();
    };
#pragma unroll 1
    for (int n = 0; n < kBuffers - 1; ++n) load_item(n % 2 == 0, n);
    // What is loaded is kBuffers - 1 items behind what is about to be read.
    constexpr bool kSameKind = kBuffers % 2 == 1;
    const auto next_item = [&](bool keys) {
      ptx::cp_async_wait<kBuffers - 2>();
      sync_team();  // the item is there, and all have read the one before
      load_item(keys == kSameKind, free_buffer);
      free_buffer = buffer;
      buffer = next_of(buffer);
      return tile_at(free_buffer);
    };

    const bool has_rows = !kManyRows || warp_row() < rows_in_tile();  // otherwise the warp helps with the copies
    const float k_scale = params.cache.k_scale == nullptr ? 1.f : __ldg(params.cache.k_scale + kv_head);
    Piece piece = schedule.first();
    while (true) {
      const PieceRows rows = piece_rows(schedule, piece);
      const float temperature = params.temperature == nullptr ? 1.f : __ldg(params.temperature + piece.batch);
      const float scale_log2 = static_cast<float>(params.scale) * temperature * k_scale * kLog2E;
      load_queries(q_tiles, piece, rows);
      __syncthreads();
      Output output = {};
      OnlineSoftmax<1> softmax;
#pragma unroll 1
      for (int tile = piece.begin + team(); tile < piece.end; tile += kTeams) {
        // Both items are under way at least, so nobody reads their buffers any more.
        if (plan.fused_append) append(rows, piece.batch, tile * kTileN, tile_at(buffer), tile_at(next_of(buffer)));
        Logits logits;
        const KeyTile k = next_item(true);
        if (has_rows) {
          compute_logits(logits, q_tiles, k, rows, tile * kTileN);
          float shrink[1][2];
          if (softmax.update(logits, scale_log2, shrink)) scale_rows(output, shrink);
        }
        const KeyTile v = next_item(false);
        if (has_rows) Products::multiply_values(output, logits, v);
      }
      add_teams(sums, states, output, softmax, scale_log2);
      store_piece(sums, states, schedule, piece);
      if (piece.left == 0) break;
      piece = schedule.next(piece);
      __syncthreads();  // sums and states may be overwritten
    }
    ptx::cp_async_wait<0>();
  }
};

}  // namespace chunkattn::cuda
