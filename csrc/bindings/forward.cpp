#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "results.h"
#include "runtime.h"

namespace chunkattn::bindings {

std::tuple<Tensor, Tensor> dca_cpu(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int64_t chunk_size,
                                   int64_t local_size, std::optional<double> scale, std::optional<Tensor> temperature,
                                   bool interleaved, bool q_rotated, bool k_rotated, bool /*deterministic*/) {
  const DcaArguments arguments{q,          k,     v,           cos,         sin,       chunk_size,
                               local_size, scale, temperature, interleaved, q_rotated, k_rotated};
  check_dca(arguments);
  Tensor out = new_contiguous(q);
  Tensor softmax_lse = new_softmax_lse(q);
  if (out.numel() > 0) cpu::dca_forward(forward_params(arguments, out, softmax_lse), parallel_for);
  return {out, softmax_lse};
}

#ifdef CHUNKATTN_WITH_CUDA
std::tuple<Tensor, Tensor> dca_cuda(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int64_t chunk_size,
                                    int64_t local_size, std::optional<double> scale, std::optional<Tensor> temperature,
                                    bool interleaved, bool q_rotated, bool k_rotated, bool /*deterministic*/) {
  const DcaArguments arguments{q,          k,     v,           cos,         sin,       chunk_size,
                               local_size, scale, temperature, interleaved, q_rotated, k_rotated};
  check_dca(arguments);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = new_contiguous(q);
  Tensor softmax_lse = new_softmax_lse(q);
  if (out.numel() == 0) return {out, softmax_lse};

  void* stream = current_cuda_stream(q.get_device_index());
  ForwardParams params = forward_params(arguments, out, softmax_lse);
  // Live until the attention is enqueued; the allocator hands their memory on in stream order.
  std::optional<Tensor> rotated;
  const std::array<int64_t, 1> one{1};
  Tensor tile_counter = torch::stable::new_empty(q, {one.data(), one.size()}, torch::headeronly::ScalarType::Int);
  params.tile_counter = static_cast<int*>(tile_counter.mutable_data_ptr());
  if (!k_rotated) {
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

void force_kernel(std::string name) { throw_if_failed(cuda::force_kernel(name.c_str())); }
#endif

}  // namespace chunkattn::bindings
