// How a step over a cache of select-and-merge attention is launched. Pure host functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"

namespace chunkattn::cuda {

// A plane is a sequence and the query heads that share a list. A step works on its spans (TokenSpans) one after the
// other, of all sequences at once. To the decode kernels a plane is a sequence whose cache has pages of one region:
// those of its list, then those of its group; a page is where it lies, in units of `page_unit` elements from the
// cache's first. So one block table says which regions of which head are attended to, wherever they lie.
struct PageSteps {
  int64_t page;  // from one page of the cache, or sequence, to the next, in units
  int64_t region;
  int64_t head;
  int regions_per_page;  // where there is a block table
};

struct StepPlan {
  int planes;
  int heads_per_plane;
  int span_tokens;    // of the longest span
  int spans;          // at most
  int table_width;    // pages of a plane
  int64_t page_unit;  // divides the distances of heads, of regions and of sequences or pages of the cache
  PageSteps page_steps;
  bool chooses;   // some group may have more regions to choose from than it keeps
  int voters;     // rows of scores of a plane
  int score_dim;  // a size the kernel of the scores is compiled for
  int row_tiles;
  int splits;  // parts in which a row's regions are scored at once
  int score_blocks;
  int candidates_per_row;
  bool lists_in_shared;   // while they are sorted and merged
  bool dependent_launch;  // kernels of a step start before those they follow have ended
};

// Null, or why no kernel takes the call.
const char* plan_step(const SelectMergeDecodeParams& params, int multiprocessors, StepPlan* plan);

// The tensors of a step in global memory.
struct StepWorkspace {
  int* begins;           // [batch], where the step's tokens begin
  int* ends;             // [batch]
  int* lengths;          // [planes], tokens a span attends to
  int* table;            // [planes, table_width]
  int* counters;         // [planes], rows whose lists are in order
  uint64_t* candidates;  // [score_blocks, rows of a tile, candidates_per_row]
  uint64_t* lists;       // [planes, splits, voters, top_k]
  int* merge_memory;     // [planes, merge_ints()], where lists are not in shared memory
  void* queries;         // [planes, span_tokens, heads_per_plane, head_dim], right-aligned; null: q as it lies
  void* out;             // the same, null: out as it lies
  float* softmax_lse;    // [planes, heads_per_plane, span_tokens], null: softmax_lse as it lies
  void* decode;          // the decode kernels' own
};

// Rows whose scores a thread block computes together, and the regions of a tile.
template <int kHeadDim>
struct CacheScoreTile {
  static constexpr int kRows = kHeadDim == 256 ? 64 : 128;
  static constexpr int kColumns = kHeadDim == 256 ? 32 : 64;
};

// Whether the queries of a step of one token can be attended with, and its results written, as they lie.
bool is_direct(const SelectMergeDecodeParams& params, const StepPlan& plan);

// The step as the decode kernels see it.
DecodeParams decode_params(const SelectMergeDecodeParams& params, const StepPlan& plan, const StepWorkspace& workspace);

// Lays the workspace out from `memory` on, with so many bytes for the decode kernels, and tells its size.
StepWorkspace lay_out_step(const SelectMergeDecodeParams& params, const StepPlan& plan, size_t decode_bytes,
                           void* memory, size_t* bytes);

}  // namespace chunkattn::cuda
