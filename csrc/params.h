// What every kernel, CPU or CUDA, is handed. Plain structs: no torch, no CUDA types.
// Strides are in elements; the last dimension is always contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry.h"
#include "regions.h"

namespace chunkattn {

enum class DataType : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct Strides {
  int64_t batch;
  int64_t seq;
  int64_t head;
};

struct RotaryTable {
  const float* cos;    // [>= chunk_size + 1, rotary_dim / 2]
  const float* sin;    // the same shape and strides
  int64_t row_stride;  // of both
  int rotary_dim;      // rotated dimensions of the head; the rest pass through
  bool interleaved;    // pairs (2d, 2d + 1) instead of (d, d + rotary_dim / 2)
};

struct AttentionShape {
  int batch;
  int seqlen_q;
  int seqlen_k;
  int heads;
  int kv_heads;
  int head_dim;
};

// One sequence of a call: the rows of its batch entry that are its own. Query n has position seqlen_k - seqlen_q + n;
// those with a negative one see nothing, which only packed sequences can have: their output is 0, their log-sum-exp
// -inf.
struct Sequence {
  int64_t first_q;  // row of q, out, dout and dq
  int64_t first_k;  // row of k, v, dk and dv
  int seqlen_q;
  int seqlen_k;

  CHUNKATTN_HOST_DEVICE int first_position() const { return seqlen_k - seqlen_q; }

  // Cuts the queries that see keys into tiles.
  CHUNKATTN_HOST_DEVICE QueryTiling query_tiling(const ChunkGeometry& geometry, int tile_size) const {
    return {geometry, first_position() > 0 ? first_position() : 0, seqlen_k, tile_size};
  }

  // Cuts the keys that queries see: without queries there are none, otherwise the last query sees all.
  CHUNKATTN_HOST_DEVICE QueryTiling key_tiling(const ChunkGeometry& geometry, int tile_size) const {
    return {geometry, 0, seqlen_q > 0 ? seqlen_k : 0, tile_size};
  }
};

// The tiles of one packed sequence in the schedule of CUDA kernels, see TileSchedule.
struct SequenceTiles {
  int first_item;  // of the schedule
  int batch;
  int tiles;  // of a head
  int group;  // heads that are worked on together
};

// A plain batch, or sequences of different lengths packed one behind the other, without padding. Packed tensors have no
// batch dimension: their batch strides are 0, shape.seqlen_q and seqlen_k are the most any sequence has, and
// sequence() tells where each lies. Element (batch, row, head) is found in the same way either way:
// batch * strides.batch + (sequence(batch).first_q + row) * strides.seq + head * strides.head.
struct ForwardParams {
  const void* q;  // [batch, seqlen_q, heads, head_dim], packed: [total_q, heads, head_dim]
  const void* k;  // [batch, seqlen_k, kv_heads, head_dim], packed: [total_k, kv_heads, head_dim]
  const void* v;  // as k
  void* out;      // as q
  float*
      softmax_lse;  // [batch, heads, seqlen_q], packed: [heads, total_q]; contiguous, natural logarithm; see lse_row()
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Strides out_strides;
  AttentionShape shape;
  DataType dtype;  // of q, k, v and out
  ChunkGeometry geometry;
  RotaryTable rotary;
  double scale;              // of the logits
  const float* temperature;  // [batch], multiplies scale; null means 1
  bool q_rotated;            // queries arrive rotated at row position % stride
  bool k_rotated;            // keys arrive rotated at row position % stride
  int* tile_counter;         // [1], workspace of CUDA kernels that hand out tiles as they run; else null
  const int*
      cu_seqlens_q;  // [batch + 1], on the device of q: sequence b has the rows from [b] to [b + 1]; null: a batch
  const int* cu_seqlens_k;        // the same for k; null if and only if cu_seqlens_q is
  int total_q;                    // rows of packed q
  int total_k;                    // rows of packed k
  SequenceTiles* sequence_tiles;  // [batch + 1], workspace of CUDA kernels for packed sequences; else null

  CHUNKATTN_HOST_DEVICE bool packed() const { return cu_seqlens_q != nullptr; }

  // Of a plain batch.
  CHUNKATTN_HOST_DEVICE int first_position() const { return shape.seqlen_k - shape.seqlen_q; }

