// New keys and values on their way into the cache and into the tiles of those who attend to them.
#pragma once

#include <type_traits>

#include "cuda/common/swizzled_tile.cuh"
#include "cuda/decode/cache_rows.cuh"
#include "cuda/decode/sequences.h"

namespace chunkattn::cuda {

// New tokens do not take the way through the cache: whoever attends to them computes their rows, writes them to the
// cache and puts them into the tiles. So nobody waits for anybody.
template <typename T, int kHeadDim, bool kFloat8>
struct NewRows {
  using Bits = typename CacheElement<kFloat8>::Bits;
  using Piece = std::conditional_t<kFloat8, uint2, uint4>;  // kChunk elements of a row of the cache
  static constexpr int kUnits = kHeadDim / (2 * kChunk);

  const DecodeParams& params;
  int batch;
  int kv_head;
  int stored;  // tokens before the new ones

  // Rows [from, to), positions, of the tiles of keys and values that begin at `tile_begin`. Called by `threads`
  // threads.
  template <typename Tile>
  __device__ __forceinline__ void append(int from, int to, int tile_begin, const Tile& k, const Tile& v,
                                         bool vectorized, int thread, int threads) const {
    if (!vectorized) {
      append_elements(*this, from, to, tile_begin, k, v, thread, threads);
      return;
    }
    // Everything a thread needs of a unit is under way at once.
#pragma unroll 1
    for (int i = thread; i < (to - from) * kUnits; i += threads) {
      const int position = from + i / kUnits;
      const RotaryUnit unit = rotary_unit(params.rotary, i % kUnits);
      const bool has_first = unit.first < params.head_dim, has_second = unit.second < params.head_dim;
      const T* key = row<true>(position);
      const T* value = row<false>(position);
      const uint4 key_first = load(key, unit.first, has_first), key_second = load(key, unit.second, has_second);
      const uint4 value_first = load(value, unit.first, has_first), value_second = load(value, unit.second, has_second);
      const CacheRow place = cache_row(params.cache, batch, position);
      float first[kChunk], second[kChunk];
      unpack8<T>(key_first, first);
      unpack8<T>(key_second, second);
      rotate_unit(first, second, unit, params.rotary, params.geometry.key_row(position));
      put<true>(k, position - tile_begin, unit.first, cache_piece<true>(first), place, has_first);
      put<true>(k, position - tile_begin, unit.second, cache_piece<true>(second), place, has_second);
      put<false>(v, position - tile_begin, unit.first, cache_piece<false>(value_first), place, has_first);
      put<false>(v, position - tile_begin, unit.second, cache_piece<false>(value_second), place, has_second);
    }
  }

 private:
  template <bool kKeys>
  __device__ __forceinline__ const T* row(int position) const {
    const Strides& strides = kKeys ? params.new_k_strides : params.new_v_strides;
    return static_cast<const T*>(kKeys ? params.new_k : params.new_v) + batch * strides.batch +
           (position - stored) * strides.seq + kv_head * strides.head;
  }

  static __device__ __forceinline__ uint4 load(const T* row, int d, bool exists) {
    return exists ? load_chunk(row, d) : uint4{0, 0, 0, 0};
  }

  template <bool kKeys>
  __device__ __forceinline__ Piece cache_piece(const float (&x)[kChunk]) const {
    if constexpr (kFloat8) {
      const float* factors = kKeys ? params.cache.k_scale : params.cache.v_scale;
      return {float8_word(x[0], x[1], x[2], x[3], factors, kv_head),
              float8_word(x[4], x[5], x[6], x[7], factors, kv_head)};
    } else {
      return pack8<T>(x);
    }
  }

  // Not inlined: 32 divisions would be.
  static __device__ __noinline__ uint32_t float8_word(float a, float b, float c, float d, const float* factors,
                                                      int head) {
    const auto bits = [&](float x) { return uint32_t{cache_bits<T, true>(x, factors, head)}; };
    return bits(a) | bits(b) << 8 | bits(c) << 16 | bits(d) << 24;
  }

  template <bool kKeys>
  __device__ __forceinline__ Piece cache_piece(const uint4& chunk) const {
    if constexpr (kFloat8) {
      float x[kChunk];
      unpack8<T>(chunk, x);
      return cache_piece<kKeys>(x);
    } else {
      return chunk;
    }
  }

  template <bool kKeys, typename Tile>
  __device__ __forceinline__ void put(const Tile& tile, int row, int d, const Piece& piece, const CacheRow& place,
                                      bool exists) const {
    store_shared(address(tile, row, d), piece);
    if (exists && place.page >= 0) *reinterpret_cast<Piece*>(element<kKeys>(params, place, kv_head, d)) = piece;
  }

  template <typename Tile>
  static __device__ __forceinline__ uint32_t address(const Tile& tile, int row, int d) {
    constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Bits));
    return tile.address(row, d / kPerChunk) + d % kPerChunk * static_cast<uint32_t>(sizeof(Bits));
  }

  template <bool kKeys>
  static __device__ __forceinline__ Bits* element(const DecodeParams& params, const CacheRow& place, int kv_head,
                                                  int d) {
    const Strides& strides = kKeys ? params.cache.k_strides : params.cache.v_strides;
    return static_cast<Bits*>(kKeys ? params.cache.k : params.cache.v) + cache_offset(strides, place, kv_head) + d;
  }

  // For any alignment. Rare and bulky, so not inlined.
  template <typename Tile>
  static __device__ __noinline__ void append_elements(const NewRows rows, int from, int to, int tile_begin,
                                                      const Tile k, const Tile v, int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < (to - from) * kHeadDim; i += threads) {
      const int position = from + i / kHeadDim;
      const int d = i % kHeadDim;
      const CacheRow place = cache_row(rows.params.cache, rows.batch, position);
      rows.append_element<true>(position, d, place, address(k, position - tile_begin, d));
      rows.append_element<false>(position, d, place, address(v, position - tile_begin, d));
    }
  }

  template <bool kKeys>
  __device__ __forceinline__ void append_element(int position, int d, const CacheRow& place, uint32_t shared) const {
    const bool exists = d < params.head_dim;
    const Bits bits =
        exists ? new_element<T, kFloat8, kKeys>(params, batch, position - stored, position, kv_head, d) : Bits{0};
    store_shared(shared, bits);
    if (exists && place.page >= 0) *element<kKeys>(params, place, kv_head, d) = bits;
  }
};

}  // namespace chunkattn::cuda
