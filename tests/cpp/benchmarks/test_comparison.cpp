// When a check passes: what a kernel wrote against the reference, row by row.
#include <cmath>

#include "check.h"
#include "comparison.h"

namespace {

using chunkattn::bench::Comparison;

Comparison compare(const std::vector<double>& actual, const std::vector<double>& reference, double scale) {
  Comparison comparison{"out", 1e-2};
  comparison.add(actual.data(), reference, scale);
  return comparison;
}

}  // namespace

int main() {
  CHECK(compare({3, 4}, {3, 4}, 5).passed());
  CHECK(compare({3, 4}, {3, 4}, 5).error == 0);
  CHECK(compare({3, 4.04}, {3, 4}, 5).passed());
  CHECK(!compare({3, 4.06}, {3, 4}, 5).passed());
  CHECK(!compare({3, std::nan("")}, {3, 4}, 5).passed());
  CHECK(!compare({3, INFINITY}, {3, 4}, 5).passed());
  CHECK(compare({0, 0}, {0, 0}, 0).passed());
  CHECK(!compare({0, 1e-9}, {0, 0}, 0).passed());
  CHECK(!Comparison({"out", 1e-2}).passed());  // nothing was compared

  Comparison all = compare({1, 1}, {1, 1}, 1);
  all.merge(compare({1, 2}, {1, 1}, 1));
  CHECK(!all.passed() && all.rows == 2 && all.max_difference == 1, "rows ", all.rows);
  all = compare({std::nan(""), 1}, {1, 1}, 1);
  all.merge(compare({1, 1}, {1, 1}, 1));
  CHECK(!all.passed(), "a NaN before a good row");
  return chunkattn::test::report();
}
