// Tiles of keys and values on their way from the cache to shared memory, for the warps that share them.
#pragma once

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/decode/cache_rows.cuh"
#include "cuda/decode/schedule.cuh"
#include "cuda/decode/tile_sizes.h"
#include "cuda/ptx/cp_async.cuh"

namespace chunkattn::cuda {

// Walks the tiles of a team through all pieces of the thread block's share: load_keys, load_values, load_keys, ... Each
// warp of the team copies kWarpKeys rows of a tile. Rows behind the sequence are zeros and nothing of them is read. New
// rows that this kernel appends are left alone: see NewRows.
template <typename T, int kHeadDim, bool kFloat8, bool kManyRows>
class KeyStream {
  using Sizes = DecodeSizes<kHeadDim, kFloat8, kManyRows>;
  using Bits = typename CacheElement<kFloat8>::Bits;

 public:
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Bits));
  using Tile = RowTile<Sizes::kTileN, kRowBytes / 2>;

  __device__ __forceinline__ KeyStream(const DecodeParams& params, const DecodeSchedule& schedule, int kv_head,
                                       bool fused_append, bool vectorized)
      : params_(params),
        schedule_(schedule),
        kv_head_(kv_head),
        fused_append_(fused_append),
        vectorized_(vectorized),
        whole_spans_(params.cache.block_table == nullptr || params.cache.page_size % kSpan == 0),
        piece_(schedule.first()) {
    tile_ = piece_.begin + threadIdx.x / 32 / Sizes::kTeamWarps;
    open_piece();
    current_ = rows_of_tile();
    advance_tile();
    ahead_ = rows_of_tile();
  }

  template <bool kKeys>
  __device__ __forceinline__ void load(const Tile& tile) {
    if (current_.count > 0) load_rows<kKeys>(tile);
    if (kKeys) return;
    current_ = ahead_;
    advance_tile();
    ahead_ = rows_of_tile();
  }

 private:
  static constexpr int kChunksPerRow = Tile::kChunksPerRow;
  static constexpr int kRowsAtOnce = 32 / kChunksPerRow;
  static constexpr int kSteps = Sizes::kWarpKeys / kRowsAtOnce;
  static constexpr int kElementsPerChunk = 16 / static_cast<int>(sizeof(Bits));
  static constexpr int kSpan = kDecodePageSpan;  // rows that lie in one page, whatever the page, if its size allows
  static constexpr int kSpans = Sizes::kWarpKeys / kSpan;
  static constexpr int kStepsPerSpan = kSteps / kSpans;
  static_assert(kStepsPerSpan * kSpans == kSteps);

  // The rows of a tile that this warp copies.
  struct WarpRows {
    int count;  // 0 behind the last tile
    int batch;
    int begin;  // position of the first
    SequenceLengths lengths;
    CacheRow places[kSpans];  // of each span's first; where spans may lie in several pages, [0] is of row
                              // lane % kWarpKeys
  };

  __device__ __forceinline__ void open_piece() {
    while (tile_ >= piece_.end && piece_.left > 0) {
      piece_ = schedule_.next(piece_);
      tile_ = threadIdx.x / 32 / Sizes::kTeamWarps;
    }
    lengths_ = schedule_.lengths(piece_.batch);
    if (!fused_append_) lengths_.stored = lengths_.total;
  }

  __device__ __forceinline__ void advance_tile() {
    tile_ += Sizes::kTeams;
    if (tile_ >= piece_.end && piece_.left > 0) open_piece();
  }

  // Loads from the block table what the copies will need one tile later.
  __device__ __forceinline__ WarpRows rows_of_tile() const {
    if (tile_ >= piece_.end) return {};
    WarpRows rows{Sizes::kWarpKeys, piece_.batch, tile_ * Sizes::kTileN + team_row(), lengths_, {}};
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      const int row = whole_spans_ ? span * kSpan : static_cast<int>(threadIdx.x) % Sizes::kWarpKeys;
      rows.places[span] = {-1, 0};
      if (rows.begin + row < lengths_.stored) {
        rows.places[span] = cache_row(params_.cache, rows.batch, rows.begin + row);
      }
    }
    return rows;
  }

  static __device__ __forceinline__ int team_row() { return threadIdx.x / 32 % Sizes::kTeamWarps * Sizes::kWarpKeys; }

  template <bool kKeys>
  __device__ __forceinline__ void load_rows(const Tile& tile) const {
    const Strides& strides = kKeys ? params_.cache.k_strides : params_.cache.v_strides;
    const Bits* cache = static_cast<const Bits*>(kKeys ? params_.cache.k : params_.cache.v);
    const int lane = threadIdx.x % 32;
    const int row = lane / kChunksPerRow, chunk = lane % kChunksPerRow;
    const int element = chunk * kElementsPerChunk;
    const bool inside = element < params_.head_dim;
    bool all_there = vectorized_ && whole_spans_ && current_.begin + Sizes::kWarpKeys <= current_.lengths.stored;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) all_there = all_there && current_.places[span].page >= 0;
    if (all_there) {
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        const Bits* source =
            cache + cache_offset(strides, current_.places[span], kv_head_) + row * strides.seq + element;
#pragma unroll
        for (int i = 0; i < kStepsPerSpan; ++i) {
          ptx::cp_async_16(tile.address(team_row() + span * kSpan + i * kRowsAtOnce + row, chunk),
                           source + i * kRowsAtOnce * strides.seq, inside);
        }
      }
      return;
    }
    if (vectorized_) {
#pragma unroll 1
      for (int i = 0; i < kSteps; ++i) {
        const int n = i * kRowsAtOnce + row;
        const int position = current_.begin + n;
        const CacheRow place = place_of(n);
        if (position >= current_.lengths.stored && position < current_.lengths.total) continue;
        const bool valid = inside && position < current_.lengths.stored && place.page >= 0;
        const Bits* source = valid ? cache + cache_offset(strides, place, kv_head_) + element : cache;
        ptx::cp_async_16(tile.address(team_row() + n, chunk), source, valid);
      }
    }
    if (!vectorized_) load_elements<kKeys>(params_, current_, kv_head_, tile);
  }

  // Of one of the warp's rows. Called by the whole warp.
  __device__ __forceinline__ CacheRow place_of(int row) const {
    if (!whole_spans_) {
      return {__shfl_sync(0xffffffffu, current_.places[0].page, row),
              __shfl_sync(0xffffffffu, current_.places[0].row, row)};
    }
    CacheRow place = current_.places[0];
#pragma unroll
    for (int span = 1; span < kSpans; ++span) {
      if (row >= span * kSpan) place = current_.places[span];
    }
    return {place.page, place.row + row % kSpan};
  }

  // Where the cache cannot be read in whole chunks. Rare and bulky, so not inlined.
  template <bool kKeys>
  static __device__ __noinline__ void load_elements(const DecodeParams& params, const WarpRows rows, int kv_head,
                                                    const Tile tile) {
    const Strides& strides = kKeys ? params.cache.k_strides : params.cache.v_strides;
    const Bits* cache = static_cast<const Bits*>(kKeys ? params.cache.k : params.cache.v);
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < Sizes::kWarpKeys * kHeadDim; i += 32) {
      const int position = rows.begin + i / kHeadDim;
      const int d = i % kHeadDim;
      if (position >= rows.lengths.stored && position < rows.lengths.total) continue;
      Bits bits{0};
      if (d < params.head_dim && position < rows.lengths.stored) {
        const CacheRow place = cache_row(params.cache, rows.batch, position);
        if (place.page >= 0) bits = cache[cache_offset(strides, place, kv_head) + d];
      }
      store_shared(tile.address(team_row() + i / kHeadDim, d / kElementsPerChunk) +
                       d % kElementsPerChunk * static_cast<uint32_t>(sizeof(Bits)),
                   bits);
    }
  }

  const DecodeParams& params_;
  const DecodeSchedule& schedule_;
  const int kv_head_;
  const bool fused_append_;
  const bool vectorized_;
  const bool whole_spans_;  // a span of rows never lies in two pages
  Piece piece_;
  int tile_;
  SequenceLengths lengths_;  // of the piece's sequence; all is stored if the append is not ours
  WarpRows current_;
  WarpRows ahead_;
};

}  // namespace chunkattn::cuda
