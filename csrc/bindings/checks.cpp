#include "checks.h"

#include <torch/csrc/stable/device.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace chunkattn::bindings {

namespace {

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

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rank("q", q, 4, "[batch, seqlen_q, heads, head_dim]");
  check_rank("k", k, 4, "[batch, seqlen_k, kv_heads, head_dim]");
  check_rank("v", v, 4, "[batch, seqlen_k, kv_heads, head_dim]");
  check_device("k", k, q);
  check_device("v", v, q);
  check_q_dtype_and_head_dim(q);
  check_dtype_of_q("k", k, q);
  check_dtype_of_q("v", v, q);

  check(k.size(0) == q.size(0), "k must have the batch size of q, ", q.size(0), ", got ", k.size(0));
  check(k.size(3) == q.size(3), "k must have the head dimension of q, ", q.size(3), ", got ", k.size(3));
  check(same_shape(v, k), "v must have the shape of k, ", shape_of(k), ", got ", shape_of(v));
  const int64_t heads = q.size(2);
  const int64_t kv_heads = k.size(2);
  check(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
        "q must have a number of heads that is a multiple of the heads of k, got ", heads, " and ", kv_heads);
  check(q.size(1) <= k.size(1), "q must not be longer than k, got seqlen_q ", q.size(1), " and seqlen_k ", k.size(1));
  for (int64_t i = 0; i < 4; ++i) {
    check(q.size(i) <= kMaxSize, "q must have sizes below 2**31, got shape ", shape_of(q));
    check(k.size(i) <= kMaxSize, "k must have sizes below 2**31, got shape ", shape_of(k));
  }
  check_last_dim("q", q);
  check_last_dim("k", k);
  check_last_dim("v", v);
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

}  // namespace

void check_dca(const DcaArguments& arguments) {
  check_qkv(arguments.q, arguments.k, arguments.v);
  check_chunks(arguments.chunk_size, arguments.local_size);
  check_rotary(arguments);
  if (arguments.scale) {
    check(std::isfinite(*arguments.scale) && *arguments.scale > 0, "scale must be positive and finite, got ",
          *arguments.scale);
  }
  if (arguments.temperature) check_temperature(*arguments.temperature, arguments.q);
}

void check_dca_backward(const DcaArguments& arguments, const Tensor& dout, const Tensor& out,
                        const Tensor& softmax_lse) {
  check_dca(arguments);
  const Tensor& q = arguments.q;
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

}  // namespace chunkattn::bindings