  // Stays inside the tensors whatever cu_seqlens hold: on a GPU nobody has checked them.
  CHUNKATTN_HOST_DEVICE Sequence sequence(int batch) const {
    if (!packed()) return {0, 0, shape.seqlen_q, shape.seqlen_k};
    const int first_q = clamp(cu_seqlens_q[batch], 0, total_q);
    const int first_k = clamp(cu_seqlens_k[batch], 0, total_k);
    const int seqlen_q = clamp(cu_seqlens_q[batch + 1], first_q, total_q) - first_q;
    const int seqlen_k = clamp(cu_seqlens_k[batch + 1], first_k, total_k) - first_k;
    return {first_q, first_k, clamp(seqlen_q, 0, shape.seqlen_q), clamp(seqlen_k, 0, shape.seqlen_k)};
  }

  // What tensors have in common, packed or not: batch entries with so many rows of q, and of k.
  CHUNKATTN_HOST_DEVICE int entries() const { return packed() ? 1 : shape.batch; }
  CHUNKATTN_HOST_DEVICE int rows_q() const { return packed() ? total_q : shape.seqlen_q; }
  CHUNKATTN_HOST_DEVICE int rows_k() const { return packed() ? total_k : shape.seqlen_k; }

  // softmax_lse, and what else has a value for every query, is made of planes with an element for each row of q.
  CHUNKATTN_HOST_DEVICE int64_t planes() const { return static_cast<int64_t>(entries()) * shape.heads; }
  CHUNKATTN_HOST_DEVICE int64_t plane(int batch, int head) const {
    return packed() ? head : static_cast<int64_t>(batch) * shape.heads + head;
  }

  // The element of softmax_lse that belongs to a sequence's first query.
  CHUNKATTN_HOST_DEVICE int64_t lse_row(int batch, int head) const {
    return plane(batch, head) * rows_q() + sequence(batch).first_q;
  }

  static CHUNKATTN_HOST_DEVICE int clamp(int value, int least, int most) {
    return value < least ? least : value < most ? value : most;
  }
};

struct BackwardParams {
  ForwardParams forward;  // its out and softmax_lse are inputs here
  const void* dout;       // as q
  void* dq;               // as q
  void* dk;               // as k
  void* dv;               // as k
  Strides dout_strides;
  Strides dq_strides;
  Strides dk_strides;
  Strides dv_strides;
};

// Queries rotated for one regime, and the gradient with respect to them, in kernels that keep each regime's apart until
// the end: the sum over regimes needs a rotation per row, which is cheaper once than per key tile.
struct RegimeQueries {
  const void* q;  // [batch, rows, heads, head_dim], packed: [rows, heads, head_dim]; by ChunkGeometry::query_row
  Strides q_strides;
  float* dq;  // [planes] of GradientRows or GradientPieces; starts at zero
  int rows;   // of RegimeRows
};

// What the CUDA backward kernels use beside BackwardParams.
struct BackwardWorkspace {
  RegimeQueries regimes[3];  // by Regime
  RegimeRows rows;           // of their tensors; packed sequences have each their own
  float* delta;              // as softmax_lse: rowsum(dout * out)
  int* turns;                // [planes, turns_per_plane]: whose turn it is to add to dq; null when order is free
  int turns_per_plane;       // at least the query tiles of a head
  void* zeroed;              // turns, the succ queries of a plain batch and every dq, which start at zero
  size_t zeroed_bytes;
  SequenceTiles* sequence_tiles;  // [batch + 1], of packed sequences; else null
  bool dk_rotated;                // dk is wanted with respect to rotated keys: they arrived so
  bool dq_in_pieces;              // by GradientPieces, not GradientRows: the main loop says
};

// Chooses the regions that each group of queries attends to.
struct SelectParams {
  const void* q;  // [batch, seqlen, heads, head_dim]
  const void* k;  // [batch, seqlen, kv_heads, head_dim]
  Strides q_strides;
  Strides k_strides;
  AttentionShape shape;  // seqlen_q = seqlen_k
  DataType dtype;        // of q and k
  RegionGeometry geometry;
  int top_k;
  Eligibility eligibility;
  Voters voters;
  int index_heads;  // kv_heads: scores summed over the query heads that share a KV head; heads: one choice for each
  int* indices;     // [batch, index_heads, groups, top_k], contiguous: ids ascending, then -1
};

// What the CUDA kernels of the selection use beside SelectParams. They work on some planes (a batch row and index head)
// at a time, so that memory does not grow with their number; the tensors are those of one pass. Nothing but
// planes_at_once is set where every group keeps all regions before it.
struct SelectWorkspace {
  int planes_at_once;
  int padded_dim;        // of the means, a size the kernels are compiled for
  void* q_means;         // [planes_at_once, regions, 2, padded_dim] float16: scaled means, what rounding left of them
  void* k_means;         // the same, of the KV heads those planes select from; first [.., padded_dim] float32
  unsigned* k_largest;   // [planes_at_once] float32 bits: the largest magnitude among a KV head's means
  uint64_t* candidates;  // [blocks * rows of a block, candidates_per_row], of the rows in work
  int candidates_per_row;
  uint64_t* lists;    // [planes_at_once, regions, top_k], the regions each row lists
  int* unmerged;      // [planes_at_once, groups]: whether the group's short lists did not suffice
  int* tile_counter;  // [1]
};

// The regions each group attends to beside itself.
struct RegionLists {
  const int* indices;  // [batch, index_heads, groups, capacity], contiguous; ids in any order, others than
                       // RegionGeometry::may_attend() allows are ignored
  int index_heads;     // kv_heads or heads
  int capacity;
  RegionGeometry geometry;
  int first_group;  // whose lists come first: 0, but in a cache, which has the lists of one group alone
  int groups;

