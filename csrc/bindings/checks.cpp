#include "checks.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "../cuda/select/sizes.h"

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
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
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
  const int64_t head_dim = head_dim_of(q);
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

void check_heads(const Tensor& q, const char* keys, int64_t kv_heads) {
  const int64_t heads = heads_of(q);
  check(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
        "q must have a number of heads that is a multiple of the heads of ", keys, ", got ", heads, " and ", kv_heads);
}

void check_sizes(const char* name, const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    check(tensor.size(i) <= kMaxSize, name, " must have sizes below 2**31, got shape ", shape_of(tensor));
  }
}

// [batch, ...], as many as q has
void check_batch(const char* name, const Tensor& tensor, const Tensor& q) {
  check(tensor.size(0) == q.size(0), name, " must have the batch size of q, ", q.size(0), ", got ", tensor.size(0));
}

// Of a plain batch, or of packed sequences.
void check_queries_and_keys(const Tensor& q, const Tensor& k, bool packed) {
  const int64_t rank = packed ? 3 : 4;
  check_rank("q", q, rank, packed ? "[total_q, heads, head_dim]" : "[batch, seqlen_q, heads, head_dim]");
  check_rank("k", k, rank, packed ? "[total_k, kv_heads, head_dim]" : "[batch, seqlen_k, kv_heads, head_dim]");
  check_device("k", k, q);
  check_q_dtype_and_head_dim(q);
  check_dtype_of_q("k", k, q);
  if (!packed) check_batch("k", k, q);
  check(head_dim_of(k) == head_dim_of(q), "k must have the head dimension of q, ", head_dim_of(q), ", got ",
        head_dim_of(k));
  check_heads(q, "k", heads_of(k));
  if (!packed) {
    check(q.size(1) <= k.size(1), "q must not be longer than k, got seqlen_q ", q.size(1), " and seqlen_k ", k.size(1));
  }
  check_sizes("q", q);
  check_sizes("k", k);
  check_last_dim("q", q);
  check_last_dim("k", k);
}

// `dimensions`: of v, as many as k has.
void check_values(const Tensor& q, const Tensor& k, const Tensor& v, const char* dimensions) {
  check_rank("v", v, k.dim(), dimensions);
  check_device("v", v, q);
  check_dtype_of_q("v", v, q);
  check(same_shape(v, k), "v must have the shape of k, ", shape_of(k), ", got ", shape_of(v));
  check_last_dim("v", v);
}

void check_chunks(int64_t chunk_size, int64_t local_size) {
  check(chunk_size >= 2 && chunk_size <= kMaxChunkSize, "chunk_size must lie in 2 .. 2**30, got ", chunk_size);
  check(local_size > 0 && local_size < chunk_size, "local_size must lie in 1 .. chunk_size - 1, got ", local_size,
        " with chunk_size ", chunk_size);
}

void check_table(const char* name, const Tensor& table, const Tensor& q, int64_t chunk_size) {
  check_rank(name, table, 2, "[chunk_size + 1, rotary_dim / 2]");
  check_device(name, table, q);
  check_float32(name, table);
  check(table.size(0) >= chunk_size + 1, name, " must have at least chunk_size + 1 = ", chunk_size + 1, " rows, got ",
        table.size(0));
  const int64_t head_dim = head_dim_of(q);
  check(table.size(1) >= 1 && table.size(1) <= head_dim / 2, name,
        " must have rotary_dim / 2 columns with rotary_dim in 2 .. head_dim = ", head_dim, ", got ", table.size(1),
        " columns");
  check_last_dim(name, table);
}

void check_rotary(const Tensor& cos, const Tensor& sin, const Tensor& q, int64_t chunk_size) {
  check_table("cos", cos, q, chunk_size);
  check_table("sin", sin, q, chunk_size);
  check(same_shape(cos, sin), "sin must have the shape of cos, ", shape_of(cos), ", got ", shape_of(sin));
  check(cos.stride(0) == sin.stride(0), "sin must have the row stride of cos, ", cos.stride(0), ", got ", sin.stride(0),
        "; call .contiguous() on both");
}

