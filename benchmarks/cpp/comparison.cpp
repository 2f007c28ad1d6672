#include "comparison.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <random>
#include <tuple>

#include "thread_pool.h"

namespace chunkattn::bench {

namespace {

// In 16 bits one rounding each of q, k, p and the output decides; sums are wider. In 32 and 64 bits the sums decide: a
// running sum of n terms is off by about sqrt(n) roundings.
double tolerance_of(const Problem& problem, DataType dtype) {
  if (element_bytes(dtype) == 2) return 2 * epsilon(dtype);
  const AttentionShape& shape = problem.shape;
  const double queries_of_a_key = static_cast<double>(shape.seqlen_q) * shape.heads / shape.kv_heads;
  return (8 + std::sqrt(std::max<double>(shape.seqlen_k, queries_of_a_key))) * epsilon(dtype);
}

double tolerance_of(const Problem& problem) { return tolerance_of(problem, problem.dtype); }

// It is float32 in every dtype.
double softmax_lse_tolerance(const Problem& problem) {
  return std::max(tolerance_of(problem), tolerance_of(problem, DataType::kFloat32));
}

void compare_row(Comparison& comparison, const HostTensor& actual, int64_t row, const ReferenceRow& reference) {
  std::vector<double> values(actual.width);
  actual.read_row(row, values.data());
  comparison.add(values.data(), reference.values, reference.scale);
}

struct QueryIndex {
  int kv_plane;  // batch * kv_heads + kv_head
  int head;
  int query;
};

// Every query of every head, or as many random ones as the budget allows, the first and the last among them. Sorted by
// KV head.
std::vector<QueryIndex> choose_queries(const Problem& problem) {
  const AttentionShape& shape = problem.shape;
  const int group = shape.heads / shape.kv_heads;
  const int64_t all = static_cast<int64_t>(shape.batch) * shape.heads * shape.seqlen_q;
  const auto query_at = [&](int64_t index) -> QueryIndex {
    const int64_t plane = index / shape.seqlen_q;
    const int head = static_cast<int>(plane % shape.heads);
    return {static_cast<int>(plane / shape.heads) * shape.kv_heads + head / group, head,
            static_cast<int>(index % shape.seqlen_q)};
  };
  std::vector<QueryIndex> queries;
  const double flops = problem.forward_flops();
  if (flops <= kReferenceFlops) {
    for (int64_t index = 0; index < all; ++index) queries.push_back(query_at(index));
    return queries;
  }
  const auto count = std::max<int64_t>(static_cast<int64_t>(kReferenceFlops / flops * static_cast<double>(all)), 16);
  std::mt19937_64 random(1);
  std::uniform_int_distribution<int64_t> any(0, all - 1);
  queries = {query_at(0), query_at(all - 1)};
  for (int64_t i = 2; i < count; ++i) queries.push_back(query_at(any(random)));
  std::sort(queries.begin(), queries.end(),
            [](const QueryIndex& a, const QueryIndex& b) { return a.kv_plane < b.kv_plane; });
  return queries;
}

std::vector<Comparison> compare_forward(const Workspace& workspace, const Inputs& inputs) {
  const Problem& problem = inputs.problem;
  const HostTensor out = workspace.download(Output::kOut);
  const HostTensor softmax_lse = workspace.download(Output::kSoftmaxLse);
  const std::vector<QueryIndex> queries = choose_queries(problem);
  const Comparison no_out{"out", tolerance_of(problem)};
  const Comparison no_lse{"softmax_lse", softmax_lse_tolerance(problem)};
  Comparison all_out = no_out, all_lse = no_lse;
  std::mutex mutex;
  const auto compare_range = [&](int64_t begin, int64_t end) {
    Comparison part_out = no_out, part_lse = no_lse;
    ReferenceKeys keys;
    for (int64_t i = begin; i < end; ++i) {
      const QueryIndex& index = queries[i];
      const int batch = index.kv_plane / problem.shape.kv_heads;
      if (i == begin || index.kv_plane != queries[i - 1].kv_plane) {
        keys = reference_keys(inputs, batch, index.kv_plane % problem.shape.kv_heads);
      }
      const ReferenceForward row = reference_forward(inputs, keys, batch, index.query, index.head);
      compare_row(part_out, out, problem.query_row(batch, index.query, index.head), row.out);
      compare_row(part_lse, softmax_lse, problem.lse_row(batch, index.query, index.head),
                  {{row.softmax_lse}, std::max(1.0, std::abs(row.softmax_lse))});
    }
    const std::lock_guard<std::mutex> lock(mutex);
    all_out.merge(part_out);
    all_lse.merge(part_lse);
  };
  const auto count = static_cast<int64_t>(queries.size());
  const int64_t parts = std::min<int64_t>(thread_count(), count);
  parallel_blocks(parts, [&](int64_t part) { compare_range(count * part / parts, count * (part + 1) / parts); });
  return {all_out, all_lse};
}

std::vector<Comparison> compare_backward(const Workspace& workspace, const Inputs& inputs) {
  const ReferenceGradients reference = reference_backward(inputs);
  const std::tuple<const char*, Output, const std::vector<ReferenceRow>&> gradients[] = {
      {"dq", Output::kDq, reference.dq}, {"dk", Output::kDk, reference.dk}, {"dv", Output::kDv, reference.dv}};
  std::vector<Comparison> comparisons;
  for (const auto& [name, output, rows] : gradients) {
    const HostTensor actual = workspace.download(output);
    Comparison comparison{name, tolerance_of(inputs.problem)};
    for (int64_t row = 0; row < actual.rows; ++row) compare_row(comparison, actual, row, rows[row]);
    comparisons.push_back(comparison);
  }
  return comparisons;
}

std::vector<Comparison> compare_rotated_keys(const Workspace& workspace, const Inputs& inputs) {
  constexpr int64_t kMostRows = 100000;
  const AttentionShape& shape = inputs.problem.shape;
  const HostTensor actual = workspace.download(Output::kRotatedKeys);
  Comparison comparison{"rotated keys", tolerance_of(inputs.problem)};
  std::mt19937_64 random(1);
  std::uniform_int_distribution<int64_t> any(0, actual.rows - 1);
  for (int64_t i = 0; i < std::min(actual.rows, kMostRows); ++i) {
    const int64_t row = actual.rows <= kMostRows ? i : any(random);
    const int64_t position = row / shape.kv_heads;
    compare_row(
        comparison, actual, row,
        reference_rotated_key(inputs, static_cast<int>(position / shape.seqlen_k),
                              static_cast<int>(position % shape.seqlen_k), static_cast<int>(row % shape.kv_heads)));
  }
  return {comparison};
}

}  // namespace

void Comparison::add(const double* actual, const std::vector<double>& reference, double scale) {
  double squares = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double difference = std::abs(actual[i] - reference[i]);
    squares += difference * difference;
    max_difference = std::max(max_difference, std::isnan(difference) ? HUGE_VAL : difference);
  }
  const double row_error = squares == 0 ? 0 : std::sqrt(squares) / scale;
  error = std::max(error, std::isnan(row_error) ? HUGE_VAL : row_error);
  ++rows;
}

void Comparison::merge(const Comparison& other) {
  error = std::max(error, other.error);
  max_difference = std::max(max_difference, other.max_difference);
  rows += other.rows;
}

std::vector<Comparison> check_kernel(const Kernel& kernel, Workspace& workspace, const Inputs& inputs) {
  for (const Output output : outputs_of(kernel.pass)) workspace.poison(output);
  prepare(kernel, workspace);
  workspace.device().run([&](void* stream) { return kernel.launch(workspace.arguments(), stream); });
  switch (kernel.pass) {
    case Pass::kForward:
      return compare_forward(workspace, inputs);
    case Pass::kBackward:
      return compare_backward(workspace, inputs);
    case Pass::kRotateKeys:
      break;
  }
  return compare_rotated_keys(workspace, inputs);
}

}  // namespace chunkattn::bench
