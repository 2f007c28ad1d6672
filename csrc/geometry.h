// Position rules of Dual Chunk Attention: which keys a query sees, in which regime, at which rows of the rotary table.
// Shared by CPU code, CUDA code, C++ tests and Python introspection. No torch, no CUDA types.
//
// Positions are absolute token indices. A query n of seqlen_q sits at position seqlen_k - seqlen_q + n
// (bottom-right aligned); with that one rule prefill, chunked prefill and decoding need no cases of their own.
// Source: arXiv 2402.17463, with s = chunk_size, w = local_size and the stride c = s - w.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CHUNKATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CHUNKATTN_HOST_DEVICE inline
#endif

namespace chunkattn {

// How many chunks the key lies before the query.
enum class Regime : int {
  kIntra = 0,  // the same chunk, causal
  kSucc = 1,   // the chunk before
  kInter = 2,  // every earlier chunk
};

enum class Mask : int {
  kNone = 0,    // every query of the tile sees every key of the segment
  kCausal = 1,  // a query sees the keys up to its own position
};

// A contiguous range of keys, attended with one rotation of Q.
struct Segment {
  int key_begin;
  int key_end;
  Regime regime;
  Mask mask;
};

// The key segments of one query tile, nearest first. At most one per regime.
struct SegmentList {
  Segment items[3];
  int count;
};

// Positions [begin, end) of queries that lie in one chunk.
struct QueryTile {
  int begin;
  int end;
};

struct ChunkGeometry {
  int chunk_size;  // s
  int local_size;  // w, 0 < w < s

  CHUNKATTN_HOST_DEVICE int stride() const { return chunk_size - local_size; }

  CHUNKATTN_HOST_DEVICE int chunk_begin(int position) const { return position - position % stride(); }

  CHUNKATTN_HOST_DEVICE int key_row(int position) const { return position % stride(); }

  CHUNKATTN_HOST_DEVICE Regime regime(int query_position, int key_position) const {
    const int distance = query_position / stride() - key_position / stride();
    return distance == 0 ? Regime::kIntra : distance == 1 ? Regime::kSucc : Regime::kInter;
  }

  // The same of a query whose chunk begins at `query_chunk`, without divisions.
  CHUNKATTN_HOST_DEVICE Regime regime_from_chunk(int query_chunk, int key_position) const {
    if (key_position >= query_chunk) return Regime::kIntra;
    return key_position >= query_chunk - stride() ? Regime::kSucc : Regime::kInter;
  }

  // The table row of a query in a regime. Rows stop at chunk_size, inclusive: the table has chunk_size + 1 rows.
  CHUNKATTN_HOST_DEVICE int query_row(Regime regime, int position) const {
    return query_row_in_chunk(regime, position % stride());
  }

  // The same from the query's index in its chunk.
  CHUNKATTN_HOST_DEVICE int query_row_in_chunk(Regime regime, int index) const {
    if (regime == Regime::kIntra) return index;
    const int far = regime == Regime::kSucc ? index + stride() : 2 * stride() - 1;
    return far < chunk_size ? far : chunk_size;
  }

  // The table row by which a query is still to be rotated. Rotations compose, so a query that arrives rotated
  // at its intra row needs only the difference.
  CHUNKATTN_HOST_DEVICE int query_rotation(Regime regime, int position, bool already_rotated) const {
    return query_rotation_in_chunk(regime, position % stride(), already_rotated);
  }

  CHUNKATTN_HOST_DEVICE int query_rotation_in_chunk(Regime regime, int index, bool already_rotated) const {
    return query_row_in_chunk(regime, index) - (already_rotated ? index : 0);
  }

  // True when succ and inter use the same row for the query and are therefore one range of keys.
  CHUNKATTN_HOST_DEVICE bool far_regimes_agree(int position) const {
    return far_regimes_agree_in_chunk(position % stride());
  }