void check_scale(std::optional<double> scale) {
  if (!scale) return;
  check(std::isfinite(*scale) && *scale > 0, "scale must be positive and finite, got ", *scale);
}

void check_temperature(const Tensor& temperature, const Tensor& q, int64_t batch) {
  check_rank("temperature", temperature, 1, "[batch]");
  check_device("temperature", temperature, q);
  check_float32("temperature", temperature);
  check(temperature.size(0) == batch, "temperature must have one element per batch row, ", batch, ", got ",
        temperature.size(0));
  check_last_dim("temperature", temperature);
}

void check_int32(const char* name, const Tensor& tensor, const Tensor& q) {
  check_device(name, tensor, q);
  check(tensor.scalar_type() == ScalarType::Int, name, " must be int32, got ", dtype_of(tensor));
}

void check_packed(const PackedSequences& packed, const Tensor& q) {
  const std::pair<const char*, const Tensor&> offsets[] = {{"cu_seqlens_q", packed.cu_seqlens_q},
                                                           {"cu_seqlens_k", packed.cu_seqlens_k}};
  for (const auto& [name, tensor] : offsets) {
    check_rank(name, tensor, 1, "[batch + 1]");
    check_int32(name, tensor, q);
    check(tensor.size(0) > 0, name, " must have batch + 1 elements, got none");
    check_last_dim(name, tensor);
  }
  check(packed.cu_seqlens_k.size(0) == packed.cu_seqlens_q.size(0),
        "cu_seqlens_k must have the length of cu_seqlens_q, ", packed.cu_seqlens_q.size(0), ", got ",
        packed.cu_seqlens_k.size(0));
  check(packed.cu_seqlens_q.size(0) > 1 || q.size(0) == 0,
        "cu_seqlens_q must have more than one element unless q is empty, got 1 element and ", q.size(0), " rows of q");
  const std::pair<const char*, int64_t> lengths[] = {{"max_seqlen_q", packed.max_seqlen_q},
                                                     {"max_seqlen_k", packed.max_seqlen_k}};
  for (const auto& [name, length] : lengths) {
    check(length >= 0 && length <= kMaxSize, name, " must lie in 0 .. 2**31 - 1, got ", length);
  }
}

void check_offsets(const char* name, const int* offsets, int batch, int total, const char* tensor,
                   const char* most_name, int most) {
  check(offsets[0] == 0, name, "[0] must be 0, got ", offsets[0]);
  for (int i = 0; i < batch; ++i) {
    const int64_t length = int64_t{offsets[i + 1]} - offsets[i];
    check(length >= 0, name, " must not fall, got ", offsets[i], " and then ", offsets[i + 1]);
    check(length <= most, most_name, " must be the length of the longest sequence or more, got ", most,
          " and a length of ", length);
  }
  check(offsets[batch] == total, name, " must end with the rows of ", tensor, ", ", total, ", got ", offsets[batch]);
}

void check_out(const Tensor& out, const Tensor& q) {
  check_rank("out", out, 4, "[batch, seqlen_q, heads, head_dim]");
  check_device("out", out, q);
  check_dtype_of_q("out", out, q);
  check(same_shape(out, q), "out must have the shape of q, ", shape_of(q), ", got ", shape_of(out));
  check_last_dim("out", out);
}

// The tensors of a cache that say where its rows lie.
void check_block_table(const std::optional<Tensor>& block_table, const Tensor& k_cache, const Tensor& q) {
  if (!block_table) return check_batch("k_cache", k_cache, q);
  check_rank("block_table", *block_table, 2, "[batch, pages of a sequence]");
  check_int32("block_table", *block_table, q);
  check_batch("block_table", *block_table, q);
  check_last_dim("block_table", *block_table);
  check(k_cache.size(1) > 0, "k_cache must have pages of at least 1 token, got shape ", shape_of(k_cache));
}

// int32 [batch]
void check_lengths(const char* name, const Tensor& lengths, const Tensor& q) {
  check_rank(name, lengths, 1, "[batch]");
  check_int32(name, lengths, q);
  check_batch(name, lengths, q);
  check_last_dim(name, lengths);
}

