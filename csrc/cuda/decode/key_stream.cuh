// Tiles of keys and values on their way from the cache to shared memory, for the warps that share them.
#pragma once

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/decode/cache_rows.cuh"
#include "cuda/decode/schedule.cuh"
#include "cuda/decode/tile_sizes.h"
#include "cuda/ptx/cp_async.cuh"

namespace chunkattn::cuda {

// Walks the tiles of a team through all pieces of the thread block's share: keys, values, keys, ... Each warp of the
// team copies kWarpKeys rows of a tile. Rows behind the sequence are zeros and nothing of them is read. New rows that
// this kernel appends are left alone: see NewRows.
template <typename T, int kHeadDim, bool kFloat8, bool kManyRows>
class KeyStream {
  using Sizes = DecodeSizes<kHeadDim, kFloat8, kManyRows>;
  using Schedule = DecodeSchedule<Sizes::kTileN, kManyRows>;
  using Bits = typename CacheElement<kFloat8>::Bits;

 public:
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Bits));
  using Tile = RowTile<Sizes::kTileN, kRowBytes / 2>;

  __device__ __forceinline__ KeyStream(const DecodeParams& params, const Schedule& schedule, int kv_head,
                                       bool fused_append, bool vectorized)
      : params_(params),
        schedule_(schedule),
        kv_head_(kv_head),
        fused_append_(fused_append),
        vectorized_(vectorized),
        whole_spans_(params.cache.block_table == nullptr || params.cache.page_size % kSpan == 0),
        piece_(schedule.first()) {
    tile_ = piece_.begin + team() - Sizes::kTeams;
    lengths_ = piece_lengths();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) advance();
  }

  __device__ __forceinline__ void load(bool keys, const Tile& tile) {
    if (current_.count > 0) load_rows(keys, tile);
    if (!keys) advance();
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

  static __device__ __forceinline__ int team() { return threadIdx.x / 32 / Sizes::kTeamWarps; }

  __device__ __forceinline__ SequenceLengths piece_lengths() const {
    SequenceLengths lengths = schedule_.lengths(piece_.batch);
    if (!fused_append_) lengths.stored = lengths.total;
    return lengths;
  }

  __device__ __forceinline__ void advance() {
    current_ = ahead_;
    tile_ += Sizes::kTeams;
    if (tile_ >= piece_.end && piece_.left > 0) {
      do {
        piece_ = schedule_.next(piece_);
        tile_ = team();
      } while (tile_ >= piece_.end && piece_.left > 0);
      lengths_ = piece_lengths();
    }
    ahead_ = rows_of_tile();
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

  __device__ __forceinline__ void load_rows(bool keys, const Tile& tile) const {
    if (!vectorized_ || !whole_spans_) {
      load_single_rows(params_, current_, kv_head_, keys, vectorized_, whole_spans_, tile);
      return;
    }
    const Strides& strides = keys ? params_.cache.k_strides : params_.cache.v_strides;
    const Bits* cache = static_cast<const Bits*>(keys ? params_.cache.k : params_.cache.v);
    const int lane = threadIdx.x % 32;
    const int row = lane / kChunksPerRow, chunk = lane % kChunksPerRow;
    const int element = chunk * kElementsPerChunk;
    const bool inside = element < params_.head_dim;
    const int stored = current_.lengths.stored - current_.begin, total = current_.lengths.total - current_.begin;
    bool all_there = stored >= Sizes::kWarpKeys;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) all_there = all_there && current_.places[span].page >= 0;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      const Bits* source = cache + cache_offset(strides, current_.places[span], kv_head_) + row * strides.seq + element;
      const auto row_at = [&](int i) { return source + i * kRowsAtOnce * strides.seq; };
      const auto place_at = [&](int i) {
        return tile.address(team_row() + span * kSpan + i * kRowsAtOnce + row, chunk);
      };
      if (all_there) {
#pragma unroll
        for (int i = 0; i < kStepsPerSpan; ++i) ptx::cp_async_16(place_at(i), row_at(i), inside);
        continue;
      }
      // The end of a sequence, which a small step waits for, or a page that does not exist.
#pragma unroll 1
      for (int i = 0; i < kStepsPerSpan; ++i) {
        const int n = span * kSpan + i * kRowsAtOnce + row;
        if (n >= stored && n < total) continue;
        const bool valid = inside && n < stored && current_.places[span].page >= 0;
        ptx::cp_async_16(place_at(i), valid ? row_at(i) : cache, valid);
      }
    }
  }

  // Of one of the warp's rows. Called by the whole warp.
  static __device__ __forceinline__ CacheRow place_of(const WarpRows& rows, bool whole_spans, int row) {
    if (!whole_spans) {
      return {__shfl_sync(0xffffffffu, rows.places[0].page, row), __shfl_sync(0xffffffffu, rows.places[0].row, row)};
    }
    CacheRow place = rows.places[0];
#pragma unroll
    for (int span = 1; span < kSpans; ++span) {
      if (row >= span * kSpan) place = rows.places[span];
    }
    return {place.page, place.row + row % kSpan};
  }

  // Pages that hold no whole spans, and a cache that cannot be read in whole chunks. Rare and bulky, so not inlined.
  static __device__ __noinline__ void load_single_rows(const DecodeParams& params, const WarpRows rows, int kv_head,
                                                       bool keys, bool vectorized, bool whole_spans, const Tile tile) {
    const Strides& strides = keys ? params.cache.k_strides : params.cache.v_strides;
    const Bits* cache = static_cast<const Bits*>(keys ? params.cache.k : params.cache.v);
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const int n = i * kRowsAtOnce + lane / kChunksPerRow;
      const int position = rows.begin + n;
      const CacheRow place = place_of(rows, whole_spans, n);
      if (position >= rows.lengths.stored && position < rows.lengths.total) continue;
      const int element = lane % kChunksPerRow * kElementsPerChunk;
      const bool valid = element < params.head_dim && position < rows.lengths.stored && place.page >= 0;
      const Bits* source = valid ? cache + cache_offset(strides, place, kv_head) + element : cache;
      const uint32_t shared = tile.address(team_row() + n, lane % kChunksPerRow);
      if (vectorized) {
        ptx::cp_async_16(shared, source, valid);
        continue;
      }
#pragma unroll 1
      for (int j = 0; j < kElementsPerChunk; ++j) {
        store_shared(shared + j * static_cast<uint32_t>(sizeof(Bits)),
                     valid && element + j < params.head_dim ? source[j] : Bits{0});
      }
    }
  }

  const DecodeParams& params_;
  const Schedule& schedule_;
  const int kv_head_;
  const bool fused_append_;
  const bool vectorized_;
  const bool whole_spans_;  // a span of rows never lies in two pages
  Piece piece_;
  int tile_;
  SequenceLengths lengths_;  // of the piece's sequence; all is stored if the append is not ours
  WarpRows current_{};
  WarpRows ahead_{};
};

}  // namespace chunkattn::cuda
