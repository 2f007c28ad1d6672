#include "cuda/common/carver.h"
#include "cuda/select/selection_rule.h"
#include "cuda/select/sizes.h"
#include "kernels.h"

namespace chunkattn::cuda {

SelectWorkspace select_workspace(const SelectParams& params, void* memory, size_t* bytes) {
  const SelectionRule rule = selection_rule(params);
  const int64_t planes = static_cast<int64_t>(params.shape.batch) * params.index_heads;
  SelectWorkspace workspace{};
  workspace.planes_at_once = static_cast<int>(planes);
  *bytes = 0;
  if (!chooses(rule)) return workspace;

  const int head_dim = params.shape.head_dim;
  workspace.padded_dim = head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  workspace.candidates_per_row = candidates_per_row(params.top_k);
  constexpr int64_t kMeanBytes = 4;  // two float16, or a float32
  const int64_t means = static_cast<int64_t>(rule.regions) * workspace.padded_dim;
  const int64_t list_entries = static_cast<int64_t>(rule.regions) * params.top_k;
  const int64_t plane_bytes = 2 * kMeanBytes * means + list_entries * static_cast<int64_t>(sizeof(uint64_t));
  const int64_t by_bytes = kPassBytes / plane_bytes;
  const int64_t fitting = by_bytes < kMaximumPlanes ? by_bytes : kMaximumPlanes;
  if (fitting < planes) {
    // Passes of equal size.
    const int64_t passes = fitting < 1 ? planes : (planes + fitting - 1) / fitting;
    workspace.planes_at_once = static_cast<int>((planes + passes - 1) / passes);
  }
  const int64_t blocks = candidate_blocks(rule.regions, workspace.planes_at_once);

  Carver carver(memory);
  // A row's candidates start on a multiple of their size (row_candidates.cuh); the memory need not.
  const int64_t row_bytes = static_cast<int64_t>(workspace.candidates_per_row) * sizeof(uint64_t);
  unsigned char* candidates = carver.take<unsigned char>((blocks * kLargestRowBlock + 1) * row_bytes);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(candidates) + row_bytes - 1) / row_bytes * row_bytes;
  workspace.candidates = reinterpret_cast<uint64_t*>(aligned);
  workspace.lists = carver.take<uint64_t>(workspace.planes_at_once * list_entries);
  workspace.q_means = carver.take<void>(workspace.planes_at_once * means, kMeanBytes);
  workspace.k_means = carver.take<void>(workspace.planes_at_once * means, kMeanBytes);
  workspace.k_largest = carver.take<unsigned>(workspace.planes_at_once);
  workspace.unmerged = carver.take<int>(static_cast<int64_t>(workspace.planes_at_once) * rule.groups);
  workspace.tile_counter = carver.take<int>(1);
  *bytes = carver.used();
  return workspace;
}

}  // namespace chunkattn::cuda
