#include <torch/csrc/stable/accelerator.h>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "results.h"
#include "runtime.h"

namespace chunkattn::bindings {

namespace {

#ifdef CHUNKATTN_WITH_CUDA
void forward_on_cuda(const SelectMergeParams& params, const Tensor& q) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  size_t bytes = 0;
  cuda::select_merge_workspace(params, nullptr, &bytes);
  const Tensor memory = new_workspace(q, bytes);
  const SelectMergeWorkspace workspace = cuda::select_merge_workspace(params, memory.mutable_data_ptr(), &bytes);
  throw_if_failed(cuda::select_merge_forward(params, workspace, current_cuda_stream(q.get_device_index())));
}

void backward_on_cuda(const SelectMergeBackwardParams& params, const Tensor& q, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  size_t bytes = 0;
  cuda::select_merge_backward_workspace(params, deterministic, nullptr, &bytes);
  const Tensor memory = new_workspace(q, bytes);
  const SelectMergeBackwardWorkspace workspace =
      cuda::select_merge_backward_workspace(params, deterministic, memory.mutable_data_ptr(), &bytes);
  throw_if_failed(cuda::select_merge_backward(params, workspace, current_cuda_stream(q.get_device_index())));
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> select_merge(Tensor q, Tensor k, Tensor v, Tensor indices, int64_t region_size,
                                        int64_t merge, std::optional<double> scale, bool /*deterministic*/) {
  const SelectMergeArguments arguments{q, k, v, indices, region_size, merge, scale};
  check_select_merge(arguments);
  Tensor out = new_contiguous(q);
  Tensor softmax_lse = new_softmax_lse(q);
  if (out.numel() == 0) return {out, softmax_lse};
  const SelectMergeParams params = select_merge_params(arguments, out, softmax_lse);
#ifdef CHUNKATTN_WITH_CUDA
  if (q.is_cuda()) {
    forward_on_cuda(params, q);
    return {out, softmax_lse};
  }
#endif
  cpu::select_merge_forward(params, parallel_for);
  return {out, softmax_lse};
}

std::tuple<Tensor, Tensor, Tensor> select_merge_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                         Tensor softmax_lse, Tensor indices, int64_t region_size,
                                                         int64_t merge, std::optional<double> scale,
                                                         [[maybe_unused]] bool deterministic) {
  const SelectMergeArguments arguments{q, k, v, indices, region_size, merge, scale};
  check_select_merge_backward(arguments, dout, out, softmax_lse);
  const Gradients gradients = new_gradients(q, k, v);
  if (gradients.empty) return gradients.as_tuple();
  SelectMergeBackwardParams params{};
  params.forward = select_merge_params(arguments, out, softmax_lse);
  set_gradients(params, dout, gradients);
#ifdef CHUNKATTN_WITH_CUDA
  if (q.is_cuda()) {
    backward_on_cuda(params, q, deterministic);
    return gradients.as_tuple();
  }
#endif
  cpu::select_merge_backward(params, parallel_for);
  return gradients.as_tuple();
}

}  // namespace chunkattn::bindings
