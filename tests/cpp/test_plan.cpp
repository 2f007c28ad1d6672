// The launch plans of the CUDA kernels, for every head_dim and the devices they are compiled for.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/backward/gradient_pieces.h"
#include "cuda/backward/plan.h"
#include "cuda/backward/tile_sizes.h"
#include "cuda/forward/plan.h"
#include "kernels.h"

namespace {

using chunkattn::AttentionShape;
using chunkattn::BackwardParams;
using chunkattn::BackwardWorkspace;
using chunkattn::RegimeQueries;
using chunkattn::cuda::GradientPieces;
using chunkattn::cuda::KernelChoice;
using chunkattn::cuda::KernelPlan;
using chunkattn::cuda::plan_backward;
using chunkattn::cuda::plan_forward;

using FindPlan = KernelPlan (*)(const AttentionShape&, int, bool, KernelChoice);

// Shared memory a thread block may take, in bytes (CUDA C++ Programming Guide, technical specifications per compute
// capability).
size_t shared_memory_limit(int compute_capability) {
  switch (compute_capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    default:
      return 227 * 1024;
  }
}

bool refuses(FindPlan find_plan, const AttentionShape& shape, int compute_capability) {
  try {
    find_plan(shape, compute_capability, true, KernelChoice::kAuto);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void test_every_head_dim(FindPlan find_plan, KernelChoice choice, int compute_capability) {
  for (int head_dim = 1; head_dim <= 256; ++head_dim) {
    const AttentionShape shape{2, 1000, 1000, 8, 2, head_dim};
    const KernelPlan plan = find_plan(shape, compute_capability, true, choice);
    CHECK(!std::string_view(plan.name).empty(), "head_dim ", head_dim);
    CHECK(plan.head_dim_padded >= head_dim && plan.head_dim_padded <= 256, "head_dim ", head_dim);
    CHECK(plan.head_dim_padded == 64 || head_dim > plan.head_dim_padded / 2, "head_dim ", head_dim, " is padded to ",
          plan.head_dim_padded);
    CHECK(plan.tile_m > 0 && plan.tile_n > 0 && plan.warps > 0 && plan.warps <= 32 && plan.stages > 0, "head_dim ",
          head_dim);
    CHECK(plan.shared_memory <= shared_memory_limit(compute_capability), "compute capability ", compute_capability,
          " head_dim ", head_dim, " takes ", plan.shared_memory, " bytes");
    // A tile of Q and one of K at the least, in 16 bits.
    CHECK(plan.shared_memory >= size_t{2} * plan.head_dim_padded * (plan.tile_m + plan.tile_n), "head_dim ", head_dim);
  }
  CHECK(refuses(find_plan, {1, 16, 16, 1, 1, 257}, compute_capability), "head_dim 257");
}

// Blocks of 256 bytes within the memory, none over another; less than three float32 tensors of dQ's shape, and of
// packed sequences two 16-bit ones more. With total_q 0 a plain batch.
void test_workspace(const AttentionShape& shape, int total_q, bool rotated, bool deterministic) {
  BackwardParams params{};
  params.forward.shape = shape;
  const int offsets[] = {0, 0};
  if (total_q > 0) params.forward.cu_seqlens_q = params.forward.cu_seqlens_k = offsets;
  params.forward.total_q = params.forward.total_k = total_q;
  params.forward.geometry = {3072, 512};
  params.forward.q_rotated = rotated;
  params.forward.k_rotated = rotated;
  params.forward.q = &params;
  params.dq = &params.dq;
  size_t bytes = 0;
  chunkattn::cuda::backward_workspace(params, deterministic, nullptr, &bytes);
  const int64_t queries = total_q > 0 ? total_q : int64_t{1} * shape.batch * shape.seqlen_q;
  const double query_bytes = 4.0 * queries * shape.heads * shape.head_dim;
  CHECK(bytes < (total_q > 0 ? 4.1 : 3) * query_bytes, "bytes ", bytes, " of ", query_bytes);

  constexpr uintptr_t kMemory = 1 << 20;
  size_t again = 0;
  const BackwardWorkspace workspace =
      chunkattn::cuda::backward_workspace(params, deterministic, reinterpret_cast<void*>(kMemory), &again);
  CHECK(again == bytes, "bytes ", again, " then ", bytes);
  CHECK(workspace.dk_rotated == rotated, "rotated ", rotated);
  CHECK(workspace.regimes[0].q == (rotated ? params.forward.q : params.dq), "rotated ", rotated);
  CHECK((workspace.turns != nullptr) == deterministic, "deterministic ", deterministic);
  std::vector<std::pair<uintptr_t, size_t>> pieces;
  const auto add = [&](const void* piece, size_t size) {
    pieces.push_back({reinterpret_cast<uintptr_t>(piece), size});
  };
  const size_t planes = params.forward.planes();
  const size_t row = planes * shape.head_dim;
  for (const RegimeQueries& regime : workspace.regimes) {
    add(regime.dq, 4 * planes * GradientPieces{regime.rows, shape.head_dim}.plane());
    if (&regime != workspace.regimes) add(regime.q, 2 * row * regime.rows);
  }
  add(workspace.delta, size_t{4} * shape.heads * queries);
  const auto is_zeroed = [&](const void* piece, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(piece), zeroed = reinterpret_cast<uintptr_t>(workspace.zeroed);
    return begin >= zeroed && begin + size <= zeroed + workspace.zeroed_bytes;
  };
  for (const RegimeQueries& regime : workspace.regimes) {
    const GradientPieces in_pieces{regime.rows, shape.head_dim};
    CHECK(in_pieces.plane() >= int64_t{1} * regime.rows * shape.head_dim, "rows ", regime.rows);
    CHECK(is_zeroed(regime.dq, 4 * planes * in_pieces.plane()), "rows ", regime.rows);
    const bool any = &regime == workspace.regimes || shape.seqlen_k > params.forward.geometry.chunk_size;
    if (total_q > 0) CHECK(regime.rows == (any ? total_q : 0), "rows ", regime.rows);
  }
  const RegimeQueries& succ = workspace.regimes[1];
  if (total_q == 0) CHECK(is_zeroed(succ.q, 2 * row * succ.rows), "rows ", succ.rows);
  if (deterministic) {
    const chunkattn::QueryTiling tiling{params.forward.geometry, params.forward.first_position(), shape.seqlen_k,
                                        chunkattn::cuda::kBackwardSmallestTileM};
    CHECK(workspace.turns_per_plane >= tiling.count(), "turns ", workspace.turns_per_plane);
    const size_t turns = 4 * planes * workspace.turns_per_plane;
    add(workspace.turns, turns);
    CHECK(is_zeroed(workspace.turns, turns), "turns ", turns);
  }
  if (total_q > 0) add(workspace.sequence_tiles, (shape.batch + 1) * sizeof(chunkattn::SequenceTiles));
  std::sort(pieces.begin(), pieces.end());
  uintptr_t end = kMemory;
  for (const auto& [begin, size] : pieces) {
    if (size == 0) continue;
    CHECK(begin >= end && begin % 256 == 0, "a piece begins at ", begin, ", the one before ends at ", end);
    end = begin + size;
  }
  CHECK(end <= kMemory + bytes, "end ", end - kMemory, " of ", bytes);
}

void test_workspaces() {
  for (const bool deterministic : {false, true}) {
    for (const bool rotated : {false, true}) {
      for (const AttentionShape& shape : {AttentionShape{1, 8192, 8192, 32, 32, 128},
                                          {2, 16384, 16384, 16, 4, 256},
                                          {1, 32768, 32768, 32, 8, 64},
                                          {1, 2560, 2560, 2, 2, 128}}) {
        test_workspace(shape, 0, rotated, deterministic);
        test_workspace(shape, 40000, rotated, deterministic);
      }
    }
  }
}

// What the workspace relies on.
void test_tile_bounds() {
  for (int compute_capability : {80, 86, 90, 120}) {
    for (KernelChoice choice : {KernelChoice::kAuto, KernelChoice::kPortable}) {
      for (int head_dim : {64, 128, 256}) {
        const KernelPlan plan = plan_backward({1, 16, 16, 1, 1, head_dim}, compute_capability, true, choice);
        CHECK(plan.tile_m >= chunkattn::cuda::kBackwardSmallestTileM &&
                  plan.tile_m <= chunkattn::cuda::kBackwardLargestTileM,
              "head_dim ", head_dim, " tile ", plan.tile_m);
      }
    }
  }
}

// The portable backward's launcher tells by shared_memory which class of devices the plan is made for.
void test_portable_backward_classes() {
  for (int head_dim : {64, 128, 256}) {
    const auto shared_memory = [&](int compute_capability) {
      return plan_backward({1, 16, 16, 1, 1, head_dim}, compute_capability, true, KernelChoice::kPortable)
          .shared_memory;
    };
    for (int compute_capability : {80, 86, 87, 89, 90, 100, 120}) {
      const bool small = compute_capability == 86 || compute_capability == 89 || compute_capability == 120;
      // Later devices run PTX for sm_80, which has no size that takes more than sm_80's shared memory.
      const bool large = head_dim == 256 && compute_capability == 90;
      CHECK((shared_memory(compute_capability) > 99 * 1024) == !small, "head_dim ", head_dim);
      CHECK((shared_memory(compute_capability) > 163 * 1024) == large, "head_dim ", head_dim);
    }
  }
}

// The Hopper backward takes every head_dim, where rows are aligned.
void test_hopper_backward() {
  for (int head_dim = 1; head_dim <= 256; ++head_dim) {
    const AttentionShape shape{1, 16, 16, 1, 1, head_dim};
    CHECK(plan_backward(shape, 90).kind == KernelChoice::kHopper, "head_dim ", head_dim);
    CHECK(plan_backward(shape, 90, false).kind == KernelChoice::kPortable, "head_dim ", head_dim);
    CHECK(plan_backward(shape, 90, true, KernelChoice::kPortable).kind == KernelChoice::kPortable, "head_dim ",
          head_dim);
  }
}

}  // namespace

int main() {
  for (int compute_capability : {80, 86, 87, 89, 90, 100, 120}) {
    for (FindPlan find_plan : {&plan_forward, &plan_backward}) {
      test_every_head_dim(find_plan, KernelChoice::kAuto, compute_capability);
      test_every_head_dim(find_plan, KernelChoice::kPortable, compute_capability);
    }
  }
  test_workspaces();
  test_tile_bounds();
  test_portable_backward_classes();
  test_hopper_backward();
  return chunkattn::test::report();
}
