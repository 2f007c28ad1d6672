#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

RotaryTable rotary_table(const Tensor& cos, const Tensor& sin, bool interleaved) {
  return {static_cast<const float*>(cos.const_data_ptr()), static_cast<const float*>(sin.const_data_ptr()),
          cos.stride(0), static_cast<int>(2 * cos.size(1)), interleaved};
}

ChunkGeometry chunk_geometry(int64_t chunk_size, int64_t local_size) {
  return {static_cast<int>(chunk_size), static_cast<int>(local_size)};
}

double logit_scale(std::optional<double> scale, const Tensor& q) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim_of(q))));
}

// Null for an absent tensor.
template <class Element>
const Element* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const Element*>(tensor->const_data_ptr()) : nullptr;
}

// Of a plain batch.
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

AttentionShape shape_of(const Tensor& q, const Tensor& k, const PackedSequences& packed) {
  AttentionShape shape{};
  shape.batch = static_cast<int>(packed.cu_seqlens_q.size(0) - 1);
  shape.seqlen_q = static_cast<int>(packed.max_seqlen_q);
  shape.seqlen_k = static_cast<int>(packed.max_seqlen_k);
  shape.heads = static_cast<int>(heads_of(q));
  shape.kv_heads = static_cast<int>(heads_of(k));
  shape.head_dim = static_cast<int>(head_dim_of(q));
  return shape;
}

// What is the same for every attention, all but the shape.
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
  params.dtype = data_type(arguments.q.scalar_type());
  params.scale = logit_scale(arguments.scale, arguments.q);
  return params;
}

KeyValueCache key_value_cache(const Tensor& k, const Tensor& v, const std::optional<Tensor>& block_table,
                              const Tensor& seqlens) {
  KeyValueCache cache{};
  cache.k = k.mutable_data_ptr();
  cache.v = v.mutable_data_ptr();
  cache.k_strides = strides_of(k);
  cache.v_strides = strides_of(v);
  cache.block_table = data_of<int>(block_table);
  cache.num_pages = static_cast<int>(k.size(0));
  cache.page_size = static_cast<int>(k.size(1));
  int64_t capacity = k.size(1);
  if (block_table) {
    cache.block_table_stride = block_table->stride(0);
    capacity *= block_table->size(1);
  }
  cache.capacity = static_cast<int>(std::min<int64_t>(capacity, std::numeric_limits<int>::max()));
  cache.cache_seqlens = static_cast<const int*>(seqlens.const_data_ptr());
  return cache;
}

}  // namespace

