#include "cuda/common/persistent_launch.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/select/scores_sm90.cuh"

namespace chunkattn::cuda {

namespace {

template <int kHeadDim, int kInRegisters>
__global__ void __launch_bounds__(ScoresSm90<kHeadDim, kInRegisters>::kThreads, 1)
    select_scores_sm90(const __grid_constant__ SelectPass pass, const __grid_constant__ TileSchedule schedule,
                       const __grid_constant__ CUtensorMap key_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ScoresSm90<kHeadDim, kInRegisters>::run(pass, schedule, key_map);
#endif
}

template <int kHeadDim, int kInRegisters>
const char* launch(const SelectPass& pass, cudaStream_t stream) {
  using Kernel = ScoresSm90<kHeadDim, kInRegisters>;
  const TileSchedule schedule = row_schedule(pass, Kernel::kTileM);
  const int64_t row = 2 * kHeadDim;
  const RowTensor keys{
      pass.workspace.k_means, {pass.rule.regions * row, row, row}, pass.kv_planes, pass.rule.regions, 1, 2 * kHeadDim};
  CUtensorMap key_map;
  if (const char* failure = encode_row_map(&key_map, keys, DataType::kFloat16, Kernel::kTileN)) return failure;

  const PersistentGrid grid{schedule.count(), Kernel::kThreads, Kernel::kSharedBytes, 1, kMaximumBlocks};
  return launch_persistent(&select_scores_sm90<kHeadDim, kInRegisters>, grid, pass.workspace.tile_counter, stream, pass,
                           schedule, key_map);
}

template <int kHeadDim>
const char* launch(const SelectPass& pass, cudaStream_t stream) {
  switch (pass.candidates_per_row) {
    case kFewInRegisters:
      return launch<kHeadDim, kFewInRegisters>(pass, stream);
    case kMostInRegisters:
      return launch<kHeadDim, kMostInRegisters>(pass, stream);
    default:
      return launch<kHeadDim, 0>(pass, stream);
  }
}

}  // namespace

const char* launch_scores_sm90(const SelectPass& pass, cudaStream_t stream) {
  return pass.workspace.padded_dim == 64 ? launch<64>(pass, stream) : launch<128>(pass, stream);
}

}  // namespace chunkattn::cuda
