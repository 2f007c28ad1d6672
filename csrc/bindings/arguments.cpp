#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <stdexcept>

namespace chunkattn::bindings {

namespace {

using torch::headeronly::ScalarType;

DataType data_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DataType::kFloat64;
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Half:
      return DataType::kFloat16;
    default:
      throw std::logic_error("chunkattn: a dtype without kernels passed the checks");
  }
}

}  // namespace

Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

ForwardParams forward_params(const DcaArguments& arguments, const Tensor& out, const Tensor& softmax_lse) {
  const Tensor& q = arguments.q;
  const Tensor& k = arguments.k;
  const double head_dim = static_cast<double>(q.size(3));

  ForwardParams params{};
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = arguments.v.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.softmax_lse = static_cast<float*>(softmax_lse.mutable_data_ptr());
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(arguments.v);
  params.out_strides = strides_of(out);
  params.shape.batch = static_cast<int>(q.size(0));
  params.shape.seqlen_q = static_cast<int>(q.size(1));
  params.shape.seqlen_k = static_cast<int>(k.size(1));
  params.shape.heads = static_cast<int>(q.size(2));
  params.shape.kv_heads = static_cast<int>(k.size(2));
  params.shape.head_dim = static_cast<int>(q.size(3));
  params.dtype = data_type(q.scalar_type());
  params.geometry.chunk_size = static_cast<int>(arguments.chunk_size);
  params.geometry.local_size = static_cast<int>(arguments.local_size);
  params.rotary.cos = static_cast<const float*>(arguments.cos.const_data_ptr());
  params.rotary.sin = static_cast<const float*>(arguments.sin.const_data_ptr());
  params.rotary.row_stride = arguments.cos.stride(0);
  params.rotary.rotary_dim = static_cast<int>(2 * arguments.cos.size(1));
  params.rotary.interleaved = arguments.interleaved;
  params.scale = arguments.scale.value_or(1.0 / std::sqrt(head_dim));
  if (arguments.temperature) {
    params.temperature = static_cast<const float*>(arguments.temperature->const_data_ptr());
  }
  params.q_rotated = arguments.q_rotated;
  params.k_rotated = arguments.k_rotated;
  return params;
}

Tensor new_contiguous(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

}  // namespace chunkattn::bindings
