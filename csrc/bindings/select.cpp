#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "../kernels.h"
#include "checks.h"
#include "ops.h"
#include "runtime.h"

namespace chunkattn::bindings {

namespace {

Tensor new_indices(const SelectArguments& arguments) {
  const RegionGeometry geometry = region_geometry(arguments.region_size, arguments.merge);
  const int64_t groups = geometry.groups(static_cast<int>(arguments.q.size(1)));
  const int64_t index_heads = arguments.heads == "q" ? arguments.q.size(2) : arguments.k.size(2);
  const std::array<int64_t, 4> shape{arguments.q.size(0), index_heads, groups, arguments.top_k};
  return torch::stable::new_empty(arguments.q, {shape.data(), shape.size()}, torch::headeronly::ScalarType::Int);
}

#ifdef CHUNKATTN_WITH_CUDA
void select_on_cuda(const SelectParams& params, const Tensor& q) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  size_t bytes = 0;
  cuda::select_workspace(params, nullptr, &bytes);
  const Tensor memory = new_workspace(q, bytes);
  const SelectWorkspace workspace = cuda::select_workspace(params, memory.mutable_data_ptr(), &bytes);
  throw_if_failed(cuda::select(params, workspace, current_cuda_stream(q.get_device_index())));
}
#endif

}  // namespace

Tensor select(Tensor q, Tensor k, int64_t region_size, int64_t top_k, int64_t merge, std::string eligibility,
              std::string selection, std::string heads) {
  const SelectArguments arguments{q, k, region_size, top_k, merge, eligibility, selection, heads};
  check_select(arguments);
  Tensor indices = new_indices(arguments);
  if (indices.numel() == 0) return indices;
  const SelectParams params = select_params(arguments, indices);
#ifdef CHUNKATTN_WITH_CUDA
  if (q.is_cuda()) {
    select_on_cuda(params, q);
    return indices;
  }
#endif
  cpu::select(params, parallel_for);
  return indices;
}

}  // namespace chunkattn::bindings
