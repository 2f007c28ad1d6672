#include "cuda/forward/plan.h"

#include <stdexcept>
#include <string>

#include "cuda/forward/tile_sizes.h"

namespace chunkattn::cuda {

namespace {

constexpr size_t kElementBytes = 2;

template <int kHeadDim>
KernelPlan plan_portable() {
  using Tile = ForwardSm80Tile<kHeadDim>;
  const size_t rows = Tile::kTileM + 2 * Tile::kTileN;
  return {"forward_sm80", KernelChoice::kPortable,        Tile::kTileM, Tile::kTileN, Tile::kWarps, 1,
          kHeadDim,       rows * kHeadDim * kElementBytes};
}

template <int kHeadDim>
KernelPlan plan_hopper() {
  using Tile = ForwardSm90Tile<kHeadDim>;
  const size_t rows = Tile::kQueryStages * Tile::kTileM + 2 * Tile::kStages * Tile::kTileN;
  return {"forward_sm90", KernelChoice::kHopper,          Tile::kTileM,
          Tile::kTileN,   4 * (Tile::kConsumers + 1),     Tile::kStages,
          kHeadDim,       rows * kHeadDim * kElementBytes};
}

template <int kHeadDim>
KernelPlan plan_for_head_dim(KernelChoice kind) {
  return kind == KernelChoice::kHopper ? plan_hopper<kHeadDim>() : plan_portable<kHeadDim>();
}

}  // namespace

KernelPlan plan_forward(const AttentionShape& shape, int compute_capability, bool aligned, KernelChoice choice) {
  // wgmma is a feature of 9.0 alone: later architectures took it out again.
  const bool hopper = compute_capability == 90 && aligned;
  if (choice == KernelChoice::kHopper && !hopper) {
    throw std::invalid_argument(
        "the hopper kernel needs compute capability 9.0 and rows that start on multiples of 16 bytes, of k and v, and "
        "in "
        "select_merge of q, with a region_size that is a multiple of 8");
  }
  const KernelChoice kind =
      hopper && choice != KernelChoice::kPortable ? KernelChoice::kHopper : KernelChoice::kPortable;
  if (shape.head_dim <= 64) return plan_for_head_dim<64>(kind);
  if (shape.head_dim <= 128) return plan_for_head_dim<128>(kind);
  if (shape.head_dim <= 256) return plan_for_head_dim<256>(kind);
  throw std::invalid_argument("head_dim must be at most 256, got " + std::to_string(shape.head_dim));
}

}  // namespace chunkattn::cuda