  CHUNKATTN_HOST_DEVICE bool far_regimes_agree_in_chunk(int index) const {
    return query_row_in_chunk(Regime::kSucc, index) == query_row_in_chunk(Regime::kInter, index);
  }

  // The regime in which a tile of queries, which begins at `query_begin`, attends a tile of keys; each lies in one
  // chunk. The same rule as segments(), seen from the keys.
  CHUNKATTN_HOST_DEVICE Regime tile_regime(int query_begin, int key_position) const {
    return tile_regime_in_chunk(query_begin / stride() - key_position / stride(), query_begin % stride());
  }

  // The same from how many chunks they lie apart and the first query's index in its chunk.
  CHUNKATTN_HOST_DEVICE Regime tile_regime_in_chunk(int chunks_apart, int index) const {
    if (chunks_apart == 0) return Regime::kIntra;
    return chunks_apart == 1 && !far_regimes_agree_in_chunk(index) ? Regime::kSucc : Regime::kInter;
  }

  // The segments of a tile. The tile must lie in one chunk: see QueryTiling. Within a chunk the succ row rises with the
  // position until it meets the inter row, so regimes that agree at the tile's first query agree at all of its queries.
  CHUNKATTN_HOST_DEVICE SegmentList segments(QueryTile tile) const {
    const int chunk = chunk_begin(tile.begin);
    SegmentList list;
    list.items[0] = {chunk, tile.end, Regime::kIntra, Mask::kCausal};
    list.count = 1;
    if (chunk == 0) return list;
    if (far_regimes_agree(tile.begin)) {
      list.items[1] = {0, chunk, Regime::kInter, Mask::kNone};
      list.count = 2;
      return list;
    }
    list.items[1] = {chunk - stride(), chunk, Regime::kSucc, Mask::kNone};
    list.count = 2;
    if (chunk > stride()) {
      list.items[2] = {0, chunk - stride(), Regime::kInter, Mask::kNone};
      list.count = 3;
    }
    return list;
  }
};

// Cuts the query positions [begin, end) into tiles of at most `size` queries, none across a chunk boundary: a tile
// that did would need two rows of Q for one key. Constant time per tile, so that kernels can ask for any tile.
// Kernels that walk the queries of a tile of keys cut the keys by the same rule.
struct QueryTiling {
  ChunkGeometry geometry;
  int begin;
  int end;
  int size;

  CHUNKATTN_HOST_DEVICE static int ceil_div(int a, int b) { return (a + b - 1) / b; }

  // The first chunk may start late: its tiles are counted from `begin`.
  CHUNKATTN_HOST_DEVICE int first_chunk_end() const {
    const int64_t chunk_end = static_cast<int64_t>(geometry.chunk_begin(begin)) + geometry.stride();
    return chunk_end < end ? static_cast<int>(chunk_end) : end;
  }

  CHUNKATTN_HOST_DEVICE int count() const {
    if (begin >= end) return 0;
    const int first = ceil_div(first_chunk_end() - begin, size);
    const int rest = end - first_chunk_end();
    const int per_chunk = ceil_div(geometry.stride(), size);
    return first + rest / geometry.stride() * per_chunk + ceil_div(rest % geometry.stride(), size);
  }

  CHUNKATTN_HOST_DEVICE QueryTile tile(int index) const {
    const int first = ceil_div(first_chunk_end() - begin, size);
    int chunk_from = begin;
    int chunk_to = first_chunk_end();
    if (index >= first) {
      const int per_chunk = ceil_div(geometry.stride(), size);
      const int chunk = (index - first) / per_chunk;
      index = (index - first) % per_chunk;
      chunk_from = first_chunk_end() + chunk * geometry.stride();
      chunk_to = end - chunk_from < geometry.stride() ? end : chunk_from + geometry.stride();
    }
    const int from = chunk_from + index * size;
    return {from, chunk_to - from < size ? chunk_to : from + size};
  }

