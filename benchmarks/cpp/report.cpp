#include "report.h"

#include <algorithm>
#include <cstdio>
#include <sstream>

#include "statistics.h"

namespace chunkattn::bench {

namespace {

using Cells = std::vector<std::string>;

std::string number(double value, int digits) {
  char text[32];
  std::snprintf(text, sizeof(text), "%#.*g", digits, value);
  std::string shown = text;
  if (shown.ends_with('.')) shown.pop_back();
  return shown;
}

// Numbers are aligned to the right.
std::string table_text(const std::vector<Cells>& lines, size_t first_number, size_t last_number) {
  std::vector<size_t> widths(lines[0].size());
  for (const Cells& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  std::string text;
  for (const Cells& line : lines) {
    std::string shown;
    for (size_t i = 0; i < line.size(); ++i) {
      const std::string padding(widths[i] - line[i].size(), ' ');
      const bool is_number = first_number <= i && i <= last_number;
      shown += (i == 0 ? "" : "  ") + (is_number ? padding + line[i] : line[i] + padding);
    }
    text += shown.substr(0, shown.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

std::string device_lines(const Devices& devices) {
  const std::string gpu = devices.cuda != nullptr ? devices.cuda->description() : "none: " + devices.no_cuda;
  return "CPU: " + devices.cpu->description() + "\nGPU: " + gpu + "\n";
}

std::string problem_text(const Problem& problem) {
  const AttentionShape& shape = problem.shape;
  std::ostringstream text;
  text << "batch " << shape.batch << ", heads " << shape.heads << "/" << shape.kv_heads << ", " << shape.seqlen_q
       << " queries, " << shape.seqlen_k << " keys, head_dim " << shape.head_dim << ", " << short_name(problem.dtype)
       << ", chunk " << problem.geometry.chunk_size << ", local " << problem.geometry.local_size << "\n";
  return text.str();
}

std::string ceiling_lines(const Results& results) {
  std::string text;
  for (const auto& [place, ceilings] : results.ceilings) {
    text += place == Place::kCpu ? "CPU ceilings: " : "GPU ceilings: ";
    text += ceilings.matmul_tflops > 0 ? number(ceilings.matmul_tflops, 4) + " TFLOP/s (" + ceilings.matmul + "), "
                                       : "matrix product not measured (" + ceilings.matmul + "), ";
    text += number(ceilings.copy_gbps, 4) + " GB/s (" + ceilings.copy + ", read and written)\n";
  }
  return text;
}

Cells table_line(const Measurement& measurement, const Report& report) {
  const Summary summary = summarize(measurement, report);
  return {measurement.kernel->name,
          number(summary.median, 4),
          number(summary.percentile_10, 4),
          number(summary.percentile_90, 4),
          std::to_string(measurement.milliseconds.size()),
          number(summary.rate, 4) + (summary.is_copy ? " GB/s" : " TFLOP/s"),
          summary.ceiling > 0 ? number(100 * summary.rate / summary.ceiling, 3) + "%" : "not measured"};
}

std::string check_line(const Measurement& measurement) {
  std::string text = std::string("check of ") + measurement.kernel->name;
  text += measurement.passed() ? ": passed" : ": FAILED";
  for (const Comparison& comparison : measurement.comparisons) {
    text += "; " + comparison.tensor + " " + number(comparison.error, 2) + (comparison.passed() ? " <= " : " > ") +
            number(comparison.tolerance, 2);
  }
  return text + " (" + std::to_string(measurement.comparisons[0].rows) + " rows of " +
         measurement.comparisons[0].tensor + ")\n";
}

}  // namespace

Summary summarize(const Measurement& measurement, const Report& report) {
  const Problem& problem = report.selection.problem;
  const Ceilings& ceilings = report.results.ceilings.at(measurement.kernel->place);
  const std::vector<double>& samples = measurement.milliseconds;
  Summary summary{median(samples), quantile(samples, 0.1), quantile(samples, 0.9), 0, false, ceilings.matmul_tflops};
  if (measurement.kernel->pass == Pass::kRotateKeys) {
    const double elements = static_cast<double>(problem.shape.batch) * problem.shape.seqlen_k * problem.shape.kv_heads *
                            problem.shape.head_dim;
    summary.rate = 2 * elements * static_cast<double>(element_bytes(problem.dtype)) / summary.median / 1e6;
    summary.is_copy = true;
    summary.ceiling = ceilings.copy_gbps;
  } else {
    const bool is_backward = measurement.kernel->pass == Pass::kBackward;
    summary.rate = (is_backward ? problem.backward_flops() : problem.forward_flops()) / summary.median / 1e9;
  }
  return summary;
}

std::string list_text(const Devices& devices) {
  std::vector<Cells> lines = {{"kernel", "pass", "dtypes", "head dims", "runs here"}};
  for (const Kernel& kernel : all_kernels()) {
    const std::string reason = unavailable_reason(kernel, devices);
    lines.push_back({kernel.name, pass_name(kernel.pass), dtype_names(kernel, " "), kernel.head_dims,
                     reason.empty() ? "yes" : "no: " + reason});
  }
  return table_text(lines, 1, 0) + "\n" + device_lines(devices);
}

std::string report_text(const Report& report) {
  std::string text =
      device_lines(report.devices) + ceiling_lines(report.results) + problem_text(report.selection.problem) + "\n";
  std::vector<Cells> lines = {{"kernel", "median ms", "p10", "p90", "calls", "rate", "of ceiling"}};
  for (const Measurement& measurement : report.results.measurements) {
    if (!measurement.milliseconds.empty()) lines.push_back(table_line(measurement, report));
  }
  text += table_text(lines, 1, lines[0].size() - 1) + "\n";
  for (const Measurement& measurement : report.results.measurements) {
    if (!measurement.comparisons.empty()) text += check_line(measurement);
    if (measurement.failure.empty()) continue;
    text += std::string(measurement.kernel->name) + " failed: " + measurement.failure + "\n";
  }
  for (const auto& [name, reason] : report.selection.absent) text += "not run: " + name + ": " + reason + "\n";
  return text;
}

}  // namespace chunkattn::bench
