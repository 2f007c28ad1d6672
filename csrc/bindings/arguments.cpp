#include "arguments.h"

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

AttentionShape shape_of(const Tensor& q, const Tensor& k) {
  AttentionShape shape{};
  shape.batch = static_cast<int>(q.size(0));
  shape.seqlen_q = static_cast<int>(q.size(1));
  shape.seqlen_k = static_cast<int>(k.size(1));
  shape.heads = static_cast<int>(q.size(2));
  shape.kv_heads = static_cast<int>(k.size(2));
  shape.head_dim = static_cast<int>(q.size(3));
  return shape;
}

// What is the same for every attention.
template <class Params, class Arguments>
Params attention_params(const Arguments& arguments, const Tensor& out, const Tensor& softmax_lse) {
  Params params{};
  params.q = arguments.q.const_data_ptr();
  params.k = arguments.k.const_data_ptr();
  params.v = arguments.v.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.softmax_lse = static_cast<float*>(softmax_lse.mutable_data_ptr());
  params.q_strides = strides_of(arguments.q);
  params.k_strides = strides_of(arguments.k);
  params.v_strides = strides_of(arguments.v);
  params.out_strides = strides_of(out);
  params.shape = shape_of(arguments.q, arguments.k);
  params.dtype = data_type(arguments.q.scalar_type());
  params.scale = arguments.scale.value_or(1.0 / std::sqrt(static_cast<double>(arguments.q.size(3))));
  return params;
}

}  // namespace

Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

ForwardParams forward_params(const DcaArguments& arguments, const Tensor& out, const Tensor& softmax_lse) {
  ForwardParams params = attention_params<ForwardParams>(arguments, out, softmax_lse);
  params.geometry.chunk_size = static_cast<int>(arguments.chunk_size);
  params.geometry.local_size = static_cast<int>(arguments.local_size);
  params.rotary.cos = static_cast<const float*>(arguments.cos.const_data_ptr());
  params.rotary.sin = static_cast<const float*>(arguments.sin.const_data_ptr());
  params.rotary.row_stride = arguments.cos.stride(0);
  params.rotary.rotary_dim = static_cast<int>(2 * arguments.cos.size(1));
  params.rotary.interleaved = arguments.interleaved;
  if (arguments.temperature) {
    params.temperature = static_cast<const float*>(arguments.temperature->const_data_ptr());
  }
  params.q_rotated = arguments.q_rotated;
  params.k_rotated = arguments.k_rotated;
  return params;
}

RegionGeometry region_geometry(int64_t region_size, int64_t merge) {
  return {static_cast<int>(region_size), static_cast<int>(merge)};
}

SelectParams select_params(const SelectArguments& arguments, const Tensor& indices) {
  SelectParams params{};
  params.q = arguments.q.const_data_ptr();
  params.k = arguments.k.const_data_ptr();
  params.q_strides = strides_of(arguments.q);
  params.k_strides = strides_of(arguments.k);
  params.shape = shape_of(arguments.q, arguments.k);
  params.dtype = data_type(arguments.q.scalar_type());
  params.geometry = region_geometry(arguments.region_size, arguments.merge);
  params.top_k = static_cast<int>(arguments.top_k);
  params.eligibility = arguments.eligibility == "row" ? Eligibility::kRow : Eligibility::kGroup;
  params.voters = arguments.selection == "causal" ? Voters::kPreviousGroup : Voters::kOwnGroup;
  params.index_heads = static_cast<int>(indices.size(1));
  params.indices = static_cast<int*>(indices.mutable_data_ptr());
  return params;
}

SelectMergeParams select_merge_params(const SelectMergeArguments& arguments, const Tensor& out,
                                      const Tensor& softmax_lse) {
  SelectMergeParams params = attention_params<SelectMergeParams>(arguments, out, softmax_lse);
  params.regions.indices = static_cast<const int*>(arguments.indices.const_data_ptr());
  params.regions.index_heads = static_cast<int>(arguments.indices.size(1));
  params.regions.capacity = static_cast<int>(arguments.indices.size(3));
  params.regions.geometry = region_geometry(arguments.region_size, arguments.merge);
  return params;
}

}  // namespace chunkattn::bindings
