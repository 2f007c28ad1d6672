#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "json.h"
#include "report.h"
#include "source_tree.h"
#include "thread_pool.h"

namespace chunkattn::bench {

namespace {

std::string utc_time() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S+00:00", &parts);
  return text;
}

std::string ceilings_json(const Report& report, Place place) {
  const auto found = report.results.ceilings.find(place);
  if (found == report.results.ceilings.end()) return "null";
  const Ceilings& ceilings = found->second;
  return json_object({{"matmul_tflops", ceilings.matmul_tflops > 0 ? json_number(ceilings.matmul_tflops) : "null"},
                      {"matmul", json_string(ceilings.matmul)},
                      {"copy_gbps", json_number(ceilings.copy_gbps)},
                      {"copy", json_string(ceilings.copy)}});
}

std::string header_json(const Report& report) {
  const Device* const cuda = report.devices.cuda.get();
  const SourceTree tree = find_source_tree();
  const bool uses_cuda = report.selection.uses(Place::kCuda);
  const bool uses_cpu = report.selection.uses(Place::kCpu);
  return json_object({{"benchmark", json_string("chunkattn_bench")},
                      {"date", json_string(utc_time())},
                      {"gpu", uses_cuda ? json_string(cuda->name()) : "null"},
                      {"driver", uses_cuda ? json_string_or_null(driver_version()) : "null"},
                      {"cpu", json_string(report.devices.cpu->name())},
                      {"threads", json_number(thread_count())},
                      {"torch", "null"},
                      {"cuda", uses_cuda ? json_string(cuda->runtime_version()) : "null"},
                      {"chunkattn", json_string(CHUNKATTN_VERSION)},
                      {"git_tree", json_string_or_null(tree.hash)},
                      {"dirty", tree.hash.empty() ? "null" : json_bool(tree.dirty)},
                      {"ceilings", ceilings_json(report, uses_cuda ? Place::kCuda : Place::kCpu)},
                      {"cpu_ceilings", uses_cuda && uses_cpu ? ceilings_json(report, Place::kCpu) : "null"},
                      {"rounds", json_number(report.rounds)}});
}

std::string row_json(const Measurement& measurement, const Report& report) {
  const Problem& problem = report.selection.problem;
  const AttentionShape& shape = problem.shape;
  const Summary summary = summarize(measurement, report);
  std::vector<std::string> checks;
  double max_error = 0;
  for (const Comparison& comparison : measurement.comparisons) {
    max_error = std::max(max_error, comparison.max_difference);
    checks.push_back(json_object({{"tensor", json_string(comparison.tensor)},
                                  {"error", json_number(comparison.error)},
                                  {"tolerance", json_number(comparison.tolerance)},
                                  {"rows", json_number(static_cast<double>(comparison.rows))},
                                  {"passed", json_bool(comparison.passed())}}));
  }
  return json_object({{"impl", json_string(measurement.kernel->name)},
                      {"pass", json_string(pass_name(measurement.kernel->pass))},
                      {"batch", json_number(shape.batch)},
                      {"heads", json_number(shape.heads)},
                      {"kv_heads", json_number(shape.kv_heads)},
                      {"seq_q", json_number(shape.seqlen_q)},
                      {"seq_k", json_number(shape.seqlen_k)},
                      {"head_dim", json_number(shape.head_dim)},
                      {"dtype", json_string(torch_name(problem.dtype))},
                      {"chunk_size", json_number(problem.geometry.chunk_size)},
                      {"local_size", json_number(problem.geometry.local_size)},
                      {"ms", json_number(summary.median)},
                      {"ms_spread", json_number(summary.percentile_90 - summary.percentile_10)},
                      {"ms_p10", json_number(summary.percentile_10)},
                      {"ms_p90", json_number(summary.percentile_90)},
                      {"calls", json_number(static_cast<double>(measurement.milliseconds.size()))},
                      {summary.is_copy ? "gbps" : "tflops", json_number(summary.rate)},
                      {"of_ceiling", summary.ceiling > 0 ? json_number(summary.rate / summary.ceiling) : "null"},
                      {"max_error", checks.empty() ? "null" : json_number(max_error)},
                      {"checks", json_array(checks)}});
}

std::string result_json(const Report& report) {
  std::ostringstream shape;
  std::vector<std::string> rows, failed;
  for (const Measurement& measurement : report.results.measurements) {
    if (!measurement.milliseconds.empty()) rows.push_back(row_json(measurement, report));
    if (measurement.passed()) continue;
    const AttentionShape& at = report.selection.problem.shape;
    shape.str("");
    shape << "b" << at.batch << "-s" << at.seqlen_q << "/" << at.seqlen_k << "-h" << at.heads << "/" << at.kv_heads
          << "-d" << at.head_dim;
    const std::string error = measurement.failure.empty() ? "differs from the reference" : measurement.failure;
    failed.push_back(json_object({{"impl", json_string(measurement.kernel->name)},
                                  {"shape", json_string(shape.str())},
                                  {"error", json_string(error)}}));
  }
  std::vector<std::pair<std::string, std::string>> absent;
  for (const auto& [name, reason] : report.selection.absent) absent.emplace_back(name, json_string(reason));
  // One line per row, so that a diff reads like a table.
  return "{\"header\": " + header_json(report) + ",\n\"rows\": " + json_array(rows, ",\n  ") +
         ",\n\"absent\": " + json_object(absent) + ",\n\"failed\": " + json_array(failed, ",\n  ") + "}\n";
}

}  // namespace

void write_result_file(const Report& report, const std::string& path) {
  const std::string part = path + ".part";
  std::ofstream file(part, std::ios::binary);
  file << result_json(report);
  file.close();
  if (!file || std::rename(part.c_str(), path.c_str()) != 0) {
    std::remove(part.c_str());
    throw std::runtime_error("--json got '" + path + "', which cannot be written.");
  }
}

}  // namespace chunkattn::bench
