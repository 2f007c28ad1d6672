// Every element of every row has a place of its own, within the planes, and a warp's additions are contiguous.
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/backward/gradient_pieces.h"

namespace {

using chunkattn::cuda::GradientPieces;

int64_t place(const GradientPieces& pieces, int64_t plane, int row, int column) {
  return pieces.offset(plane, row) + column / GradientPieces::kColumns * GradientPieces::kElements +
         column % GradientPieces::kColumns;
}

void test_places(const GradientPieces& pieces) {
  constexpr int kPlanes = 3;
  std::vector<bool> taken(kPlanes * pieces.plane());
  for (int plane = 0; plane < kPlanes; ++plane) {
    for (int row = 0; row < pieces.rows; ++row) {
      for (int column = 0; column < pieces.head_dim; ++column) {
        const int64_t index = place(pieces, plane, row, column);
        const bool inside = index >= plane * pieces.plane() && index < (plane + 1) * pieces.plane();
        CHECK(inside, "row ", row, " column ", column, " at ", index);
        if (!inside) continue;
        CHECK(!taken[index], "row ", row, " column ", column, " at ", index, " where another is");
        taken[index] = true;
      }
    }
  }
}

// Rows kRows further on are pitch() further on, wherever a tile begins; a piece's elements follow each other.
void test_steps(const GradientPieces& pieces) {
  for (int row = 0; row + GradientPieces::kRows < pieces.rows; ++row) {
    CHECK(pieces.offset(1, row + GradientPieces::kRows) - pieces.offset(1, row) == pieces.pitch(), "row ", row);
  }
  for (int i = 0; i < GradientPieces::kElements && i / GradientPieces::kColumns < pieces.rows; ++i) {
    CHECK(place(pieces, 2, i / GradientPieces::kColumns, i % GradientPieces::kColumns) == 2 * pieces.plane() + i,
          "element ", i);
  }
}

}  // namespace

int main() {
  for (int rows : {1, 7, 8, 9, 64, 100}) {
    for (int head_dim : {1, 33, 64, 72, 90, 128}) {
      test_places({rows, head_dim});
      test_steps({rows, head_dim});
    }
  }
  return chunkattn::test::report();
}
