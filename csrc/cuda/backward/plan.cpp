#include "cuda/backward/plan.h"

#include <stdexcept>
#include <string>

#include "cuda/backward/gradient_pieces.h"
#include "cuda/backward/groups.h"
#include "cuda/backward/tile_sizes.h"
#include "cuda/common/carver.h"
#include "cuda/common/tile_schedule.h"
#include "kernels.h"

namespace chunkattn::cuda {

namespace {

// The kilobytes of shared memory that a thread block may take (CUDA C++ Programming Guide, technical specifications per
// compute capability). Devices after sm_90 run PTX for sm_80, in which the size for 227 is left empty
// (is_launched_here): they take that for 163.
int shared_kilobytes(int compute_capability) {
  if (compute_capability == 90) return 227;
  if (compute_capability == 80 || compute_capability == 87) return 163;
  const int major = compute_capability / 10;
  return major == 8 || major == 12 ? 99 : 163;
}

template <int kHeadDim, int kSharedKilobytes>
KernelPlan plan_portable() {
  using Tile = BackwardSm80Tile<kHeadDim, kSharedKilobytes>;
  return {
      "backward_sm80", KernelChoice::kPortable, Tile::kTileM, Tile::kTileN,
      Tile::kWarps,    Tile::kQueryStages,      kHeadDim,     backward_sm80_shared_bytes<kHeadDim, kSharedKilobytes>()};
}

template <int kHeadDim>
KernelPlan plan_hopper() {
  using Tile = BackwardSm90Tile<kHeadDim>;
  constexpr int kWarps = 12;
  return {"backward_sm90", KernelChoice::kHopper, Tile::kTileM, Tile::kTileN,
          kWarps,          Tile::kStages,         kHeadDim,     backward_sm90_tile_bytes<kHeadDim>()};
}

template <int kHeadDim>
KernelPlan plan_for_head_dim(int compute_capability, bool hopper) {
  if (hopper) return plan_hopper<kHeadDim>();
  const int kilobytes = shared_kilobytes(compute_capability);
  if constexpr (kHeadDim == 256) {
    if (kilobytes == 227) return plan_portable<kHeadDim, 227>();
  }
  return kilobytes >= 163 ? plan_portable<kHeadDim, 163>() : plan_portable<kHeadDim, 99>();
}

// Rows of a regime's tensors, by packed_regime_rows(): none where no sequence is long enough to have any.
int packed_rows(const ForwardParams& forward, Regime regime) {
  const ChunkGeometry& geometry = forward.geometry;
  const int most = forward.shape.seqlen_k;
  const bool any = regime == Regime::kIntra ||
                   (regime == Regime::kSucc ? most > geometry.stride() : most > first_far_query(geometry, 0));
  return any ? forward.total_q : 0;
}

// The query tiles of a head, or more.
int count_turns(const ForwardParams& forward) {
  const ChunkGeometry& geometry = forward.geometry;
  if (!forward.packed()) return forward.sequence(0).query_tiling(geometry, kBackwardSmallestTileM).count();
  return static_cast<int>(
      room_for_packed_tiles(forward.total_q, forward.shape.batch, geometry, kBackwardSmallestTileM));
}

}  // namespace

KernelPlan plan_backward(const AttentionShape& shape, int compute_capability, bool aligned, KernelChoice choice) {
  const bool hopper = compute_capability == 90 && aligned;
  if (choice == KernelChoice::kHopper && !hopper) {
    throw std::invalid_argument(
        "the hopper kernel of the backward needs compute capability 9.0 and rows of q, k, v and dout that start on "
        "multiples of 16 bytes, and in select_merge a region_size that is a multiple of 8");
  }
  const bool takes_hopper = hopper && choice != KernelChoice::kPortable;
  if (shape.head_dim <= 64) return plan_for_head_dim<64>(compute_capability, takes_hopper);
  if (shape.head_dim <= 128) return plan_for_head_dim<128>(compute_capability, takes_hopper);
  if (shape.head_dim <= 256) return plan_for_head_dim<256>(compute_capability, takes_hopper);
  throw std::invalid_argument("head_dim must be at most 256, got " + std::to_string(shape.head_dim));
}

BackwardWorkspace backward_workspace(const BackwardParams& params, bool deterministic, void* memory, size_t* bytes) {
  const ForwardParams& forward = params.forward;
  const AttentionShape& shape = forward.shape;
  const ChunkGeometry& geometry = forward.geometry;
  const int64_t planes = forward.planes();
  BackwardWorkspace workspace{};
  if (!forward.packed()) workspace.rows = regime_rows(geometry, forward.first_position(), kBackwardLargestTileM);
  for (const Regime regime : {Regime::kIntra, Regime::kSucc, Regime::kInter}) {
    workspace.regimes[static_cast<int>(regime)].rows =
        forward.packed() ? packed_rows(forward, regime) : workspace.rows.count(regime, shape.seqlen_k);
  }

  Carver carver(memory);
  const auto take_queries = [&](RegimeQueries& regime) {
    constexpr size_t kElementBytes = 2;
    const int64_t row = static_cast<int64_t>(shape.heads) * shape.head_dim;
    regime.q = carver.take<void>(forward.entries() * regime.rows * row, kElementBytes);
    regime.q_strides = {forward.packed() ? 0 : regime.rows * row, row, shape.head_dim};
  };
  workspace.zeroed = carver.take<void>(0, 1);
  if (deterministic) {
    workspace.turns_per_plane = count_turns(forward);
    workspace.turns = carver.take<int>(planes * workspace.turns_per_plane);
  }
  // succ of a plain batch has rows without a query behind the last one. Kernels that copy whole tiles read them.
  if (!forward.packed()) take_queries(workspace.regimes[1]);
  for (RegimeQueries& regime : workspace.regimes) {
    regime.dq = carver.take<float>(planes * GradientPieces{regime.rows, shape.head_dim}.plane());
  }
  workspace.zeroed_bytes = carver.used();
  if (forward.packed()) take_queries(workspace.regimes[1]);
  take_queries(workspace.regimes[2]);
  workspace.delta = carver.take<float>(planes * forward.rows_q());
  if (forward.packed()) workspace.sequence_tiles = carver.take<SequenceTiles>(shape.batch + 1);
  workspace.regimes[0].q = forward.q_rotated ? forward.q : params.dq;
  workspace.regimes[0].q_strides = forward.q_rotated ? forward.q_strides : params.dq_strides;
  workspace.dk_rotated = forward.k_rotated;
  *bytes = carver.used();
  return workspace;
}

size_t group_workspace_bytes(const BackwardParams& params, const HeadGroups& groups, bool deterministic) {
  size_t most = 0;
  for (int group = 0; group < groups.count(); ++group) {
    size_t bytes = 0;
    backward_workspace(params_of_group(params, groups, group), deterministic, nullptr, &bytes);
    most = bytes > most ? bytes : most;
  }
  return most;
}

size_t backward_workspace_bytes(const BackwardParams& params, bool deterministic) {
  const HeadGroups groups = head_groups(params.forward, deterministic);
  const int workspaces = groups.count() < kGroupWorkspaces ? groups.count() : kGroupWorkspaces;
  return workspaces * group_workspace_bytes(params, groups, deterministic);
}

}  // namespace chunkattn::cuda
