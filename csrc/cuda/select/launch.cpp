// Runs the steps of the selection, some planes at a time.
#include "cuda/common/device.h"
#include "cuda/select/launchers.h"
#include "cuda/select/sizes.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

const char* launch_scores(const SelectPass& pass, int capability, cudaStream_t stream) {
  // wgmma is a feature of 9.0 alone; at head_dim 256 the rows' means do not fit into registers.
  const bool hopper = capability == 90 && pass.workspace.padded_dim <= 128;
  if (forced_kernel() == KernelChoice::kHopper && !hopper) {
    return "the hopper kernel of the selection needs compute capability 9.0 and a head_dim of at most 128";
  }
  return hopper && forced_kernel() != KernelChoice::kPortable ? launch_scores_sm90(pass, stream)
                                                              : launch_scores_sm80(pass, stream);
}

const char* attempt(SelectPass& pass, int listed, int capability, cudaStream_t stream) {
  pass.listed = listed;
  pass.candidates_per_row = candidates_per_row(listed);
  const char* failure = launch_scores(pass, capability, stream);
  if (failure == nullptr) failure = launch_sort_lists(pass, stream);
  return failure == nullptr ? launch_merge(pass, stream) : failure;
}

const char* run_pass(SelectPass& pass, int capability, cudaStream_t stream) {
  if (pass.workspace.lists == nullptr) return launch_merge(pass, stream);
  const char* failure = launch_region_means(pass, stream);
  const int top_k = pass.rule.top_k, few = short_list(top_k, pass.rule.geometry.merge);
  if (failure == nullptr && few < top_k) {
    failure = attempt(pass, few, capability, stream);
    pass.again = true;
  }
  return failure == nullptr ? attempt(pass, top_k, capability, stream) : failure;
}

}  // namespace

const char* select(const SelectParams& params, const SelectWorkspace& workspace, void* stream) {
  if (params.dtype != DataType::kBFloat16 && params.dtype != DataType::kFloat16) {
    return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
  if (params.shape.head_dim > 256) return "chunkattn's CUDA kernels take head_dim up to 256";
  int capability = 0;
  if (const char* failure = compute_capability(&capability)) return failure;
  const SelectionRule rule = selection_rule(params);
  const int planes = params.shape.batch * params.index_heads;
  if (planes == 0 || rule.groups == 0 || params.top_k == 0) return nullptr;
  for (int first = 0; first < planes; first += workspace.planes_at_once) {
    const int left = planes - first;
    SelectPass pass{};
    pass.params = params;
    pass.workspace = workspace;
    pass.rule = rule;
    pass.first_plane = first;
    pass.planes = left < workspace.planes_at_once ? left : workspace.planes_at_once;
    pass.listed = params.top_k;
    pass.first_kv_plane = pass.kv_plane(0);
    pass.kv_planes = pass.kv_plane(pass.planes - 1) + 1;
    if (const char* failure = run_pass(pass, capability, static_cast<cudaStream_t>(stream))) return failure;
  }
  return nullptr;
}

}  // namespace chunkattn::cuda
