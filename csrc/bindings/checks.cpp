#include "checks.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace chunkattn::bindings {

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;

// Positions and sizes are 32-bit inside the kernels, offsets 64-bit.
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
// Rows up to 2 * stride - 1 must fit 32 bits.
constexpr int64_t kMaxChunkSize = int64_t{1} << 30;
constexpr int64_t kMaxHeadDimCuda = 256;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "chunkattn: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

std::string dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return torch::headeronly::toString(tensor.scalar_type());
  }
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

bool last_dim_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1;
}

void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* dimensions) {
  check(tensor.defined(), name, " must be a tensor, got None");
  check(tensor.dim() == rank, name, " must have ", rank, " dimensions ", dimensions, ", got shape ", shape_of(tensor));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& q) {
  check(tensor.device() == q.device(), name, " must be on the device of q, ", device_of(q), ", got ",
        device_of(tensor));
}

void check_dtype_of_q(const char* name, const Tensor& tensor, const Tensor& q) {
  check(tensor.scalar_type() == q.scalar_type(), name, " must have the dtype of q, ", dtype_of(q), ", got ",
        dtype_of(tensor));
}

void check_float32(const char* name, const Tensor& tensor) {
  check(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got ", dtype_of(tensor));
}

void check_last_dim(const char* name, const Tensor& tensor) {
  check(last_dim_contiguous(tensor), name, " must be contiguous in its last dimension, got stride ",
        tensor.stride(tensor.dim() - 1), "; call .contiguous()");
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

void check_q_dtype_and_head_dim(const Tensor& q) {
  const ScalarType type = q.scalar_type();
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  const int64_t head_dim = q.size(3);
  check(head_dim > 0, "q must have a head dimension of at least 1, got shape ", shape_of(q));
  if (q.is_cuda()) {
    check(half, "q must be bfloat16 or float16 on CUDA, got ", dtype_of(q));
    check(head_dim <= kMaxHeadDimCuda, "q must have a head dimension of at most ", kMaxHeadDimCuda, " on CUDA, got ",
          head_dim);
  } else {
    check(half || type == ScalarType::Float || type == ScalarType::Double,
          "q must be float64, float32, bfloat16 or float16 on the CPU, got ", dtype_of(q));
  }
}

void check_sizes(const char* name, const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    check(tensor.size(i) <= kMaxSize, name, " must have sizes below 2**31, got shape ", shape_of(tensor));
  }
}

void check_queries_and_keys(const Tensor& q, const Tensor& k) {
  check_rank("q", q, 4, "[batch, seqlen_q, heads, head_dim]");
  check_rank("k", k, 4, "[batch, seqlen_k, kv_heads, head_dim]");
  check_device("k", k, q);
  check_q_dtype_and_head_dim(q);
  check_dtype_of_q("k", k, q);
  check(k.size(0) == q.size(0), "k must have the batch size of q, ", q.size(0), ", got ", k.size(0));
  check(k.size(3) == q.size(3), "k must have the head dimension of q, ", q.size(3), ", got ", k.size(3));
  const int64_t heads = q.size(2);
  const int64_t kv_heads = k.size(2);
  check(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
        "q must have a number of heads that is a multiple of the heads of k, got ", heads, " and ", kv_heads);
  check(q.size(1) <= k.size(1), "q must not be longer than k, got seqlen_q ", q.size(1), " and seqlen_k ", k.size(1));
  check_sizes("q", q);
  check_sizes("k", k);
  check_last_dim("q", q);
  check_last_dim("k", k);
}

void check_values(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rank("v", v, 4, "[batch, seqlen_k, kv_heads, head_dim]");
  check_device("v", v, q);
  check_dtype_of_q("v", v, q);
  check(same_shape(v, k), "v must have the shape of k, ", shape_of(k), ", got ", shape_of(v));
  check_last_dim("v", v);
}

void check_scale(const std::optional<double>& scale) {
  if (scale) check(std::isfinite(*scale) && *scale > 0, "scale must be positive and finite, got ", *scale);
}

void check_chunks(int64_t chunk_size, int64_t local_size) {
  check(chunk_size >= 2 && chunk_size <= kMaxChunkSize, "chunk_size must lie in 2 .. 2**30, got ", chunk_size);
  check(local_size > 0 && local_size < chunk_size, "local_size must lie in 1 .. chunk_size - 1, got ", local_size,
        " with chunk_size ", chunk_size);
}

void check_table(const char* name, const Tensor& table, const DcaArguments& arguments) {
  check_rank(name, table, 2, "[chunk_size + 1, rotary_dim / 2]");
  check_device(name, table, arguments.q);
  check_float32(name, table);
  check(table.size(0) >= arguments.chunk_size + 1, name,
        " must have at least chunk_size + 1 = ", arguments.chunk_size + 1, " rows, got ", table.size(0));
  const int64_t head_dim = arguments.q.size(3);
  check(table.size(1) >= 1 && table.size(1) <= head_dim / 2, name,
        " must have rotary_dim / 2 columns with rotary_dim in 2 .. head_dim = ", head_dim, ", got ", table.size(1),
        " columns");
  check_last_dim(name, table);
}

void check_rotary(const DcaArguments& arguments) {
  const Tensor& cos = arguments.cos;
  const Tensor& sin = arguments.sin;
  check_table("cos", cos, arguments);
  check_table("sin", sin, arguments);
  check(same_shape(cos, sin), "sin must have the shape of cos, ", shape_of(cos), ", got ", shape_of(sin));
  check(cos.stride(0) == sin.stride(0), "sin must have the row stride of cos, ", cos.stride(0), ", got ", sin.stride(0),
        "; call .contiguous() on both");
}

void check_temperature(const Tensor& temperature, const Tensor& q) {
  check_rank("temperature", temperature, 1, "[batch]");
  check_device("temperature", temperature, q);
  check_float32("temperature", temperature);
  check(temperature.size(0) == q.size(0), "temperature must have one element per batch row, ", q.size(0), ", got ",
        temperature.size(0));
  check_last_dim("temperature", temperature);
}

// What the backward takes on top of the arguments of the forward.
void check_saved(const Tensor& q, const Tensor& dout, const Tensor& out, const Tensor& softmax_lse) {
  check_rank("dout", dout, 4, "[batch, seqlen_q, heads, head_dim]");
  check_rank("out", out, 4, "[batch, seqlen_q, heads, head_dim]");
  check_rank("softmax_lse", softmax_lse, 3, "[batch, heads, seqlen_q]");
  check_device("dout", dout, q);
  check_device("out", out, q);
  check_device("softmax_lse", softmax_lse, q);
  check_dtype_of_q("dout", dout, q);
  check_dtype_of_q("out", out, q);
  check_float32("softmax_lse", softmax_lse);
  check(same_shape(dout, q), "dout must have the shape of q, ", shape_of(q), ", got ", shape_of(dout));
  check(same_shape(out, q), "out must have the shape of q, ", shape_of(q), ", got ", shape_of(out));
  check(softmax_lse.size(0) == q.size(0) && softmax_lse.size(1) == q.size(2) && softmax_lse.size(2) == q.size(1),
        "softmax_lse must have shape [", q.size(0), ", ", q.size(2), ", ", q.size(1), "], got ", shape_of(softmax_lse));
  check_last_dim("dout", dout);
  check_last_dim("out", out);
  check(softmax_lse.is_contiguous(), "softmax_lse must be contiguous; call .contiguous()");
}

void check_same_length(const Tensor& q, const Tensor& k) {
  check(k.size(1) == q.size(1), "k must have the length of q, ", q.size(1), ", got ", k.size(1));
}

void check_count(const char* name, int64_t count) {
  check(count >= 1 && count <= kMaxSize, name, " must lie in 1 .. 2**31 - 1, got ", count);
}

void check_regions(int64_t region_size, int64_t merge) {
  check_count("region_size", region_size);
  check_count("merge", merge);
}

void check_word(const char* name, const std::string& word, const char* first, const char* second) {
  check(word == first || word == second, name, " must be '", first, "' or '", second, "', got '", word, "'");
}

void check_indices(const Tensor& indices, const Tensor& q, const Tensor& k, const RegionGeometry& geometry) {
  check_rank("indices", indices, 4, "[batch, kv_heads or heads, groups, regions]");
  check_device("indices", indices, q);
  check(indices.scalar_type() == ScalarType::Int, "indices must be int32, got ", dtype_of(indices));
  const int64_t heads = q.size(2);
  const int64_t kv_heads = k.size(2);
  const int64_t groups = geometry.groups(static_cast<int>(q.size(1)));
  const bool known_heads = indices.size(1) == kv_heads || indices.size(1) == heads;
  check(indices.size(0) == q.size(0) && known_heads && indices.size(2) == groups, "indices must have shape [",
        q.size(0), ", ", kv_heads, " or ", heads, ", ", groups, ", any], got ", shape_of(indices));
  check_sizes("indices", indices);
  check(indices.is_contiguous(), "indices must be contiguous; call .contiguous()");
}

void check_region_ids(const Tensor& indices, const RegionGeometry& geometry) {
  const Tensor host = indices.is_cpu() ? indices : torch::stable::to(indices, Device(DeviceType::CPU));
  const int* const ids = static_cast<const int*>(host.const_data_ptr());
  const int64_t groups = host.size(2);
  const int64_t capacity = host.size(3);
  int64_t ignored = 0;
  int64_t first = 0;
  for (int64_t i = 0; i < host.numel(); ++i) {
    const int group = static_cast<int>(i / capacity % groups);
    if (ids[i] == -1 || geometry.may_attend(group, ids[i])) continue;
    if (ignored++ == 0) first = i;
  }
  if (ignored == 0) return;
  const int64_t list = first / capacity;
  const int group = static_cast<int>(list % groups);
  check(false, "indices must hold -1 and ids of regions before their group, got ", ignored,
        ignored == 1 ? " other, " : " others, first ", ids[first], " at [", list / groups / host.size(1), ", ",
        list / groups % host.size(1), ", ", group, ", ", first % capacity, "], whose group begins at region ",
        geometry.first_region(group));
}

}  // namespace

