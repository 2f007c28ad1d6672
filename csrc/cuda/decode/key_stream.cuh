// Tiles of keys and values on their way from the cache to shared memory, for the warps that share them.
#pragma once

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/decode/cache_rows.cuh"
#include "cuda/decode/schedule.cuh"
#include "cuda/decode/tile_sizes.h"
#include "cuda/ptx/cp_async.cuh"

namespace chunkattn::cuda {

// Walks the tiles of a team through all pieces of the thread block's share: load_keys, load_values, load_keys, ... Each
// warp of the team copies kWarpKeys rows of a tile. Rows behind the sequence are zeros and nothing of them is read.
//
// New tokens do not take the way through the cache: whoever attends to them computes their rows, writes them to the
// cache and puts them into the tile. So nobody waits for anybody.
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
        one_page_(params.cache.block_table == nullptr || params.cache.page_size % Sizes::kWarpKeys == 0),
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

  // The rows of a tile that this warp copies.
  struct WarpRows {
    int count;  // 0 behind the last tile
    int batch;
    int begin;  // position of the first
    SequenceLengths lengths;
    CacheRow place;  // of the first, or where they lie in several pages, of row lane % kWarpKeys
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
    WarpRows rows{Sizes::kWarpKeys, piece_.batch, tile_ * Sizes::kTileN + team_row(), lengths_, {-1, 0}};
    const int position = rows.begin + (one_page_ ? 0 : static_cast<int>(threadIdx.x) % Sizes::kWarpKeys);
    if (position < lengths_.stored) rows.place = cache_row(params_.cache, rows.batch, position);
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
    if (vectorized_ && one_page_ && current_.place.page >= 0 &&
        current_.begin + Sizes::kWarpKeys <= current_.lengths.stored) {
      const Bits* source = cache + cache_offset(strides, current_.place, kv_head_) + row * strides.seq + element;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        ptx::cp_async_16(tile.address(team_row() + i * kRowsAtOnce + row, chunk),
                         source + i * kRowsAtOnce * strides.seq, inside);
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
    load_elements<kKeys>(params_, current_, kv_head_, !vectorized_, tile);
  }

  // Of one of the warp's rows. Called by the whole warp.
  __device__ __forceinline__ CacheRow place_of(int row) const {
    if (one_page_) return {current_.place.page, current_.place.row + row};
    return {__shfl_sync(0xffffffffu, current_.place.page, row), __shfl_sync(0xffffffffu, current_.place.row, row)};
  }

  // New rows, and where the cache cannot be read in whole chunks all rows. Rare and bulky, so not inlined.
  template <bool kKeys>
  static __device__ __noinline__ void load_elements(const DecodeParams& params, const WarpRows rows, int kv_head,
                                                    bool all, const Tile tile) {
    const int from = all ? rows.begin : max(rows.lengths.stored, rows.begin);
    const int to = min(all ? INT32_MAX : rows.lengths.total, rows.begin + Sizes::kWarpKeys);
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < (to - from) * kHeadDim; i += 32) {
      const int position = from + i / kHeadDim;
      const int d = i % kHeadDim;
      const bool inside = d < params.head_dim && position < rows.lengths.total;
      const Bits bits = inside ? take_element<kKeys>(params, rows, kv_head, position, d) : Bits{0};
      const uint32_t address = tile.address(team_row() + position - rows.begin, d / kElementsPerChunk) +
                               d % kElementsPerChunk * static_cast<uint32_t>(sizeof(Bits));
      store_shared(address, bits);
    }
  }

  template <bool kKeys>
  static __device__ __forceinline__ Bits take_element(const DecodeParams& params, const WarpRows& rows, int kv_head,
                                                      int position, int d) {
    const Strides& strides = kKeys ? params.cache.k_strides : params.cache.v_strides;
    const CacheRow place = cache_row(params.cache, rows.batch, position);
    Bits* element =
        static_cast<Bits*>(kKeys ? params.cache.k : params.cache.v) + cache_offset(strides, place, kv_head) + d;
    if (position < rows.lengths.stored) return place.page >= 0 ? *element : Bits{0};
    const Bits bits =
        new_element<T, kFloat8, kKeys>(params, rows.batch, position - rows.lengths.stored, position, kv_head, d);
    if (place.page >= 0) *element = bits;
    return bits;
  }

  const DecodeParams& params_;
  const DecodeSchedule& schedule_;
  const int kv_head_;
  const bool fused_append_;
  const bool vectorized_;
  const bool one_page_;  // a warp's rows of a tile never lie in two pages
  Piece piece_;
  int tile_;
  SequenceLengths lengths_;  // of the piece's sequence; all is stored if the append is not ours
  WarpRows current_;
  WarpRows ahead_;
};

}  // namespace chunkattn::cuda