  CHUNKATTN_HOST_DEVICE const int* list(int batch, int index_head, int group) const {
    const int64_t plane = static_cast<int64_t>(batch) * index_heads + index_head;
    return indices + (plane * groups + group - first_group) * capacity;
  }
};

// Attention to lists of regions and causally within each group. Rows are taken as they are: nothing is rotated.
struct SelectMergeParams {
  const void* q;       // [batch, seqlen, heads, head_dim]
  const void* k;       // [batch, seqlen, kv_heads, head_dim]
  const void* v;       // [batch, seqlen, kv_heads, head_dim]
  void* out;           // [batch, seqlen, heads, head_dim]
  float* softmax_lse;  // [batch, heads, seqlen], contiguous, natural logarithm
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Strides out_strides;
  AttentionShape shape;  // seqlen_q = seqlen_k
  DataType dtype;        // of q, k, v and out
  RegionLists regions;
  double scale;  // of the logits
};

// What the CUDA kernels use beside SelectMergeParams.
struct SelectMergeWorkspace {
  int* regions;       // as RegionLists::indices: of each list the ids that are not ignored, one behind the other
  int* counts;        // [batch, index_heads, groups], how many
  int* tile_counter;  // [1]
};

struct SelectMergeBackwardParams {
  SelectMergeParams forward;  // its out and softmax_lse are inputs here
  const void* dout;           // [batch, seqlen, heads, head_dim]
  void* dq;                   // [batch, seqlen, heads, head_dim]
  void* dk;                   // [batch, seqlen, kv_heads, head_dim]
  void* dv;                   // [batch, seqlen, kv_heads, head_dim]
  Strides dout_strides;
  Strides dq_strides;
  Strides dk_strides;
  Strides dv_strides;
};

// Float32 sums of the gradients with respect to keys and values: more than one thread block adds to each.
struct KeyGradientSums {
  float* dk;      // [batch * kv_heads] planes of GradientPieces; starts at zero
  float* dv;      // the same
  int* dk_turns;  // [batch * kv_heads], zeros: whose turn it is to add to dk; null when order is free
  int* dv_turns;  // the same of dv
};

// What the CUDA kernels use beside SelectMergeBackwardParams.
struct SelectMergeBackwardWorkspace {
  SelectMergeWorkspace lists;
  BackwardWorkspace queries;  // its regimes are all one, and no query has rows in any but intra
  KeyGradientSums keys;       // zeroed with queries.zeroed_bytes
};

// Keys, already rotated by ChunkGeometry::key_row, and values of sequences that grow.
struct KeyValueCache {
  void* k;            // [batch, capacity, kv_heads, head_dim], or in pages [num_pages, page_size, kv_heads, head_dim]
  void* v;            // the same shape
  Strides k_strides;  // batch: of a sequence, or of a page
  Strides v_strides;
  bool float8;                 // float8_e4m3fn, otherwise the dtype of q
  const float* k_scale;        // [kv_heads] factors of what a float8 cache holds; null means 1
  const float* v_scale;        // the same
  const int* block_table;      // [batch, pages of a sequence] page ids, or null
  int64_t block_table_stride;  // of a sequence
  int num_pages;               // ids outside 0 .. num_pages - 1 are never read
  int page_size;               // tokens
  int capacity;                // tokens a sequence can have: rows of the cache, or page_size times the table's width
  const int* cache_seqlens;    // [batch], on the device of q: tokens in the cache before this call's keys are appended
};

// A step of decoding, or a chunk of prefill, of sequences of different lengths. Query n of seqlen_q of sequence b has
// position cache_seqlens[b] + seqlen_new - seqlen_q + n.
struct DecodeParams {
  const void* q;       // [batch, seqlen_q, heads, head_dim]
  const void* new_k;   // [batch, seqlen_new, kv_heads, head_dim], raw, to be appended to the cache; or null
  const void* new_v;   // the same shape
  void* out;           // [batch, seqlen_q, heads, head_dim]
  float* softmax_lse;  // [batch, heads, seqlen_q], contiguous, natural logarithm
  Strides q_strides;
  Strides new_k_strides;
  Strides new_v_strides;
  Strides out_strides;
  int batch;
  int seqlen_q;
  int seqlen_new;  // 0 without new keys
  int heads;
  int kv_heads;
  int head_dim;
  DataType dtype;  // of q, new_k, new_v and out
  KeyValueCache cache;
  ChunkGeometry geometry;
  RotaryTable rotary;
  double scale;              // of the logits
  const float* temperature;  // [batch], multiplies scale; null means 1
  bool q_rotated;            // queries arrive rotated at row position % stride
  int num_splits;            // parts in which each sequence's keys are attended at once; 0: the kernel chooses
};

// A step of decoding, or a part of a prompt, with select-and-merge attention: tokens are appended to sequences, and
// attend to the regions chosen for their groups and causally to their groups. Rows are taken as they are: nothing is
// rotated. Sums are float32, or float64 where the dtype is.
struct SelectMergeDecodeParams {
  const void* q;         // [batch, seqlen, heads, head_dim]
  const void* k;         // [batch, seqlen, kv_heads, head_dim]
  const void* v;         // as k
  const void* select_q;  // as q: the rows that choose, q or others
  const void* select_k;  // as k: the rows by which is chosen
  void* out;             // as q
  float* softmax_lse;    // [batch, heads, seqlen], contiguous, natural logarithm
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Strides select_q_strides;
  Strides select_k_strides;
  Strides out_strides;
  int batch;
  int seqlen;
  int heads;
  int kv_heads;
  int head_dim;
  DataType dtype;          // of q, k, v, the rows selected on and out
  const int* new_seqlens;  // [batch], on the device of q: the tokens that a sequence has, its first ones; null: seqlen
  KeyValueCache cache;     // its capacity may be less than its pages have room for
  int* seqlens;            // cache.cache_seqlens, to which the tokens are added at the end
  void* region_sums;       // [batch, kv_heads, regions, head_dim], contiguous: over the tokens of a region that exist
  int regions;             // as many as the capacity has
  void* query_sums;        // [batch, index_heads, voters, head_dim], contiguous: of the current group's regions
  int voters;              // regions of a group, at most all; unused with each_token_chooses
  int* indices;            // [batch, index_heads, top_k], contiguous: of the current group, ascending, then -1
  int top_k;
  int index_heads;  // kv_heads or heads
  RegionGeometry geometry;
  Eligibility eligibility;
  bool each_token_chooses;  // for itself; else the group before chooses when a group's first token arrives
  bool attends;             // else the tokens are only appended
  double scale;             // of the logits

