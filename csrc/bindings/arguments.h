// The arguments of the dca operators, as torch hands them over and as the kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

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

Strides strides_of(const Tensor& tensor);

// The arguments must have passed their checks. softmax_lse is contiguous [batch, heads, seqlen_q].
ForwardParams forward_params(const DcaArguments& arguments, const Tensor& out, const Tensor& softmax_lse);

// A tensor like `like`, contiguous and uninitialised.
Tensor new_contiguous(const Tensor& like);

}  // namespace chunkattn::bindings
