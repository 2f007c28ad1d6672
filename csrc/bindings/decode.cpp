#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "results.h"
#include "runtime.h"

namespace chunkattn::bindings {

namespace {

// Whether there is anything to append or to attend.
bool has_work(const DecodeArguments& arguments) {
  return arguments.q.numel() > 0 || (arguments.k && arguments.k->numel() > 0);
}

void decode_on_cpu(const DecodeArguments& arguments, const Tensor& out, const Tensor& softmax_lse) {
  const DecodeParams params = decode_params(arguments, out, softmax_lse);
  check_cache_contents(params);
  if (has_work(arguments)) cpu::dca_decode(params, parallel_for);
}

#ifdef CHUNKATTN_WITH_CUDA
// Enqueues everything and waits for nothing. Lengths and table are not looked at here: they lie on the device.
void decode_on_cuda(const DecodeArguments& arguments, const Tensor& out, const Tensor& softmax_lse) {
  if (!has_work(arguments)) return;
  const DecodeParams params = decode_params(arguments, out, softmax_lse);
  size_t bytes = 0;
  cuda::decode_workspace(params, nullptr, &bytes);
  const std::array<int64_t, 1> shape{static_cast<int64_t>(bytes)};
  // Lives until the kernels are enqueued; the allocator hands its memory on in stream order.
  const Tensor memory =
      torch::stable::new_empty(arguments.q, {shape.data(), shape.size()}, torch::headeronly::ScalarType::Byte);
  const DecodeWorkspace workspace = cuda::decode_workspace(params, memory.mutable_data_ptr(), &bytes);
  throw_if_failed(cuda::dca_decode(params, workspace, current_cuda_stream(arguments.q.get_device_index())));
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> dca_with_kvcache_cpu(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin,
                                                Tensor cache_seqlens, int64_t chunk_size, int64_t local_size,
                                                std::optional<Tensor> block_table, std::optional<Tensor> k,
                                                std::optional<Tensor> v, std::optional<Tensor> k_scale,
                                                std::optional<Tensor> v_scale, int64_t num_splits,
                                                std::optional<double> scale, std::optional<Tensor> temperature,
                                                bool interleaved, bool q_rotated) {
  const DecodeArguments arguments{q,          k_cache,    v_cache,     cos,         sin,         cache_seqlens,
                                  chunk_size, local_size, block_table, k,           v,           k_scale,
                                  v_scale,    num_splits, scale,       temperature, interleaved, q_rotated};
  check_decode(arguments, nullptr);
  Tensor out = new_contiguous(q);
  Tensor softmax_lse = new_softmax_lse(q);
  decode_on_cpu(arguments, out, softmax_lse);
  return {out, softmax_lse};
}

Tensor dca_with_kvcache_out_cpu(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin, Tensor cache_seqlens,
                                int64_t chunk_size, int64_t local_size, std::optional<Tensor> block_table,
                                std::optional<Tensor> k, std::optional<Tensor> v, std::optional<Tensor> k_scale,
                                std::optional<Tensor> v_scale, int64_t num_splits, std::optional<double> scale,
                                std::optional<Tensor> temperature, bool interleaved, bool q_rotated, Tensor out) {
  const DecodeArguments arguments{q,          k_cache,    v_cache,     cos,         sin,         cache_seqlens,
                                  chunk_size, local_size, block_table, k,           v,           k_scale,
                                  v_scale,    num_splits, scale,       temperature, interleaved, q_rotated};
  check_decode(arguments, &out);
  Tensor softmax_lse = new_softmax_lse(q);
  decode_on_cpu(arguments, out, softmax_lse);
  return softmax_lse;
}

#ifdef CHUNKATTN_WITH_CUDA
std::tuple<Tensor, Tensor> dca_with_kvcache_cuda(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin,
                                                 Tensor cache_seqlens, int64_t chunk_size, int64_t local_size,
                                                 std::optional<Tensor> block_table, std::optional<Tensor> k,
                                                 std::optional<Tensor> v, std::optional<Tensor> k_scale,
                                                 std::optional<Tensor> v_scale, int64_t num_splits,
                                                 std::optional<double> scale, std::optional<Tensor> temperature,
                                                 bool interleaved, bool q_rotated) {
  const DecodeArguments arguments{q,          k_cache,    v_cache,     cos,         sin,         cache_seqlens,
                                  chunk_size, local_size, block_table, k,           v,           k_scale,
                                  v_scale,    num_splits, scale,       temperature, interleaved, q_rotated};
  check_decode(arguments, nullptr);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = new_contiguous(q);
  Tensor softmax_lse = new_softmax_lse(q);
  decode_on_cuda(arguments, out, softmax_lse);
  return {out, softmax_lse};
}

Tensor dca_with_kvcache_out_cuda(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin, Tensor cache_seqlens,
                                 int64_t chunk_size, int64_t local_size, std::optional<Tensor> block_table,
                                 std::optional<Tensor> k, std::optional<Tensor> v, std::optional<Tensor> k_scale,
                                 std::optional<Tensor> v_scale, int64_t num_splits, std::optional<double> scale,
                                 std::optional<Tensor> temperature, bool interleaved, bool q_rotated, Tensor out) {
  const DecodeArguments arguments{q,          k_cache,    v_cache,     cos,         sin,         cache_seqlens,
                                  chunk_size, local_size, block_table, k,           v,           k_scale,
                                  v_scale,    num_splits, scale,       temperature, interleaved, q_rotated};
  check_decode(arguments, &out);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor softmax_lse = new_softmax_lse(q);
  decode_on_cuda(arguments, out, softmax_lse);
  return softmax_lse;
}
#endif

}  // namespace chunkattn::bindings
