// How queries are cut into tiles, and the segments of a tile into blocks of keys.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <vector>

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

// Keys [begin, end).
struct KeyRange {
  int begin;
  int end;
};

// Keys that a query tile attends to with one rotation of its queries. Masked ones are one range.
struct KeySegment {
  Regime regime;
  Mask mask;
  std::span<const KeyRange> ranges;
};

// The key segments of query tiles. `regions`: what a tile attends to beside its own chunk; null: all earlier chunks.
class TileSegments {
 public:
  TileSegments(const ForwardParams& params, const RegionLists* regions) : params_(params), regions_(regions) {}

  // Calls visit(segment) for the segments of a tile, restricted to the keys of `within`, nearest first. Those left
  // without keys are skipped.
  template <class Visit>
  void for_each(int batch, int head, QueryTile tile, KeyRange within, const Visit& visit) {
    const SegmentList segments = params_.geometry.segments(tile);
    const int count = regions_ == nullptr ? segments.count : 1;
    for (int i = 0; i < count; ++i) {
      const Segment& segment = segments.items[i];
      const KeyRange range = intersect({segment.key_begin, segment.key_end}, within);
      if (range.begin < range.end) visit(KeySegment{segment.regime, segment.mask, {&range, 1}});
    }
    if (regions_ == nullptr) return;
    find_regions(batch, head, regions_->geometry.group(tile.begin), within);
    if (!ranges_.empty()) visit(KeySegment{Regime::kIntra, Mask::kNone, ranges_});
  }

 private:
  static KeyRange intersect(KeyRange a, KeyRange b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

  // The keys of a group's regions, neighbours joined.
  void find_regions(int batch, int head, int group, KeyRange within) {
    const RegionGeometry& geometry = regions_->geometry;
    const int index_head = head / (params_.shape.heads / regions_->index_heads);
    const int* const indices = regions_->list(batch, index_head, group);
    ranges_.clear();
    for (int i = 0; i < regions_->capacity; ++i) {
      if (!geometry.may_attend(group, indices[i])) continue;
      const int begin = indices[i] * geometry.region_size;
      const KeyRange range = intersect({begin, begin + geometry.region_size}, within);
      if (range.begin >= range.end) continue;
      if (!ranges_.empty() && ranges_.back().end == range.begin) {
        ranges_.back().end = range.end;
      } else {
        ranges_.push_back(range);
      }
    }
  }

  const ForwardParams& params_;
  const RegionLists* regions_;
  std::vector<KeyRange> ranges_;
};

// Some rows of a tile against some keys. A query has a row for each of the heads packed into the tile, which lie
// together. Row n of the block sees the first `visible(n)` keys.
struct LogitBlock {
  int first_row;  // in the tile; those before it see no key of the block
  int rows;
  int keys;
  int heads;         // rows of each query
  bool on_diagonal;  // a query sees one key more than the one before it, and the first sees one

  CHUNKATTN_INLINE int visible(int row) const { return on_diagonal ? std::min(row / heads + 1, keys) : keys; }
};

// Calls visit(block, ranges) for blocks of at most max_keys keys that all rows of the tile see, together all of
// `ranges`.
template <int max_keys, class Visit>
void for_each_unmasked_block(std::span<const KeyRange> ranges, int rows, int heads, const Visit& visit) {
  std::array<KeyRange, max_keys> taken;
  int count = 0;
  int keys = 0;
  const auto finish_block = [&] {
    if (keys > 0) visit(LogitBlock{0, rows, keys, heads, false}, std::span<const KeyRange>(taken.data(), count));
    count = keys = 0;
  };
  for (KeyRange range : ranges) {
    while (range.begin < range.end) {
      const int end = std::min(range.end, range.begin + (max_keys - keys));
      taken[count++] = {range.begin, end};
      keys += end - range.begin;
      range.begin = end;
      if (keys == max_keys) finish_block();
    }
  }
  finish_block();
}

// Calls visit(block, ranges) for the blocks of at most max_keys keys of a segment, in its order. The tile has a row for
// each of `heads` heads of a query.
template <int max_keys, class Visit>
void for_each_block(const KeySegment& segment, QueryTile tile, int heads, const Visit& visit) {
  const int rows = (tile.end - tile.begin) * heads;
  if (segment.mask == Mask::kNone) return for_each_unmasked_block<max_keys>(segment.ranges, rows, heads, visit);
  // A block ends where the diagonal enters the tile, so that those after it can leave out rows.
  const KeyRange range = segment.ranges.front();
  const KeyRange before = {range.begin, std::min(range.end, tile.begin)};
  for_each_unmasked_block<max_keys>({&before, 1}, rows, heads, visit);
  for (int key = std::max(range.begin, tile.begin); key < range.end;) {
    const KeyRange keys = {key, std::min(range.end, key + max_keys)};
    const int first_row = (key - tile.begin) * heads;
    visit(LogitBlock{first_row, rows - first_row, keys.end - key, heads, true}, std::span<const KeyRange>(&keys, 1));
    key = keys.end;
  }
}

}  // namespace chunkattn::cpu
