// How queries are cut into tiles, and the segments of a tile into blocks of keys.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "params.h"

namespace chunkattn::cpu {

inline QueryTiling tile_queries(const ForwardParams& params, int size) {
  return {params.geometry, params.first_position(), params.shape.seqlen_k, size};
}

// The tile size, at most max_size, that leaves each thread a few tiles of all `heads` to balance the work with.
inline int choose_tile_size(const ForwardParams& params, int64_t heads, ParallelFor parallel_for, int max_size) {
  constexpr int min_size = 64;
  constexpr int tiles_per_thread = 4;
  if (params.shape.seqlen_q <= min_size) return max_size;
  const int64_t wanted = int64_t{tiles_per_thread} * count_threads(parallel_for);
  int size = max_size;
  while (size > min_size && tile_queries(params, size).count() * heads < wanted) size /= 2;
  return size;
}

// Some rows of a tile against some keys. A query has a row for each of the heads packed into the tile, which lie
// together. Row n of the block sees the first `visible(n)` keys.
struct LogitBlock {
  int first_row;  // in the tile; those before it see no key of the block
  int rows;
  int first_key;
  int keys;
  int heads;         // rows of each query
  bool on_diagonal;  // a query sees one key more than the one before it, and the first sees one

  CHUNKATTN_INLINE int visible(int row) const { return on_diagonal ? std::min(row / heads + 1, keys) : keys; }
};

// Calls visit(block) for the blocks of at most max_keys keys of a segment, in ascending order of keys. The tile has a
// row for each of `heads` heads of a query.
template <class Visit>
void for_each_block(const Segment& segment, QueryTile tile, int heads, int max_keys, const Visit& visit) {
  const bool causal = segment.mask == Mask::kCausal;
  for (int key = segment.key_begin; key < segment.key_end;) {
    // A block ends where the diagonal enters the tile, so that those after it can leave out rows.
    const bool on_diagonal = causal && key >= tile.begin;
    const int end = causal && !on_diagonal ? std::min(tile.begin, segment.key_end) : segment.key_end;
    const int keys = std::min(max_keys, end - key);
    const int first_row = on_diagonal ? (key - tile.begin) * heads : 0;
    visit(LogitBlock{first_row, (tile.end - tile.begin) * heads - first_row, key, keys, heads, on_diagonal});
    key += keys;
  }
}

}  // namespace chunkattn::cpu
