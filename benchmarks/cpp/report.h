// What is printed, and the result file.
#pragma once

#include <string>

#include "measure.h"

namespace chunkattn::bench {

struct Report {
  const Selection& selection;
  const Devices& devices;
  const Results& results;
  int rounds;
};

// Times of a kernel in milliseconds, and its rate.
struct Summary {
  double median;
  double percentile_10;
  double percentile_90;
  double rate;
  bool is_copy;    // the rate is in GB/s read and written, else in TFLOP/s of the causal attention's FLOPs
  double ceiling;  // in the same unit; 0: not measured
};

Summary summarize(const Measurement& measurement, const Report& report);

std::string list_text(const Devices& devices);
std::string report_text(const Report& report);

// Writes the result file whole or not at all. Throws std::runtime_error with the path. It has the form of the Python
// benchmarks' (benchmarks/common.py): header, rows, absent, failed; rows also hold percentiles, the number of calls and
// what a check compared.
void write_result_file(const Report& report, const std::string& path);

}  // namespace chunkattn::bench
