// The launch plans of the CUDA kernels, for every head_dim and the devices they are compiled for.
#include <stdexcept>
#include <string_view>

#include "check.h"
#include "cuda/forward/plan.h"

namespace {

using chunkattn::AttentionShape;
using chunkattn::cuda::KernelPlan;
using chunkattn::cuda::plan_forward;

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

bool refuses(const AttentionShape& shape, int compute_capability) {
  try {
    plan_forward(shape, compute_capability);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void test_every_head_dim(int compute_capability) {
  for (int head_dim = 1; head_dim <= 256; ++head_dim) {
    const AttentionShape shape{2, 1000, 1000, 8, 2, head_dim};
    const KernelPlan plan = plan_forward(shape, compute_capability);
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
  CHECK(refuses({1, 16, 16, 1, 1, 257}, compute_capability), "head_dim 257");
}

}  // namespace

int main() {
  for (int compute_capability : {80, 86, 87, 89, 90, 100, 120}) test_every_head_dim(compute_capability);
  return chunkattn::test::report();
}
