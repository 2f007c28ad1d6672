// Runs the steps of decoding with select-and-merge attention, span after span.
#include "cuda/common/device.h"
#include "cuda/select_merge_decode/launchers.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

const char* run_span(const SpanStep& step, const DecodeParams& decode, const DecodeWorkspace& workspace,
                     cudaStream_t stream) {
  const SelectMergeDecodeParams& params = step.params;
  const char* failure = nullptr;
  if (step.plan.chooses) failure = launch_cache_scores(step, stream);
  if (failure == nullptr) failure = launch_choice(step, stream);
  if (failure == nullptr) failure = launch_append_span(step, stream);
  if (failure != nullptr || !params.attends || params.heads == 0) return failure;
  const bool direct = is_direct(params, step.plan);
  if (!direct) failure = launch_gather_queries(step, stream);
  if (failure == nullptr) failure = dca_decode(decode, workspace, stream);
  if (failure == nullptr && !direct) failure = launch_scatter_results(step, stream);
  return failure;
}

// The plan of a call, and bytes of the decode kernels' workspace.
const char* plan(const SelectMergeDecodeParams& params, StepPlan* plan, size_t* decode_bytes) {
  if (params.dtype != DataType::kBFloat16 && params.dtype != DataType::kFloat16) {
    return "chunkattn's CUDA kernels take bfloat16 and float16";
  }
  int count = 0, capability = 0;
  if (const char* failure = multiprocessors(&count)) return failure;
  if (const char* failure = compute_capability(&capability)) return failure;
  if (const char* failure = plan_step(params, count, plan)) return failure;
  // Later devices run PTX for sm_80, whose kernels do not wait for those before them.
  plan->dependent_launch = capability == 90;
  *decode_bytes = 0;
  if (params.attends && params.heads > 0) decode_workspace(decode_params(params, *plan, {}), nullptr, decode_bytes);
  return nullptr;
}

}  // namespace

const char* select_merge_decode_workspace(const SelectMergeDecodeParams& params, size_t* bytes) {
  StepPlan step{};
  size_t decode_bytes = 0;
  if (const char* failure = plan(params, &step, &decode_bytes)) return failure;
  lay_out_step(params, step, decode_bytes, nullptr, bytes);
  return nullptr;
}

const char* select_merge_decode(const SelectMergeDecodeParams& params, void* memory, void* stream) {
  SpanStep step{params, {}, {}, 0, false};
  size_t decode_bytes = 0, bytes = 0;
  if (const char* failure = plan(params, &step.plan, &decode_bytes)) return failure;
  step.workspace = lay_out_step(params, step.plan, decode_bytes, memory, &bytes);
  const DecodeParams decode = decode_params(params, step.plan, step.workspace);
  DecodeWorkspace workspace{};
  if (decode_bytes > 0) workspace = decode_workspace(decode, step.workspace.decode, &decode_bytes);
  for (step.index = 0; step.index < step.plan.spans; ++step.index) {
    step.last = step.index + 1 == step.plan.spans;
    if (const char* failure = run_span(step, decode, workspace, static_cast<cudaStream_t>(stream))) return failure;
  }
  return nullptr;
}

}  // namespace chunkattn::cuda
