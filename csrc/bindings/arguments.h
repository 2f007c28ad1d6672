// The arguments of the operators, as torch hands them over and as the kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../params.h"

namespace chunkattn::bindings {

using torch::stable::Tensor;

// Where sequences of different lengths lie in packed tensors.
struct PackedSequences {
  Tensor cu_seqlens_q;  // int32 [batch + 1]
  Tensor cu_seqlens_k;  // int32 [batch + 1]
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
};

struct DcaArguments {
  Tensor q;    // [batch, seqlen_q, heads, head_dim], packed: [total_q, heads, head_dim]
  Tensor k;    // [batch, seqlen_k, kv_heads, head_dim], packed: [total_k, kv_heads, head_dim]
  Tensor v;    // as k
  Tensor cos;  // float32 [>= chunk_size + 1, rotary_dim / 2]
  Tensor sin;  // the same shape and strides
  int64_t chunk_size;
  int64_t local_size;
  std::optional<double> scale;        // absent: 1 / sqrt(head_dim)
  std::optional<Tensor> temperature;  // float32 [batch], absent: 1
  bool interleaved;
  bool q_rotated;
  bool k_rotated;
  std::optional<PackedSequences> packed = std::nullopt;
};

struct DecodeArguments {
  Tensor q;              // [batch, seqlen_q, heads, head_dim]
  Tensor k_cache;        // [batch, capacity, kv_heads, head_dim], or pages [num_pages, page_size, kv_heads, head_dim]
  Tensor v_cache;        // the same shape
  Tensor cos;            // float32 [>= chunk_size + 1, rotary_dim / 2]
  Tensor sin;            // the same shape and strides
  Tensor cache_seqlens;  // int32 [batch]
  int64_t chunk_size;
  int64_t local_size;
  std::optional<Tensor> block_table;  // int32 [batch, pages of a sequence]
  std::optional<Tensor> k;            // [batch, seqlen_new, kv_heads, head_dim], raw
  std::optional<Tensor> v;            // the same shape
  std::optional<Tensor> k_scale;      // float32 [kv_heads], of a float8 cache; absent: 1
  std::optional<Tensor> v_scale;      // the same
  int64_t num_splits;                 // 0: the kernel chooses
  std::optional<double> scale;        // absent: 1 / sqrt(head_dim)
  std::optional<Tensor> temperature;  // float32 [batch], absent: 1
  bool interleaved;
  bool q_rotated;
};

struct SelectArguments {
  Tensor q;  // [batch, seqlen, heads, head_dim]
  Tensor k;  // [batch, seqlen, kv_heads, head_dim]
  int64_t region_size;
  int64_t top_k;
  int64_t merge;
  std::string eligibility;  // "group", "row"
  std::string selection;    // "lookahead", "causal"
  std::string heads;        // "kv", "q"
};

struct SelectMergeArguments {
  Tensor q;        // [batch, seqlen, heads, head_dim]
  Tensor k;        // [batch, seqlen, kv_heads, head_dim]
  Tensor v;        // [batch, seqlen, kv_heads, head_dim]
  Tensor indices;  // int32 [batch, kv_heads or heads, groups, any number]
  int64_t region_size;
  int64_t merge;
  std::optional<double> scale;  // absent: 1 / sqrt(head_dim)
};

struct SelectMergeDecodeArguments {
  Tensor q;            // [batch, seqlen, heads, head_dim]
  Tensor k;            // [batch, seqlen, kv_heads, head_dim]
  Tensor v;            // the same shape
  Tensor k_cache;      // [batch, rows, kv_heads, head_dim], or pages [num_pages, page_size, kv_heads, head_dim]
  Tensor v_cache;      // the same shape
  Tensor region_sums;  // float32 or float64 [batch, kv_heads, regions, head_dim]
  Tensor query_sums;   // the same dtype [batch, kv_heads or heads, voters, head_dim]
  Tensor indices;      // int32 [batch, kv_heads or heads, top_k]
  Tensor seqlens;      // int32 [batch]
  int64_t capacity;
  int64_t region_size;
  int64_t merge;
  std::string eligibility;            // "group", "row"
  std::string selection;              // "causal", "query"
  std::optional<Tensor> block_table;  // int32 [batch, pages of a sequence]
  std::optional<Tensor> select_q;     // as q, absent: q
  std::optional<Tensor> select_k;     // as k, absent: k
  std::optional<Tensor> new_seqlens;  // int32 [batch], absent: all are seqlen
  std::optional<double> scale;        // absent: 1 / sqrt(head_dim)
};

inline int64_t heads_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 2); }
inline int64_t head_dim_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// Of [batch, seq, heads, head_dim] or [seq, heads, head_dim].
Strides strides_of(const Tensor& tensor);

// The arguments must have passed their checks. softmax_lse is as new_softmax_lse() makes it.
ForwardParams forward_params(const DcaArguments& arguments, const Tensor& out, const Tensor& softmax_lse);

DecodeParams decode_params(const DecodeArguments& arguments, const Tensor& out, const Tensor& softmax_lse);

// `indices` is contiguous [batch, kv_heads or heads, groups, top_k].
SelectParams select_params(const SelectArguments& arguments, const Tensor& indices);
SelectMergeParams select_merge_params(const SelectMergeArguments& arguments, const Tensor& out,
                                      const Tensor& softmax_lse);

// Without `out` and `softmax_lse` nothing is attended.
SelectMergeDecodeParams select_merge_decode_params(const SelectMergeDecodeArguments& arguments, const Tensor* out,
                                                   const Tensor* softmax_lse);

RegionGeometry region_geometry(int64_t region_size, int64_t merge);

}  // namespace chunkattn::bindings