Strides strides_of(const Tensor& tensor) {
  if (tensor.dim() == 3) return {0, tensor.stride(0), tensor.stride(1)};
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

ForwardParams forward_params(const DcaArguments& arguments, const Tensor& out, const Tensor& softmax_lse) {
  ForwardParams params = attention_params<ForwardParams>(arguments, out, softmax_lse);
  params.shape =
      arguments.packed ? shape_of(arguments.q, arguments.k, *arguments.packed) : shape_of(arguments.q, arguments.k);
  if (arguments.packed) {
    params.cu_seqlens_q = static_cast<const int*>(arguments.packed->cu_seqlens_q.const_data_ptr());
    params.cu_seqlens_k = static_cast<const int*>(arguments.packed->cu_seqlens_k.const_data_ptr());
    params.total_q = static_cast<int>(arguments.q.size(0));
    params.total_k = static_cast<int>(arguments.k.size(0));
  }
  params.geometry = chunk_geometry(arguments.chunk_size, arguments.local_size);
  params.rotary = rotary_table(arguments.cos, arguments.sin, arguments.interleaved);
  params.temperature = data_of<float>(arguments.temperature);
  params.q_rotated = arguments.q_rotated;
  params.k_rotated = arguments.k_rotated;
  return params;
}

DecodeParams decode_params(const DecodeArguments& arguments, const Tensor& out, const Tensor& softmax_lse) {
  const Tensor& q = arguments.q;
  DecodeParams params{};
  params.q = q.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.softmax_lse = static_cast<float*>(softmax_lse.mutable_data_ptr());
  params.q_strides = strides_of(q);
  params.out_strides = strides_of(out);
  if (arguments.k) {
    params.new_k = arguments.k->const_data_ptr();
    params.new_v = arguments.v->const_data_ptr();
    params.new_k_strides = strides_of(*arguments.k);
    params.new_v_strides = strides_of(*arguments.v);
    params.seqlen_new = static_cast<int>(arguments.k->size(1));
  }
  params.batch = static_cast<int>(q.size(0));
  params.seqlen_q = static_cast<int>(q.size(1));
  params.heads = static_cast<int>(q.size(2));
  params.kv_heads = static_cast<int>(arguments.k_cache.size(2));
  params.head_dim = static_cast<int>(q.size(3));
  params.dtype = data_type(q.scalar_type());
  params.cache = key_value_cache(arguments.k_cache, arguments.v_cache, arguments.block_table, arguments.cache_seqlens);
  params.cache.float8 = arguments.k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  params.cache.k_scale = data_of<float>(arguments.k_scale);
  params.cache.v_scale = data_of<float>(arguments.v_scale);
  params.geometry = chunk_geometry(arguments.chunk_size, arguments.local_size);
  params.rotary = rotary_table(arguments.cos, arguments.sin, arguments.interleaved);
  params.scale = logit_scale(arguments.scale, q);
  params.temperature = data_of<float>(arguments.temperature);
  params.q_rotated = arguments.q_rotated;
  params.num_splits = static_cast<int>(arguments.num_splits);
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
  params.shape = shape_of(arguments.q, arguments.k);
  params.regions.indices = static_cast<const int*>(arguments.indices.const_data_ptr());
  params.regions.index_heads = static_cast<int>(arguments.indices.size(1));
  params.regions.capacity = static_cast<int>(arguments.indices.size(3));
  params.regions.geometry = region_geometry(arguments.region_size, arguments.merge);
  params.regions.groups = static_cast<int>(arguments.indices.size(2));
  return params;
}

SelectMergeDecodeParams select_merge_decode_params(const SelectMergeDecodeArguments& arguments, const Tensor* out,
                                                   const Tensor* softmax_lse) {
  SelectMergeDecodeParams params{};
  const auto set = [](const void*& data, Strides& strides, const Tensor& tensor) {
    data = tensor.const_data_ptr();
    strides = strides_of(tensor);
  };
  set(params.q, params.q_strides, arguments.q);
  set(params.k, params.k_strides, arguments.k);
  set(params.v, params.v_strides, arguments.v);
  set(params.select_q, params.select_q_strides, arguments.select_q.value_or(arguments.q));
  set(params.select_k, params.select_k_strides, arguments.select_k.value_or(arguments.k));
  if (out != nullptr) {
    params.attends = true;
    params.out = out->mutable_data_ptr();
    params.out_strides = strides_of(*out);
    params.softmax_lse = static_cast<float*>(softmax_lse->mutable_data_ptr());
  }
  const AttentionShape shape = shape_of(arguments.q, arguments.k);
  params.batch = shape.batch;
  params.seqlen = shape.seqlen_q;
  params.heads = shape.heads;
  params.kv_heads = shape.kv_heads;
  params.head_dim = shape.head_dim;
  params.dtype = data_type(arguments.q.scalar_type());
  params.new_seqlens = data_of<int>(arguments.new_seqlens);
  params.cache = key_value_cache(arguments.k_cache, arguments.v_cache, arguments.block_table, arguments.seqlens);
  params.cache.capacity = static_cast<int>(arguments.capacity);
  params.seqlens = static_cast<int*>(arguments.seqlens.mutable_data_ptr());
  params.region_sums = arguments.region_sums.mutable_data_ptr();
  params.regions = static_cast<int>(arguments.region_sums.size(2));
  params.query_sums = arguments.query_sums.mutable_data_ptr();
  params.voters = static_cast<int>(arguments.query_sums.size(2));
  params.indices = static_cast<int*>(arguments.indices.mutable_data_ptr());
  params.top_k = static_cast<int>(arguments.indices.size(2));
  params.index_heads = static_cast<int>(arguments.indices.size(1));
  params.geometry = region_geometry(arguments.region_size, arguments.merge);
  params.eligibility = arguments.eligibility == "row" ? Eligibility::kRow : Eligibility::kGroup;
  params.each_token_chooses = arguments.selection == "query";
  params.scale = logit_scale(arguments.scale, arguments.q);
  return params;
}

}  // namespace chunkattn::bindings
