// Every element of every row has a place of its own, within the planes, and eight columns have theirs among eight: the
// even ones, then the odd ones.
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/backward/gradient_pieces.h"
#include "cuda/backward/gradient_rows.h"

namespace {

using chunkattn::cuda::GradientPieces;
using chunkattn::cuda::GradientRows;

void test_places(const GradientRows& gradients) {
  constexpr int kPlanes = 3;
  const int64_t plane_size = gradients.offset(1, 0);
  std::vector<bool> taken(kPlanes * plane_size);
  for (int plane = 0; plane < kPlanes; ++plane) {
    for (int row = 0; row < gradients.rows; ++row) {
      for (int column = 0; column < gradients.head_dim; ++column) {
        const int64_t index = gradients.offset(plane, row) + GradientRows::place(column);
        const bool inside = index >= plane * plane_size && index < (plane + 1) * plane_size;
        CHECK(inside, "row ", row, " column ", column, " at ", index);
        if (!inside) continue;
        CHECK(!taken[index], "row ", row, " column ", column, " at ", index, " where another is");
        taken[index] = true;
      }
    }
  }
  // The workspace is made before the kernel is chosen, with room for GradientPieces.
  const GradientPieces pieces{gradients.rows, gradients.head_dim};
  CHECK(plane_size <= pieces.plane(), "rows take ", plane_size, ", pieces ", pieces.plane());
}

void test_order() {
  constexpr int kPlaces[] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (int column = 0; column < 32; ++column) {
    const int place = GradientRows::place(column);
    CHECK(place == column / 8 * 8 + kPlaces[column % 8], "column ", column, " at ", place);
  }
}

}  // namespace

int main() {
  test_order();
  for (int rows : {1, 7, 8, 9, 64, 100}) {
    for (int head_dim : {8, 64, 72, 104, 128}) test_places({rows, head_dim});
  }
  return chunkattn::test::report();
}
