#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "results.h"
#include "runtime.h"

namespace chunkattn::bindings {

namespace {

std::tuple<Tensor, Tensor> forward_on_cpu(const DcaArguments& arguments) {
  check_dca(arguments);
  Tensor out = new_contiguous(arguments.q);
  Tensor softmax_lse = new_softmax_lse(arguments.q);
  const ForwardParams params = forward_params(arguments, out, softmax_lse);
  check_packed_contents(params);
  if (out.numel() > 0) cpu::dca_forward(params, parallel_for);
  return {out, softmax_lse};
}

#ifdef CHUNKATTN_WITH_CUDA
std::tuple<Tensor, Tensor> forward_on_cuda(const DcaArguments& arguments) {
  check_dca(arguments);
  const Tensor& q = arguments.q;
  const Tensor& k = arguments.k;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = new_contiguous(q);
  Tensor softmax_lse = new_softmax_lse(q);
  if (out.numel() == 0) return {out, softmax_lse};

  void* stream = current_cuda_stream(q.get_device_index());
  ForwardParams params = forward_params(arguments, out, softmax_lse);
  // Live until the attention is enqueued; the allocator hands their memory on in stream order.
  std::optional<Tensor> rotated, sequence_tiles;
  const Tensor tile_counter = new_workspace(q, sizeof(int));
  params.tile_counter = static_cast<int*>(tile_counter.mutable_data_ptr());
  if (params.packed()) {
    sequence_tiles = new_workspace(q, (params.shape.batch + size_t{1}) * sizeof(SequenceTiles));
    params.sequence_tiles = static_cast<SequenceTiles*>(sequence_tiles->mutable_data_ptr());
  }
  if (!params.k_rotated) {
    rotated = new_contiguous(k);
    const Strides strides = strides_of(*rotated);
    throw_if_failed(cuda::rotate_keys(params, rotated->mutable_data_ptr(), strides, stream));
    params.k = rotated->const_data_ptr();
    params.k_strides = strides;
    params.k_rotated = true;
  }
  throw_if_failed(cuda::dca_forward(params, stream));
  return {out, softmax_lse};
}
#endif

std::tuple<Tensor, Tensor> forward(const DcaArguments& arguments) {
#ifdef CHUNKATTN_WITH_CUDA
  if (arguments.q.is_cuda()) return forward_on_cuda(arguments);
#endif
  return forward_on_cpu(arguments);
}

}  // namespace

std::tuple<Tensor, Tensor> dca(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int64_t chunk_size,
                               int64_t local_size, std::optional<double> scale, std::optional<Tensor> temperature,
                               bool interleaved, bool q_rotated, bool k_rotated, bool /*deterministic*/) {
  const DcaArguments arguments{q,          k,     v,           cos,         sin,       chunk_size,
                               local_size, scale, temperature, interleaved, q_rotated, k_rotated};
  return forward(arguments);
}

std::tuple<Tensor, Tensor> dca_varlen(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor cu_seqlens_q,
                                      Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                      int64_t chunk_size, int64_t local_size, std::optional<double> scale,
                                      std::optional<Tensor> temperature, bool interleaved, bool q_rotated,
                                      bool k_rotated, bool /*deterministic*/) {
  const PackedSequences packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const DcaArguments arguments{q,     k,           v,           cos,       sin,       chunk_size, local_size,
                               scale, temperature, interleaved, q_rotated, k_rotated, packed};
  return forward(arguments);
}

#ifdef CHUNKATTN_WITH_CUDA
void force_kernel(std::string name) { throw_if_failed(cuda::force_kernel(name.c_str())); }
#endif

}  // namespace chunkattn::bindings
