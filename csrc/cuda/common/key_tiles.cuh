// Walks the key tiles of a segment list, nearest keys first: segment by segment, each from right to left.
// Tiles are anchored at the segment's first key, so only its rightmost tile can be partial.
#pragma once

#include "geometry.h"

namespace chunkattn::cuda {

struct KeyTile {
  int begin;  // first key
  int valid;  // keys of the tile that belong to the segment, from its first on
  Regime regime;
  bool causal;  // some query of the tile may not see some key of the tile
};

template <int kTileN>
class KeyTileWalk {
 public:
  // The list stays where it is, in shared memory on a GPU: it is read once per segment, and registers are scarce.
  CHUNKATTN_HOST_DEVICE KeyTileWalk(const SegmentList& segments, int first_query)
      : next_(segments.items), left_(segments.count), first_query_(first_query) {
    open_segment();
  }

  CHUNKATTN_HOST_DEVICE bool done() const { return index_ < 0; }

  CHUNKATTN_HOST_DEVICE KeyTile tile() const {
    const int begin = current_.key_begin + index_ * kTileN;
    const int left = current_.key_end - begin;
    return {begin, left < kTileN ? left : kTileN, current_.regime,
            current_.mask == Mask::kCausal && begin + kTileN - 1 > first_query_};
  }

  CHUNKATTN_HOST_DEVICE void advance() {
    if (!advance_in_segment()) open_segment();
  }

  // Moves to the next tile of the segment; false behind its last.
  CHUNKATTN_HOST_DEVICE bool advance_in_segment() { return --index_ >= 0; }

  // Moves to the first tile of the next segment; false behind the last.
  CHUNKATTN_HOST_DEVICE bool open_segment() {
    index_ = -1;
    if (left_-- == 0) return false;
    current_ = *next_++;
    index_ = (current_.key_end - current_.key_begin + kTileN - 1) / kTileN - 1;
    return true;
  }

 private:
  const Segment* next_;
  int left_;
  Segment current_;
  int first_query_;
  int index_;  // of the tile in the segment; -1 behind the last segment
};

}  // namespace chunkattn::cuda