void check_dca(const DcaArguments& arguments) {
  check_queries_and_keys(arguments.q, arguments.k);
  check_values(arguments.q, arguments.k, arguments.v);
  check_chunks(arguments.chunk_size, arguments.local_size);
  check_rotary(arguments);
  check_scale(arguments.scale);
  if (arguments.temperature) check_temperature(*arguments.temperature, arguments.q);
}

void check_dca_backward(const DcaArguments& arguments, const Tensor& dout, const Tensor& out,
                        const Tensor& softmax_lse) {
  check_dca(arguments);
  check_saved(arguments.q, dout, out, softmax_lse);
}

void check_select(const SelectArguments& arguments) {
  check_queries_and_keys(arguments.q, arguments.k);
  check_same_length(arguments.q, arguments.k);
  check_regions(arguments.region_size, arguments.merge);
  check_count("top_k", arguments.top_k);
  check_word("eligibility", arguments.eligibility, "group", "row");
  check_word("selection", arguments.selection, "lookahead", "causal");
  check_word("heads", arguments.heads, "kv", "q");
}

void check_select_merge(const SelectMergeArguments& arguments) {
  const Tensor& q = arguments.q;
  const Tensor& k = arguments.k;
  check_queries_and_keys(q, k);
  check_same_length(q, k);
  check_values(q, k, arguments.v);
  check_regions(arguments.region_size, arguments.merge);
  check_scale(arguments.scale);
  const RegionGeometry geometry = region_geometry(arguments.region_size, arguments.merge);
  check_indices(arguments.indices, q, k, geometry);
  const char* const debug = std::getenv("CHUNKATTN_DEBUG");
  if (debug != nullptr && std::string(debug) == "1") check_region_ids(arguments.indices, geometry);
}

void check_select_merge_backward(const SelectMergeArguments& arguments, const Tensor& dout, const Tensor& out,
                                 const Tensor& softmax_lse) {
  check_select_merge(arguments);
  check_saved(arguments.q, dout, out, softmax_lse);
}

}  // namespace chunkattn::bindings
