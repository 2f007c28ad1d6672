// Long chunks of prefill: the new tokens are appended, then the forward kernel attends to the cache.
#include "cache_attention.h"
#include "cuda/common/device.h"
#include "cuda/common/element_types.h"
#include "cuda/decode/launchers.h"
#include "cuda/forward/launchers.h"

namespace chunkattn::cuda {

namespace {

// Shorter chunks leave rows of the forward kernel's query tiles empty.
constexpr int kMinQueries = 128;

ForwardParams forward_params(const DecodeParams& params, const DecodeWorkspace& workspace) {
  const KeyValueCache& cache = params.cache;
  ForwardParams forward = cache_attention(params, cache.capacity);
  forward.k = cache.k;
  forward.v = cache.v;
  forward.k_strides = cache.k_strides;
  forward.v_strides = cache.v_strides;
  forward.tile_counter = workspace.tile_counter;
  return forward;
}

template <typename T>
const char* launch(const ForwardParams& forward, const DecodeParams& params, const KernelPlan& plan,
                   cudaStream_t stream) {
  const VectorPaths vectorized = vector_paths(forward);
  switch (plan.head_dim_padded) {
    case 64:
      return launch_cache_forward_sm90<T, 64>(forward, params.cache, params.seqlen_new, vectorized, plan, stream);
    case 128:
      return launch_cache_forward_sm90<T, 128>(forward, params.cache, params.seqlen_new, vectorized, plan, stream);
    case 256:
      return launch_cache_forward_sm90<T, 256>(forward, params.cache, params.seqlen_new, vectorized, plan, stream);
    default:
      return "no forward kernel is compiled for this head_dim";
  }
}

}  // namespace

bool is_prefill(const DecodeParams& params, const DecodeDevice& device, const DecodePaths& paths) {
  if (device.compute_capability != 90 || forced_kernel() == KernelChoice::kPortable) return false;
  if (!paths.cache || params.cache.float8 || params.num_splits > 1 || params.seqlen_q < kMinQueries) return false;
  const AttentionShape shape = cache_attention(params, params.cache.capacity).shape;
  const KernelPlan plan = plan_forward(shape, device.compute_capability);
  if (cache_box_rows(params.cache, params.geometry, plan.tile_n) % 8 != 0) return false;
  // Nobody shares the keys of a query tile, so there must be enough of them.
  const int64_t tiles = static_cast<int64_t>(params.batch) * params.heads * (params.seqlen_q / plan.tile_m);
  return 2 * tiles >= device.multiprocessors;
}

const char* launch_prefill(const DecodeParams& params, const DecodeWorkspace& workspace, const DecodeDevice& device,
                           cudaStream_t stream) {
  if (params.seqlen_new > 0) {
    if (const char* failure = launch_append(params, stream)) return failure;
  }
  if (const char* failure = launch_clear_unseeing(params, stream)) return failure;
  const ForwardParams forward = forward_params(params, workspace);
  const KernelPlan plan = plan_forward(forward.shape, device.compute_capability);
  return params.dtype == DataType::kBFloat16 ? launch<BFloat16>(forward, params, plan, stream)
                                             : launch<Float16>(forward, params, plan, stream);
}

}  // namespace chunkattn::cuda
