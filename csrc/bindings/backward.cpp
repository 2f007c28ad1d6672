#include <torch/csrc/stable/accelerator.h>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "results.h"
#include "runtime.h"

namespace chunkattn::bindings {

namespace {

BackwardParams backward_params(const DcaArguments& arguments, const Tensor& dout, const Tensor& out,
                               const Tensor& softmax_lse, const Gradients& gradients) {
  BackwardParams params{};
  params.forward = forward_params(arguments, out, softmax_lse);
  set_gradients(params, dout, gradients);
  return params;
}

std::tuple<Tensor, Tensor, Tensor> backward_on_cpu(const DcaArguments& arguments, const Tensor& dout, const Tensor& out,
                                                   const Tensor& softmax_lse) {
  check_dca_backward(arguments, dout, out, softmax_lse);
  const Gradients gradients = new_gradients(arguments.q, arguments.k, arguments.v);
  const BackwardParams params = backward_params(arguments, dout, out, softmax_lse, gradients);
  check_packed_contents(params.forward);
  if (!gradients.empty) cpu::dca_backward(params, parallel_for);
  return gradients.as_tuple();
}

#ifdef CHUNKATTN_WITH_CUDA
std::tuple<Tensor, Tensor, Tensor> backward_on_cuda(const DcaArguments& arguments, const Tensor& dout,
                                                    const Tensor& out, const Tensor& softmax_lse, bool deterministic) {
  check_dca_backward(arguments, dout, out, softmax_lse);
  const Tensor& q = arguments.q;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Gradients gradients = new_gradients(q, arguments.k, arguments.v);
  if (gradients.empty) return gradients.as_tuple();

  const BackwardParams params = backward_params(arguments, dout, out, softmax_lse, gradients);
  const Tensor workspace = new_workspace(q, cuda::backward_workspace_bytes(params, deterministic));
  throw_if_failed(cuda::dca_backward(params, deterministic, workspace.mutable_data_ptr(),
                                     current_cuda_stream(q.get_device_index())));
  return gradients.as_tuple();
}
#endif

std::tuple<Tensor, Tensor, Tensor> backward(const DcaArguments& arguments, const Tensor& dout, const Tensor& out,
                                            const Tensor& softmax_lse, [[maybe_unused]] bool deterministic) {
#ifdef CHUNKATTN_WITH_CUDA
  if (arguments.q.is_cuda()) return backward_on_cuda(arguments, dout, out, softmax_lse, deterministic);
#endif
  return backward_on_cpu(arguments, dout, out, softmax_lse);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dca_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                Tensor softmax_lse, Tensor cos, Tensor sin, int64_t chunk_size,
                                                int64_t local_size, std::optional<double> scale,
                                                std::optional<Tensor> temperature, bool interleaved, bool q_rotated,
                                                bool k_rotated, bool deterministic) {
  const DcaArguments arguments{q,          k,     v,           cos,         sin,       chunk_size,
                               local_size, scale, temperature, interleaved, q_rotated, k_rotated};
  return backward(arguments, dout, out, softmax_lse, deterministic);
}

std::tuple<Tensor, Tensor, Tensor> dca_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                       Tensor softmax_lse, Tensor cos, Tensor sin, Tensor cu_seqlens_q,
                                                       Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                       int64_t chunk_size, int64_t local_size,
                                                       std::optional<double> scale, std::optional<Tensor> temperature,
                                                       bool interleaved, bool q_rotated, bool k_rotated,
                                                       bool deterministic) {
  const PackedSequences packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const DcaArguments arguments{q,     k,           v,           cos,       sin,       chunk_size, local_size,
                               scale, temperature, interleaved, q_rotated, k_rotated, packed};
  return backward(arguments, dout, out, softmax_lse, deterministic);
}

}  // namespace chunkattn::bindings