bool is_float8(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float8_e4m3fn; }

void check_cache_rows(const Tensor& k_cache, const Tensor& v_cache, const Tensor& q, bool paged, bool takes_float8) {
  const char* const dimensions =
      paged ? "[num_pages, page_size, kv_heads, head_dim]" : "[batch, capacity, kv_heads, head_dim]";
  check_rank("k_cache", k_cache, 4, dimensions);
  check_rank("v_cache", v_cache, 4, dimensions);
  check_device("k_cache", k_cache, q);
  check_device("v_cache", v_cache, q);
  check(k_cache.scalar_type() == q.scalar_type() || (takes_float8 && is_float8(k_cache)),
        "k_cache must have the dtype of q, ", dtype_of(q), takes_float8 ? ", or be float8_e4m3fn, got " : ", got ",
        dtype_of(k_cache));
  check(v_cache.scalar_type() == k_cache.scalar_type(), "v_cache must have the dtype of k_cache, ", dtype_of(k_cache),
        ", got ", dtype_of(v_cache));
  check(k_cache.size(3) == q.size(3), "k_cache must have the head dimension of q, ", q.size(3), ", got ",
        k_cache.size(3));
  check(same_shape(v_cache, k_cache), "v_cache must have the shape of k_cache, ", shape_of(k_cache), ", got ",
        shape_of(v_cache));
  check_heads(q, "k_cache", k_cache.size(2));
  check_sizes("k_cache", k_cache);
  check_last_dim("k_cache", k_cache);
  check_last_dim("v_cache", v_cache);
}

void check_cache(const DecodeArguments& arguments) {
  const Tensor& q = arguments.q;
  const Tensor& k_cache = arguments.k_cache;
  check_cache_rows(k_cache, arguments.v_cache, q, arguments.block_table.has_value(), true);
  const bool float8 = is_float8(k_cache);
  check(!float8 || q.scalar_type() != ScalarType::Double,
        "q must be float32, bfloat16 or float16 with a float8_e4m3fn cache, got float64");
  const std::pair<const char*, const std::optional<Tensor>&> scales[] = {{"k_scale", arguments.k_scale},
                                                                         {"v_scale", arguments.v_scale}};
  for (const auto& [name, factors] : scales) {
    if (!factors) continue;
    check(float8, name, " must be None unless the cache is float8_e4m3fn, got a tensor with a ", dtype_of(k_cache),
          " cache");
    check_rank(name, *factors, 1, "[kv_heads]");
    check_device(name, *factors, q);
    check_float32(name, *factors);
    check(factors->size(0) == k_cache.size(2), name, " must have one element per KV head, ", k_cache.size(2), ", got ",
          factors->size(0));
    check_last_dim(name, *factors);
  }
}

void check_new_keys(const DecodeArguments& arguments) {
  check(arguments.k.has_value() == arguments.v.has_value(), "k and v must be given together, got ",
        arguments.k ? "k" : "v", " alone");
  if (!arguments.k) return;
  const Tensor& q = arguments.q;
  const Tensor& k = *arguments.k;
  check_rank("k", k, 4, "[batch, seqlen_new, kv_heads, head_dim]");
  check_device("k", k, q);
  check_dtype_of_q("k", k, q);
  check_batch("k", k, q);
  check(k.size(2) == arguments.k_cache.size(2), "k must have the heads of k_cache, ", arguments.k_cache.size(2),
        ", got ", k.size(2));
  check(k.size(3) == q.size(3), "k must have the head dimension of q, ", q.size(3), ", got ", k.size(3));
  check_sizes("k", k);
  check_last_dim("k", k);
  check_values(q, k, *arguments.v, "[batch, seqlen_new, kv_heads, head_dim]");
}

