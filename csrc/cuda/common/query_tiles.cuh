// Walks the query tiles that attend a tile of keys.
#pragma once

#include "geometry.h"

namespace chunkattn::cuda {

struct AttendingTile {
  int index;  // in the tiling
  int begin;  // first query's position
  int count;  // queries
  Regime regime;
  int row;    // of the first query in the tensors of its regime (BackwardWorkspace)
  int query;  // the same in q, dout and softmax_lse
};

// From the last tile to the one that holds the first key: QueryTiling and ChunkGeometry::tile_regime tile by tile, with
// divisions only where a chunk begins. Blocks that start together start with the same queries, whatever their keys:
// what they read and add to lies in the L2 cache.
class QueryTileWalk {
 public:
  CHUNKATTN_HOST_DEVICE QueryTileWalk(const QueryTiling& tiling, const RegimeRows& rows, int key_position)
      : key_position_(key_position), last_(tiling.index_of(key_position)) {
    go_to(tiling.count() - 1, tiling, rows);
  }

  CHUNKATTN_HOST_DEVICE bool done(const QueryTiling& /*tiling*/) const { return tile_index_ < last_; }

  CHUNKATTN_HOST_DEVICE AttendingTile tile(const QueryTiling& tiling, const RegimeRows& rows) const {
    const Regime regime = tiling.geometry.tile_regime_in_chunk(chunks_apart_, index_);
    const int query = rows.row(Regime::kIntra, begin_);
    const int row = regime == Regime::kSucc ? near_row_ : regime == Regime::kInter ? far_row_ : query;
    return {tile_index_, begin_, count(tiling), regime, row, query};
  }

  CHUNKATTN_HOST_DEVICE void advance(const QueryTiling& tiling, const RegimeRows& rows) {
    if (index_ < tiling.size) {
      go_to(tile_index_ - 1, tiling, rows);
      return;
    }
    --tile_index_;
    begin_ -= tiling.size;
    index_ -= tiling.size;
    near_row_ -= tiling.size;
    far_row_ -= tiling.size;
  }

 private:
  CHUNKATTN_HOST_DEVICE void go_to(int tile_index, const QueryTiling& tiling, const RegimeRows& rows) {
    tile_index_ = tile_index;
    if (tile_index < last_) return;
    const int stride = tiling.geometry.stride();
    begin_ = tiling.tile(tile_index).begin;
    index_ = begin_ % stride;
    chunks_apart_ = begin_ / stride - key_position_ / stride;
    near_row_ = rows.row(Regime::kSucc, begin_);
    far_row_ = rows.row(Regime::kInter, begin_);
  }

  CHUNKATTN_HOST_DEVICE int count(const QueryTiling& tiling) const {
    const int in_chunk = tiling.geometry.stride() - index_;
    const int in_all = tiling.end - begin_;
    const int most = in_chunk < in_all ? in_chunk : in_all;
    return most < tiling.size ? most : tiling.size;
  }

  int key_position_;
  int last_;  // index of the tile that holds the first key
  int tile_index_;
  int begin_ = 0;
  int index_ = 0;         // of begin_ in its chunk
  int chunks_apart_ = 0;  // of the queries and the keys
  int near_row_ = 0;      // by RegimeRows, of begin_ in succ
  int far_row_ = 0;       // and in inter
};

// The query tiles of a group from some position on, in the terms of QueryTileWalk: all of them attend alike.
class GroupTileWalk {
 public:
  CHUNKATTN_HOST_DEVICE GroupTileWalk(const QueryTiling& tiling, const QueryTile& group, int position, Regime regime)
      : begin_(group.begin + (position - group.begin) / tiling.size * tiling.size),
        end_(group.end),
        tile_index_(tiling.index_of(begin_)),
        regime_(regime) {}

  CHUNKATTN_HOST_DEVICE bool done(const QueryTiling& /*tiling*/) const { return begin_ >= end_; }

  CHUNKATTN_HOST_DEVICE AttendingTile tile(const QueryTiling& tiling, const RegimeRows& /*rows*/) const {
    const int left = end_ - begin_;
    return {tile_index_, begin_, left < tiling.size ? left : tiling.size, regime_, begin_, begin_};
  }

  CHUNKATTN_HOST_DEVICE void advance(const QueryTiling& tiling, const RegimeRows& /*rows*/) {
    ++tile_index_;
    begin_ += tiling.size;
  }

 private:
  int begin_;
  int end_;
  int tile_index_;
  Regime regime_;
};

}  // namespace chunkattn::cuda
