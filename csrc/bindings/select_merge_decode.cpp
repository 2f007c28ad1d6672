#include <torch/csrc/stable/accelerator.h>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "results.h"
#include "runtime.h"

namespace chunkattn::bindings {

namespace {

#ifdef CHUNKATTN_WITH_CUDA
// Enqueues everything and waits for nothing. Lengths and table are not looked at here: they lie on the device.
void decode_on_cuda(const SelectMergeDecodeParams& params, const Tensor& q) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  size_t bytes = 0;
  throw_if_failed(cuda::select_merge_decode_workspace(params, &bytes));
  const Tensor memory = new_workspace(q, bytes);
  throw_if_failed(
      cuda::select_merge_decode(params, memory.mutable_data_ptr(), current_cuda_stream(q.get_device_index())));
}
#endif

void decode(const SelectMergeDecodeArguments& arguments, const Tensor* out, const Tensor* softmax_lse) {
  const SelectMergeDecodeParams params = select_merge_decode_params(arguments, out, softmax_lse);
  const bool has_work = arguments.k.numel() > 0;
#ifdef CHUNKATTN_WITH_CUDA
  if (arguments.q.is_cuda()) {
    if (has_work) decode_on_cuda(params, arguments.q);
    return;
  }
#endif
  check_cache_contents(params);
  if (has_work) cpu::select_merge_decode(params, parallel_for);
}

}  // namespace

std::tuple<Tensor, Tensor> select_merge_with_kvcache(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache,
                                                     Tensor region_sums, Tensor query_sums, Tensor indices,
                                                     Tensor seqlens, int64_t capacity, int64_t region_size,
                                                     int64_t merge, std::string eligibility, std::string selection,
                                                     std::optional<Tensor> block_table, std::optional<Tensor> select_q,
                                                     std::optional<Tensor> select_k, std::optional<Tensor> new_seqlens,
                                                     std::optional<double> scale) {
  const SelectMergeDecodeArguments arguments{
      q,           k,     v,           k_cache,   v_cache,     region_sums, query_sums, indices,     seqlens, capacity,
      region_size, merge, eligibility, selection, block_table, select_q,    select_k,   new_seqlens, scale};
  check_select_merge_decode(arguments, nullptr);
  Tensor out = new_contiguous(q);
  Tensor softmax_lse = new_softmax_lse(q);
  decode(arguments, &out, &softmax_lse);
  return {out, softmax_lse};
}

Tensor select_merge_with_kvcache_out(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor region_sums,
                                     Tensor query_sums, Tensor indices, Tensor seqlens, int64_t capacity,
                                     int64_t region_size, int64_t merge, std::string eligibility, std::string selection,
                                     std::optional<Tensor> block_table, std::optional<Tensor> select_q,
                                     std::optional<Tensor> select_k, std::optional<Tensor> new_seqlens,
                                     std::optional<double> scale, Tensor out) {
  const SelectMergeDecodeArguments arguments{
      q,           k,     v,           k_cache,   v_cache,     region_sums, query_sums, indices,     seqlens, capacity,
      region_size, merge, eligibility, selection, block_table, select_q,    select_k,   new_seqlens, scale};
  check_select_merge_decode(arguments, &out);
  Tensor softmax_lse = new_softmax_lse(q);
  decode(arguments, &out, &softmax_lse);
  return softmax_lse;
}

void select_merge_append(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor region_sums,
                         Tensor query_sums, Tensor indices, Tensor seqlens, int64_t capacity, int64_t region_size,
                         int64_t merge, std::string eligibility, std::string selection,
                         std::optional<Tensor> block_table, std::optional<Tensor> select_q,
                         std::optional<Tensor> select_k, std::optional<Tensor> new_seqlens) {
  const SelectMergeDecodeArguments arguments{q,           k,          v,           k_cache,     v_cache,
                                             region_sums, query_sums, indices,     seqlens,     capacity,
                                             region_size, merge,      eligibility, selection,   block_table,
                                             select_q,    select_k,   new_seqlens, std::nullopt};
  check_select_merge_decode(arguments, nullptr);
  decode(arguments, nullptr, nullptr);
}

}  // namespace chunkattn::bindings
