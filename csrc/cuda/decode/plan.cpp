#include "cuda/decode/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/common/carver.h"
#include "cuda/decode/tile_sizes.h"

namespace chunkattn::cuda {

namespace {

// Fewer keys are not worth a thread block of their own.
constexpr int kMinKeys = 128;

// What the runtime takes of a thread block's share of shared memory, and static arrays.
constexpr int kReservedSharedMemory = 2048;

constexpr int kMaxBlocksPerMultiprocessor = 2;

// A thread block rotates queries and writes output in about the time in which it reads so many keys.
constexpr int kPieceKeys = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kHeadDim, bool kFloat8, bool kManyRows>
DecodePlan plan_tiles() {
  using Sizes = DecodeSizes<kHeadDim, kFloat8, kManyRows>;
  DecodePlan plan{};
  plan.name = "decode_sm80";
  plan.many_rows = kManyRows;
  plan.tile_rows = Sizes::kTileM;
  plan.tile_keys = Sizes::kTileN;
  plan.warps = Sizes::kWarps;
  plan.head_dim_padded = kHeadDim;
  plan.shared_memory = Sizes::kSharedBytes;
  return plan;
}

template <int kHeadDim>
DecodePlan plan_tiles(bool float8, bool many_rows) {
  if (float8) return many_rows ? plan_tiles<kHeadDim, true, true>() : plan_tiles<kHeadDim, true, false>();
  return many_rows ? plan_tiles<kHeadDim, false, true>() : plan_tiles<kHeadDim, false, false>();
}

DecodePlan plan_tiles(int head_dim, bool float8, bool many_rows) {
  if (head_dim <= 64) return plan_tiles<64>(float8, many_rows);
  if (head_dim <= 128) return plan_tiles<128>(float8, many_rows);
  if (head_dim <= 256) return plan_tiles<256>(float8, many_rows);
  throw std::invalid_argument("head_dim must be at most 256, got " + std::to_string(head_dim));
}

void choose_groups(const DecodeParams& params, const DecodeDevice& device, DecodePlan& plan) {
  const int64_t capacity_tiles = std::max<int64_t>(ceil_div(params.cache.capacity, plan.tile_keys), 1);
  plan.min_tiles = std::max(kMinKeys / plan.tile_keys, 1);
  plan.piece_cost = std::max(kPieceKeys / plan.tile_keys, 1);
  const int per_multiprocessor =
      std::clamp(device.shared_memory / static_cast<int>(plan.shared_memory + kReservedSharedMemory), 1,
                 kMaxBlocksPerMultiprocessor);
  const int64_t slots = static_cast<int64_t>(device.multiprocessors) * per_multiprocessor;
  if (params.num_splits > 0) {
    plan.splits = static_cast<int>(std::min<int64_t>({params.num_splits, kMaxDecodeGroups, capacity_tiles}));
  } else if (plan.planes >= slots || capacity_tiles <= 2 * plan.min_tiles) {
    plan.splits = 1;
  }
  if (plan.splits > 0) {
    plan.groups = params.batch * plan.splits;
    return;
  }
  const int64_t most = std::min<int64_t>(ceil_div(params.batch * capacity_tiles, plan.min_tiles), kMaxDecodeGroups);
  plan.groups = static_cast<int>(std::clamp<int64_t>(slots / plan.planes, 1, most));
}

// As many as a sequence has groups, when all are of one length.
int combine_warps(const DecodeParams& params, const DecodePlan& plan) {
  if (plan.splits == 1 || plan.groups <= 1) return 0;
  return std::clamp(plan.groups / params.batch, 1, kMostCombineWarps);
}

}  // namespace

DecodePlan plan_decode(const DecodeParams& params, const DecodeDevice& device) {
  const int rows = params.seqlen_q * (params.heads / params.kv_heads);
  DecodePlan plan = plan_tiles(params.head_dim, params.cache.float8, rows > kDecodeWarpRows);
  plan.rows = rows;
  plan.row_tiles = static_cast<int>(ceil_div(rows, plan.tile_rows));
  plan.planes = plan.row_tiles * params.kv_heads;
  plan.fused_append = plan.row_tiles == 1;
  if (plan.planes > 0) choose_groups(params, device, plan);
  plan.combine_warps = combine_warps(params, plan);
  return plan;
}

DecodeWorkspace lay_out_workspace(const DecodeParams& params, const DecodePlan& plan, void* memory, size_t* bytes) {
  const int64_t rows = plan.combine_warps > 0 ? 2 * plan.blocks() * plan.tile_rows : 0;
  const int64_t sequences = plan.combine_warps > 0 ? int64_t{2} * plan.row_tiles * params.batch : 0;
  Carver carver(memory);
  DecodeWorkspace workspace{};
  workspace.out = carver.take<float>(rows * plan.head_dim_padded);
  workspace.states = carver.take<float>(rows * 2);
  workspace.groups = carver.take<int>(sequences);
  workspace.tile_counter = carver.take<int>(1);
  *bytes = carver.used();
  return workspace;
}

}  // namespace chunkattn::cuda
