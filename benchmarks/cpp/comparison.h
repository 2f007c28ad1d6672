// Comparison of what a kernel wrote with the float64 reference.
//
// The error of a row is the length of its difference from the reference, over ReferenceRow::scale; that of a tensor is
// the largest of its rows. Allowed are 2 epsilon in 16 bits, and 8 + sqrt(terms of a sum) in 32 and 64. softmax_lse is
// compared element by element, by the difference over max(1, |reference|); it is float32 at best.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "reference.h"
#include "registry.h"
#include "workspace.h"

namespace chunkattn::bench {

struct Comparison {
  std::string tensor;
  double tolerance = 0;
  double error = 0;           // infinite where the tensor holds a NaN
  double max_difference = 0;  // of elements
  int64_t rows = 0;           // compared

  void add(const double* actual, const std::vector<double>& reference, double scale);
  void merge(const Comparison& other);  // of other rows of the same tensor
  bool passed() const { return rows > 0 && error <= tolerance; }
};

// The FLOPs of a forward pass whose rows the reference computes in seconds. Of a larger problem, a forward check looks
// at random queries; a backward check needs every one.
constexpr double kReferenceFlops = 0x1p33;

// Runs the kernel, all of its outputs poisoned before, and compares them.
std::vector<Comparison> check_kernel(const Kernel& kernel, Workspace& workspace, const Inputs& inputs);

}  // namespace chunkattn::bench