  // What is appended to a sequence that has `stored` tokens ends before this position. The kernels stay inside the
  // cache whatever the lengths are: on a GPU nobody has checked them.
  CHUNKATTN_HOST_DEVICE int end_of(int stored, int batch) const {
    const int wanted = new_seqlens == nullptr ? seqlen : new_seqlens[batch];
    const int count = wanted < 0 ? 0 : wanted < seqlen ? wanted : seqlen;
    return count < cache.capacity - stored ? stored + count : cache.capacity;
  }
  CHUNKATTN_HOST_DEVICE int stored(int batch) const {
    const int length = seqlens[batch];
    return length < 0 ? 0 : length < cache.capacity ? length : cache.capacity;
  }

  CHUNKATTN_HOST_DEVICE TokenSpans spans() const { return {geometry, each_token_chooses && attends}; }
};

// What the CUDA decode kernels use beside DecodeParams: what thread blocks found of sequences that several attend to.
struct DecodeWorkspace {
  float* out;         // [2 * groups, planes, tile_rows, head_dim_padded] (DecodePlan): sums of values, weighted
  float* states;      // [2 * groups, planes, tile_rows, 2]: SoftmaxState of each row
  int* groups;        // [row_tiles, batch, 2]: the first and the last group that attend to a sequence
  int* tile_counter;  // [1], of the forward kernel, which takes long chunks of prefill
};

}  // namespace chunkattn
