// What is run: the problem and the kernels that the options, the machine and the defaults come to.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "options.h"
#include "problem.h"
#include "registry.h"

namespace chunkattn::bench {

struct Selection {
  Problem problem;
  std::vector<const Kernel*> kernels;
  std::vector<std::pair<std::string, std::string>> absent;  // kernel and why it is not run

  bool uses(Place place) const;
  bool has_backward() const;
};

// Throws UsageError where a kernel that was asked for cannot run, or an option does not fit the others.
Selection select(const Options& options, const Devices& devices);

// The defaults, in words.
std::string defaults_text();

}  // namespace chunkattn::bench