  // The index of the tile that holds a position; of the first tile for positions before `begin`.
  CHUNKATTN_HOST_DEVICE int index_of(int position) const {
    if (position <= begin) return 0;
    const int beyond = position - first_chunk_end();
    if (beyond < 0) return (position - begin) / size;
    const int first = ceil_div(first_chunk_end() - begin, size);
    const int per_chunk = ceil_div(geometry.stride(), size);
    return first + beyond / geometry.stride() * per_chunk + beyond % geometry.stride() / size;
  }
};

// Tensors that keep the regimes apart have, for each, rows for those queries that can be in it and no others: all for
// intra; for succ those near the begin of a chunk, chunk after chunk; for inter those from the first on that has keys
// so far away. Tiles (QueryTiling) whose regime is succ begin in the first local_size queries of a chunk, so they reach
// less than a tile further. Chunk 0 has no chunk before it, and neither succ nor inter rows.
struct RegimeRows {
  ChunkGeometry geometry;
  int near_per_chunk;  // queries of a chunk that have a succ row
  int first_far;       // position of the first query that has an inter row
  int near_pitch;      // from the first succ row of a chunk to that of the next
  int origin[3];       // by Regime: row 0, counted from where position 0 would have its row

  CHUNKATTN_HOST_DEVICE int row(Regime regime, int position) const {
    if (regime == Regime::kIntra) return position - origin[0];
    if (regime == Regime::kInter) return position - origin[2];
    return position / geometry.stride() * near_pitch + position % geometry.stride() - origin[1];
  }

  CHUNKATTN_HOST_DEVICE bool has_row(Regime regime, int position) const {
    if (regime == Regime::kIntra) return true;
    if (regime == Regime::kInter) return position >= first_far;
    return position >= geometry.stride() && position % geometry.stride() < near_per_chunk;
  }

  // How many rows there are for queries before position `end`, which is not 0.
  CHUNKATTN_HOST_DEVICE int count(Regime regime, int end) const {
    if (regime == Regime::kIntra) return end - origin[0];
    if (regime == Regime::kInter) return end > first_far ? end - origin[2] : 0;
    return ((end - 1) / geometry.stride() + 1) * near_pitch - origin[1];
  }
};

// Of the queries of succ, by chunk, that can be in a tile of at most `tile_size` queries.
CHUNKATTN_HOST_DEVICE int near_queries(const ChunkGeometry& geometry, int tile_size) {
  const int64_t reach = static_cast<int64_t>(geometry.local_size) + tile_size - 1;
  return reach < geometry.stride() ? static_cast<int>(reach) : geometry.stride();
}

// The first query with an inter row: in chunk 1 the succ row is the position itself, and where it meets the inter row
// the two are one range of keys.
CHUNKATTN_HOST_DEVICE int first_far_query(const ChunkGeometry& geometry, int first_query) {
  const int far = geometry.query_row_in_chunk(Regime::kInter, 0);
  return first_query > far ? first_query : far;
}

CHUNKATTN_HOST_DEVICE RegimeRows regime_rows(const ChunkGeometry& geometry, int first_query, int tile_size) {
  const int near = near_queries(geometry, tile_size);
  const int first_chunk = first_query / geometry.stride();
  const int far = first_far_query(geometry, first_query);
  return {geometry, near, far, near, {first_query, (first_chunk > 0 ? first_chunk : 1) * near, far}};
}

// Of a sequence in packed tensors, whose queries have a position `origin` greater than their row there. Every regime
// has room for every query, so that where a sequence's rows lie does not depend on the lengths of those before it.
CHUNKATTN_HOST_DEVICE RegimeRows packed_regime_rows(const ChunkGeometry& geometry, int origin, int tile_size) {
  return {geometry,
          near_queries(geometry, tile_size),
          first_far_query(geometry, 0),
          geometry.stride(),
          {origin, origin, origin}};
}

}  // namespace chunkattn
