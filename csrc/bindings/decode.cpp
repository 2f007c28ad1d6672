#include <torch/csrc/stable/accelerator.h>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "results.h"
#include "runtime.h"

namespace chunkattn::bindings {

namespace {

void decode_on_cpu(const DecodeParams& params, bool has_work) {
  check_cache_contents(params);
  if (has_work) cpu::dca_decode(params, parallel_for);
}

#ifdef CHUNKATTN_WITH_CUDA
// Enqueues everything and waits for nothing. Lengths and table are not looked at here: they lie on the device.
void decode_on_cuda(const DecodeParams& params, bool has_work, const Tensor& q) {
  if (!has_work) return;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  size_t bytes = 0;
  cuda::decode_workspace(params, nullptr, &bytes);
  const Tensor memory = new_workspace(q, bytes);
  const DecodeWorkspace workspace = cuda::decode_workspace(params, memory.mutable_data_ptr(), &bytes);
  throw_if_failed(cuda::dca_decode(params, workspace, current_cuda_stream(q.get_device_index())));
}
#endif

// Writes to `out` and returns softmax_lse.
Tensor decode(const DecodeArguments& arguments, const Tensor& out) {
  const Tensor& q = arguments.q;
  Tensor softmax_lse = new_softmax_lse(q);
  const DecodeParams params = decode_params(arguments, out, softmax_lse);
  // Whether there is anything to append or to attend.
  const bool has_work = q.numel() > 0 || (arguments.k && arguments.k->numel() > 0);
#ifdef CHUNKATTN_WITH_CUDA
  if (q.is_cuda()) {
    decode_on_cuda(params, has_work, q);
    return softmax_lse;
  }
#endif
  decode_on_cpu(params, has_work);
  return softmax_lse;
}

}  // namespace

std::tuple<Tensor, Tensor> dca_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin,
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
  Tensor softmax_lse = decode(arguments, out);
  return {out, softmax_lse};
}

Tensor dca_with_kvcache_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin, Tensor cache_seqlens,
                            int64_t chunk_size, int64_t local_size, std::optional<Tensor> block_table,
                            std::optional<Tensor> k, std::optional<Tensor> v, std::optional<Tensor> k_scale,
                            std::optional<Tensor> v_scale, int64_t num_splits, std::optional<double> scale,
                            std::optional<Tensor> temperature, bool interleaved, bool q_rotated, Tensor out) {
  const DecodeArguments arguments{q,          k_cache,    v_cache,     cos,         sin,         cache_seqlens,
                                  chunk_size, local_size, block_table, k,           v,           k_scale,
                                  v_scale,    num_splits, scale,       temperature, interleaved, q_rotated};
  check_decode(arguments, &out);
  return decode(arguments, out);
}

}  // namespace chunkattn::bindings
