// Checks and times the selected kernels.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "comparison.h"
#include "device.h"
#include "selection.h"

namespace chunkattn::bench {

struct Measurement {
  const Kernel* kernel;
  std::vector<double> milliseconds;     // of every call
  std::vector<Comparison> comparisons;  // empty without a check
  std::string failure;                  // what went wrong; empty when nothing did

  bool passed() const;
};

struct Results {
  std::vector<Measurement> measurements;
  std::map<Place, Ceilings> ceilings;  // of the devices that were used

  bool passed() const;
};

Results measure(const Selection& selection, const Devices& devices, int rounds, bool check);

}  // namespace chunkattn::bench