// What the backward takes on top of the arguments of the forward.
void check_saved(const Tensor& q, const Tensor& dout, const Tensor& out, const Tensor& softmax_lse) {
  const bool packed = q.dim() == 3;
  const char* const dimensions = packed ? "[total_q, heads, head_dim]" : "[batch, seqlen_q, heads, head_dim]";
  check_rank("dout", dout, q.dim(), dimensions);
  check_rank("out", out, q.dim(), dimensions);
  check_rank("softmax_lse", softmax_lse, q.dim() - 1, packed ? "[heads, total_q]" : "[batch, heads, seqlen_q]");
  check_device("dout", dout, q);
  check_device("out", out, q);
  check_device("softmax_lse", softmax_lse, q);
  check_dtype_of_q("dout", dout, q);
  check_dtype_of_q("out", out, q);
  check_float32("softmax_lse", softmax_lse);
  check(same_shape(dout, q), "dout must have the shape of q, ", shape_of(q), ", got ", shape_of(dout));
  check(same_shape(out, q), "out must have the shape of q, ", shape_of(q), ", got ", shape_of(out));
  if (packed) {
    check(softmax_lse.size(0) == q.size(1) && softmax_lse.size(1) == q.size(0), "softmax_lse must have shape [",
          q.size(1), ", ", q.size(0), "], got ", shape_of(softmax_lse));
  } else {
    check(softmax_lse.size(0) == q.size(0) && softmax_lse.size(1) == q.size(2) && softmax_lse.size(2) == q.size(1),
          "softmax_lse must have shape [", q.size(0), ", ", q.size(2), ", ", q.size(1), "], got ",
          shape_of(softmax_lse));
  }
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

void check_top_k_on_device(int64_t top_k, int64_t regions, const Tensor& q) {
  check(!q.is_cuda() || top_k <= cuda::kLargestTopK || top_k >= regions, "top_k must be at most ", cuda::kLargestTopK,
        " on CUDA, or at least the number of regions, ", regions, "; got ", top_k);
}

void check_word(const char* name, const std::string& word, const char* first, const char* second) {
  check(word == first || word == second, name, " must be '", first, "' or '", second, "', got '", word, "'");
}

void check_indices(const Tensor& indices, const Tensor& q, const Tensor& k, const RegionGeometry& geometry) {
  check_rank("indices", indices, 4, "[batch, kv_heads or heads, groups, regions]");
  check_int32("indices", indices, q);
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

void check_selected_on(const char* name, const Tensor& rows, const char* like_name, const Tensor& like) {
  check_rank(name, rows, 4, "[batch, seqlen, heads, head_dim]");
  check_device(name, rows, like);
  check_dtype_of_q(name, rows, like);
  check(same_shape(rows, like), name, " must have the shape of ", like_name, ", ", shape_of(like), ", got ",
        shape_of(rows));
  check_last_dim(name, rows);
}

void check_capacity(const SelectMergeDecodeArguments& arguments) {
  const int64_t page_size = arguments.k_cache.size(1);
  const int64_t pages = arguments.block_table ? arguments.block_table->size(1) : 1;
  check(!arguments.block_table || page_size % arguments.region_size == 0,
        "k_cache must have pages of a multiple of region_size, ", arguments.region_size, ", tokens, got ", page_size);
  check(arguments.capacity >= 0 && arguments.capacity <= kMaxSize && arguments.capacity <= page_size * pages,
        "capacity must lie in 0 .. ", page_size * pages, ", the rows of a sequence, and below 2**31, got ",
        arguments.capacity);
}

void check_sums(const SelectMergeDecodeArguments& arguments) {
  const Tensor& q = arguments.q;
  const ScalarType sums = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::pair<const char*, const Tensor&> tensors[] = {{"region_sums", arguments.region_sums},
                                                           {"query_sums", arguments.query_sums}};
  for (const auto& [name, tensor] : tensors) {
    check_rank(name, tensor, 4, "[batch, heads, regions, head_dim]");
    check_device(name, tensor, q);
    check(tensor.scalar_type() == sums, name, " must be ", sums == ScalarType::Double ? "float64" : "float32",
          " for q of ", dtype_of(q), ", got ", dtype_of(tensor));
    check(tensor.is_contiguous(), name, " must be contiguous; call .contiguous()");
    check_sizes(name, tensor);
  }
  const Tensor& indices = arguments.indices;
  check_rank("indices", indices, 3, "[batch, kv_heads or heads, top_k]");
  check_int32("indices", indices, q);
  check_batch("indices", indices, q);
  check(indices.is_contiguous(), "indices must be contiguous; call .contiguous()");
  check_count("the last size of indices, top_k,", indices.size(2));
  const int64_t kv_heads = arguments.k.size(2), index_heads = indices.size(1);
  check(index_heads == kv_heads || index_heads == q.size(2), "indices must have a list for each of ", kv_heads,
        " KV heads or ", q.size(2), " query heads, got shape ", shape_of(indices));
  const RegionGeometry geometry = region_geometry(arguments.region_size, arguments.merge);
  const int64_t regions = geometry.regions(static_cast<int>(arguments.capacity));
  check_top_k_on_device(indices.size(2), regions, q);
  const int64_t voters = arguments.selection == "query" ? 0 : std::min<int64_t>(regions, arguments.merge);
  const auto has_shape = [&](const Tensor& tensor, int64_t heads, int64_t rows) {
    return tensor.size(0) == q.size(0) && tensor.size(1) == heads && tensor.size(2) == rows &&
           tensor.size(3) == q.size(3);
  };
  check(has_shape(arguments.region_sums, kv_heads, regions), "region_sums must have shape [", q.size(0), ", ", kv_heads,
        ", ", regions, ", ", q.size(3), "], got ", shape_of(arguments.region_sums));
  check(has_shape(arguments.query_sums, index_heads, voters), "query_sums must have shape [", q.size(0), ", ",
        index_heads, ", ", voters, ", ", q.size(3), "], got ", shape_of(arguments.query_sums));
}

// A sequence of a cache that the host can read, and so many tokens more.
void check_sequence(const char* seqlens, const KeyValueCache& cache, int batch, int64_t new_tokens) {
  const int64_t cached = cache.cache_seqlens[batch];
  const int64_t total = cached + new_tokens;
  check(cached >= 0 && total <= cache.capacity, seqlens, "[", batch, "] must lie in 0 .. ", cache.capacity - new_tokens,
        ", the capacity ", cache.capacity, " less ", new_tokens, " new tokens, got ", cached);
  if (cache.block_table == nullptr) return;
  const int64_t pages = (total + cache.page_size - 1) / cache.page_size;
  for (int64_t page = 0; page < pages; ++page) {
    const int id = cache.block_table[batch * cache.block_table_stride + page];
    check(id >= 0 && id < cache.num_pages, "block_table[", batch, ", ", page, "] must name one of ", cache.num_pages,
          " pages, got ", id);
  }
}

}  // namespace

void check_dca(const DcaArguments& arguments) {
  const bool packed = arguments.packed.has_value();
  check_queries_and_keys(arguments.q, arguments.k, packed);
  check_values(arguments.q, arguments.k, arguments.v,
               packed ? "[total_k, kv_heads, head_dim]" : "[batch, seqlen_k, kv_heads, head_dim]");
  if (arguments.packed) check_packed(*arguments.packed, arguments.q);
  check_chunks(arguments.chunk_size, arguments.local_size);
  check_rotary(arguments.cos, arguments.sin, arguments.q, arguments.chunk_size);
  check_scale(arguments.scale);
  if (arguments.temperature) {
    const int64_t batch = arguments.packed ? arguments.packed->cu_seqlens_q.size(0) - 1 : arguments.q.size(0);
    check_temperature(*arguments.temperature, arguments.q, batch);
  }
}

void check_packed_contents(const ForwardParams& params) {
  if (!params.packed()) return;
  const AttentionShape& shape = params.shape;
  check_offsets("cu_seqlens_q", params.cu_seqlens_q, shape.batch, params.total_q, "q", "max_seqlen_q", shape.seqlen_q);
  check_offsets("cu_seqlens_k", params.cu_seqlens_k, shape.batch, params.total_k, "k", "max_seqlen_k", shape.seqlen_k);
}

void check_dca_backward(const DcaArguments& arguments, const Tensor& dout, const Tensor& out,
                        const Tensor& softmax_lse) {
  check_dca(arguments);
  check_saved(arguments.q, dout, out, softmax_lse);
}

void check_decode(const DecodeArguments& arguments, const Tensor* out) {
  const Tensor& q = arguments.q;
  check_rank("q", q, 4, "[batch, seqlen_q, heads, head_dim]");
  check_q_dtype_and_head_dim(q);
  check_sizes("q", q);
  check_last_dim("q", q);
  check_cache(arguments);
  check_lengths("cache_seqlens", arguments.cache_seqlens, q);
  check_block_table(arguments.block_table, arguments.k_cache, q);
  check_new_keys(arguments);
  check_chunks(arguments.chunk_size, arguments.local_size);
  check_rotary(arguments.cos, arguments.sin, q, arguments.chunk_size);
  check_scale(arguments.scale);
  if (arguments.temperature) check_temperature(*arguments.temperature, q, q.size(0));
  check(arguments.num_splits >= 0 && arguments.num_splits <= kMaxSize, "num_splits must be 0 or more, got ",
        arguments.num_splits);
  if (out != nullptr) check_out(*out, q);
}

void check_cache_contents(const DecodeParams& params) {
  for (int batch = 0; batch < params.batch; ++batch) {
    check_sequence("cache_seqlens", params.cache, batch, params.seqlen_new);
  }
}

void check_select(const SelectArguments& arguments) {
  check_queries_and_keys(arguments.q, arguments.k, false);
  check_same_length(arguments.q, arguments.k);
  check_regions(arguments.region_size, arguments.merge);
  check_count("top_k", arguments.top_k);
  const RegionGeometry geometry = region_geometry(arguments.region_size, arguments.merge);
  check_top_k_on_device(arguments.top_k, geometry.regions(static_cast<int>(arguments.q.size(1))), arguments.q);
  check_word("eligibility", arguments.eligibility, "group", "row");
  check_word("selection", arguments.selection, "lookahead", "causal");
  check_word("heads", arguments.heads, "kv", "q");
}

void check_select_merge_decode(const SelectMergeDecodeArguments& arguments, const Tensor* out) {
  const Tensor& q = arguments.q;
  const Tensor& k = arguments.k;
  check_queries_and_keys(q, k, false);
  check_same_length(q, k);
  check_values(q, k, arguments.v, "[batch, seqlen, kv_heads, head_dim]");
  if (arguments.select_q) check_selected_on("select_q", *arguments.select_q, "q", q);
  if (arguments.select_k) check_selected_on("select_k", *arguments.select_k, "k", k);
  check_cache_rows(arguments.k_cache, arguments.v_cache, q, arguments.block_table.has_value(), false);
  check(arguments.k_cache.size(2) == k.size(2), "k must have the heads of k_cache, ", arguments.k_cache.size(2),
        ", got ", k.size(2));
  check_lengths("seqlens", arguments.seqlens, q);
  check_block_table(arguments.block_table, arguments.k_cache, q);
  if (arguments.new_seqlens) check_lengths("new_seqlens", *arguments.new_seqlens, q);
  check_regions(arguments.region_size, arguments.merge);
  check_word("eligibility", arguments.eligibility, "group", "row");
  check_word("selection", arguments.selection, "causal", "query");
  check_capacity(arguments);
  check_sums(arguments);
  check_scale(arguments.scale);
  if (out != nullptr) check_out(*out, q);
}

void check_cache_contents(const SelectMergeDecodeParams& params) {
  for (int batch = 0; batch < params.batch; ++batch) {
    const int count = params.new_seqlens == nullptr ? params.seqlen : params.new_seqlens[batch];
    check(count >= 0 && count <= params.seqlen, "new_seqlens[", batch, "] must lie in 0 .. ", params.seqlen,
          ", the tokens of q, got ", count);
    check_sequence("seqlens", params.cache, batch, count);
  }
}

void check_select_merge(const SelectMergeArguments& arguments) {
  const Tensor& q = arguments.q;
  const Tensor& k = arguments.k;
  check_queries_and_keys(q, k, false);
  check_same_length(q, k);
  check_values(q, k, arguments.v, "[batch, seqlen_k, kv_heads, head_dim]");
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
