// The arguments of the operators, as torch hands them over and as the kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../params.h"

namespace chunkattn::bindings {

using torch::stable::Tensor;

struct DcaArguments {
  Tensor q;    // [batch, seqlen_q, heads, head_dim]
  Tensor k;    // [batch, seqlen_k, kv_heads, head_dim]
  Tensor v;    // [batch, seqlen_k, kv_heads, head_dim]
  Tensor cos;  // float32 [>= chunk_size + 1, rotary_dim / 2]
  Tensor sin;  // the same shape and strides
  int64_t chunk_size;
  int64_t local_size;
  std::optional<double> scale;        // absent: 1 / sqrt(head_dim)
  std::optional<Tensor> temperature;  // float32 [batch], absent: 1
  bool interleaved;
  bool q_rotated;
  bool k_rotated;
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

Strides strides_of(const Tensor& tensor);

// The arguments must have passed their checks. softmax_lse is contiguous [batch, heads, seqlen_q].
ForwardParams forward_params(const DcaArguments& arguments, const Tensor& out, const Tensor& softmax_lse);

// `indices` is contiguous [batch, kv_heads or heads, groups, top_k].
SelectParams select_params(const SelectArguments& arguments, const Tensor& indices);
SelectMergeParams select_merge_params(const SelectMergeArguments& arguments, const Tensor& out,
                                      const Tensor& softmax_lse);

RegionGeometry region_geometry(int64_t region_size, int64_t merge);

}  // namespace chunkattn::bindings
