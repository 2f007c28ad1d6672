#include <torch/csrc/stable/ops.h>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "runtime.h"

namespace chunkattn::bindings {

std::tuple<Tensor, Tensor, Tensor> dca_backward_cpu(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                    Tensor softmax_lse, Tensor cos, Tensor sin, int64_t chunk_size,
                                                    int64_t local_size, std::optional<double> scale,
                                                    std::optional<Tensor> temperature, bool interleaved, bool q_rotated,
                                                    bool k_rotated) {
  const DcaArguments arguments{q,          k,     v,           cos,         sin,       chunk_size,
                               local_size, scale, temperature, interleaved, q_rotated, k_rotated};
  check_dca_backward(arguments, dout, out, softmax_lse);
  Tensor dq = new_contiguous(q);
  Tensor dk = new_contiguous(k);
  Tensor dv = new_contiguous(v);
  if (dq.numel() == 0) {  // no query: nothing flows back to the keys
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  BackwardParams params{};
  params.forward = forward_params(arguments, out, softmax_lse);
  params.dout = dout.const_data_ptr();
  params.dq = dq.mutable_data_ptr();
  params.dk = dk.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  params.dout_strides = strides_of(dout);
  params.dq_strides = strides_of(dq);
  params.dk_strides = strides_of(dk);
  params.dv_strides = strides_of(dv);
  cpu::dca_backward(params, parallel_for);
  return {dq, dk, dv};
}

}  // namespace chunkattn::bindings
