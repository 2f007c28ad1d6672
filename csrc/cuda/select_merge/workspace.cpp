// What the kernels of select-and-merge attention work in.
#include <climits>

#include "cuda/backward/gradient_pieces.h"
#include "cuda/backward/tile_sizes.h"
#include "cuda/common/carver.h"
#include "cuda/select_merge/attended_regions.h"
#include "group_attention.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

SelectMergeWorkspace take_lists(Carver& carver, const SelectMergeParams& params) {
  const int64_t lists = count_lists(params);
  SelectMergeWorkspace workspace{};
  workspace.regions = carver.take<int>(lists * params.regions.capacity);
  workspace.counts = carver.take<int>(lists);
  workspace.tile_counter = carver.take<int>(1);
  return workspace;
}

}  // namespace

SelectMergeWorkspace select_merge_workspace(const SelectMergeParams& params, void* memory, size_t* bytes) {
  Carver carver(memory);
  const SelectMergeWorkspace workspace = take_lists(carver, params);
  *bytes = carver.used();
  return workspace;
}

SelectMergeBackwardWorkspace select_merge_backward_workspace(const SelectMergeBackwardParams& params,
                                                             bool deterministic, void* memory, size_t* bytes) {
  const ForwardParams forward = group_attention(params).forward;
  const AttentionShape& shape = forward.shape;
  const int64_t planes = static_cast<int64_t>(shape.batch) * shape.heads;
  const int64_t kv_planes = static_cast<int64_t>(shape.batch) * shape.kv_heads;
  SelectMergeBackwardWorkspace workspace{};
  KeyGradientSums& keys = workspace.keys;
  BackwardWorkspace& queries = workspace.queries;

  // Queries attend to lists as they are, too, and have one gradient.
  queries.rows = {forward.geometry, 0, INT_MAX, 0, {0, 0, 0}};
  queries.dk_rotated = true;
  Carver carver(memory);
  queries.zeroed = carver.take<void>(0, 1);
  const int64_t sums = kv_planes * GradientPieces{shape.seqlen_k, shape.head_dim}.plane();
  keys.dk = carver.take<float>(sums);
  keys.dv = carver.take<float>(sums);
  if (deterministic) {
    const QueryTiling tiling{forward.geometry, 0, shape.seqlen_k, kBackwardSmallestTileM};
    queries.turns_per_plane = tiling.count();
    queries.turns = carver.take<int>(planes * queries.turns_per_plane);
    keys.dk_turns = carver.take<int>(kv_planes);
    keys.dv_turns = carver.take<int>(kv_planes);
  }
  float* const dq = carver.take<float>(planes * GradientPieces{shape.seqlen_q, shape.head_dim}.plane());
  queries.zeroed_bytes = carver.used();
  for (RegimeQueries& regime : queries.regimes) regime = {forward.q, forward.q_strides, dq, shape.seqlen_q};
  queries.delta = carver.take<float>(planes * shape.seqlen_q);
  workspace.lists = take_lists(carver, params.forward);
  *bytes = carver.used();
  return workspace;
}

}  // namespace chunkattn::cuda
