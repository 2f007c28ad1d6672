// Quantiles of measured times.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace chunkattn::bench {

// The sample at this share of the sorted samples, the nearest one; of no samples, NaN.
inline double quantile(std::vector<double> samples, double share) {
  if (samples.empty()) return std::nan("");
  std::sort(samples.begin(), samples.end());
  return samples[static_cast<size_t>(std::lround(share * static_cast<double>(samples.size() - 1)))];
}

inline double median(const std::vector<double>& samples) { return quantile(samples, 0.5); }

}  // namespace chunkattn::bench
