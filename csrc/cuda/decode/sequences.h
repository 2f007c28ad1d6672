// Lengths of the sequences of a cache, and how groups of thread blocks share their keys. No CUDA types.
#pragma once

#include "cuda/decode/plan.h"
#include "params.h"

namespace chunkattn::cuda {

// Tokens of a sequence. What lies beyond the capacity is dropped, whatever cache_seqlens holds.
struct SequenceLengths {
  int stored;  // before the new ones are appended
  int total;   // after it
};

CHUNKATTN_HOST_DEVICE SequenceLengths sequence_lengths(int capacity, int seqlen_new, int cache_seqlen) {
  const int stored = cache_seqlen < 0 ? 0 : cache_seqlen < capacity ? cache_seqlen : capacity;
  return {stored, seqlen_new < capacity - stored ? stored + seqlen_new : capacity};
}

CHUNKATTN_HOST_DEVICE SequenceLengths sequence_lengths(const DecodeParams& params, int cache_seqlen) {
  return sequence_lengths(params.cache.capacity, params.seqlen_new, cache_seqlen);
}

// May be negative: such a query sees no key.
CHUNKATTN_HOST_DEVICE int first_query_position(const DecodeParams& params, const SequenceLengths& lengths) {
  return lengths.stored + params.seqlen_new - params.seqlen_q;
}

// The queries of a row tile: row r belongs to query r / (heads / kv_heads).
struct TileQueries {
  int begin;
  int end;
};

CHUNKATTN_HOST_DEVICE TileQueries tile_queries(const DecodeParams& params, const DecodePlan& plan, int row_tile) {
  const int group = params.heads / params.kv_heads;
  const int last = (row_tile + 1) * plan.tile_rows - 1;
  return {row_tile * plan.tile_rows / group, (last < plan.rows ? last : plan.rows - 1) / group + 1};
}

// Tiles of keys that the queries of a row tile see: at least one, so that a sequence without keys is somebody's, too.
CHUNKATTN_HOST_DEVICE int visible_tiles(const DecodeParams& params, const DecodePlan& plan, const TileQueries& queries,
                                        const SequenceLengths& lengths) {
  const int beyond = first_query_position(params, lengths) + queries.end;
  const int visible = beyond < lengths.total ? beyond : lengths.total;
  return visible <= plan.tile_keys ? 1 : (visible - 1) / plan.tile_keys + 1;
}

// `tiles` in a row that `groups`, fewer than 2^15, share equally: group g takes those from begin(g) to begin(g + 1).
//
// Sequences lie end to end in that row. Every sequence but the first has DecodePlan::piece_cost tiles in front of its
// own that nobody attends to: what it costs a group to turn to another sequence. So a group that has many short ones
// gets fewer keys.
struct EqualShares {
  int tiles;
  int groups;

  // group * tiles / groups, without the product, which needs 64 bits.
  CHUNKATTN_HOST_DEVICE int begin(int group) const {
    return group * (tiles / groups) + group * (tiles % groups) / groups;
  }
  // Without a 64-bit division, too: float32 is at most one off.
  CHUNKATTN_HOST_DEVICE int group_of(int tile) const {
    const int near =
        static_cast<int>(static_cast<float>(tile) / static_cast<float>(tiles) * static_cast<float>(groups));
    return begin(near) > tile ? near - 1 : begin(near + 1) <= tile ? near + 1 : near;
  }
};

// What a group attends to of one sequence.
struct Piece {
  int batch;
  int begin;  // tiles of keys, counted from the sequence's first
  int end;
  int tiles;  // of the whole sequence
  int start;  // the sequence's first tile among those that are shared
  int left;   // tiles of the group's share that lie behind the sequence; 0 where none is to be attended

  CHUNKATTN_HOST_DEVICE bool whole() const { return begin == 0 && end == tiles; }
};

// A group attends to a part of at most two sequences; the others it has whole. So two places each suffice for what it
// leaves to be combined: one of the sequence that others began, one of that which it begins.
CHUNKATTN_HOST_DEVICE int partial_slot(int group, bool begins_sequence) {
  return 2 * group + (begins_sequence ? 1 : 0);
}

}  // namespace chunkattn::cuda
