// The float64 reference: its forward pass where the answer is plain, and its gradients against differences.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "check.h"
#include "reference.h"

namespace {

using namespace chunkattn::bench;

// Three chunks of 5, so that every regime occurs; queries that begin inside a chunk.
constexpr Problem kProblem = {{2, 9, 14, 4, 2, 6}, {7, 2}, chunkattn::DataType::kFloat64};

double& element(HostTensor& tensor, int64_t row, int64_t column) {
  return reinterpret_cast<double*>(tensor.data.data())[row * tensor.width + column];
}

int kv_head_of(int head) { return head / (kProblem.shape.heads / kProblem.shape.kv_heads); }

ReferenceForward forward(const Inputs& inputs, int batch, int query, int head) {
  return reference_forward(inputs, reference_keys(inputs, batch, kv_head_of(head)), batch, query, head);
}

// Queries of zeros see all their keys alike.
void test_mean_of_values() {
  Inputs inputs = make_inputs(kProblem, false);
  std::memset(inputs.q.data.data(), 0, inputs.q.bytes());
  for (int query = 0; query < kProblem.shape.seqlen_q; ++query) {
    const int keys = kProblem.first_position() + query + 1;
    const ReferenceForward row = forward(inputs, 1, query, 3);
    CHECK(std::abs(row.softmax_lse - std::log(keys)) < 1e-14, "query ", query, " lse ", row.softmax_lse);
    for (int d = 0; d < kProblem.shape.head_dim; ++d) {
      double mean = 0;
      for (int key = 0; key < keys; ++key) mean += element(inputs.v, kProblem.key_row(1, key, 1), d) / keys;
      CHECK(std::abs(row.out.values[d] - mean) < 1e-14, "query ", query, " d ", d);
    }
  }
}

// The logit of a lone key is scale * <R(row_q) q, R(row_k) k>: rows as the paper has them, by its own arithmetic.
void test_rows() {
  const Inputs inputs = make_inputs(kProblem, false);
  const int stride = 5, chunk_size = 7;
  for (int query = 0; query < kProblem.shape.seqlen_q; ++query) {
    const int i = kProblem.first_position() + query;
    double sum = 0;
    for (int j = 0; j <= i; ++j) {
      const int distance = i / stride - j / stride;
      const int row_q = distance == 0   ? i % stride
                        : distance == 1 ? std::min(i % stride + stride, chunk_size)
                                        : std::min(2 * stride - 1, chunk_size);
      double logit = 0;
      for (int d = 0; d < 3; ++d) {
        const auto pair = [&](const HostTensor& tensor, int64_t row) {
          double x[6];
          tensor.read_row(row, x);
          return std::pair(x[d], x[d + 3]);
        };
        const auto [q0, q1] = pair(inputs.q, kProblem.query_row(0, query, 0));
        const auto [k0, k1] = pair(inputs.k, kProblem.key_row(0, j, 0));
        const double angle = (row_q - j % stride) * std::pow(10000.0, -d / 3.0);
        logit += std::cos(angle) * (q0 * k0 + q1 * k1) + std::sin(angle) * (q0 * k1 - q1 * k0);
      }
      sum += std::exp(logit / std::sqrt(6.0));
    }
    const double lse = forward(inputs, 0, query, 0).softmax_lse;
    CHECK(std::abs(lse - std::log(sum)) < 1e-6, "query ", query, " lse ", lse, ", not ", std::log(sum));
  }
}

double loss(const Inputs& inputs) {
  double sum = 0;
  for (int batch = 0; batch < kProblem.shape.batch; ++batch) {
    for (int head = 0; head < kProblem.shape.heads; ++head) {
      const ReferenceKeys keys = reference_keys(inputs, batch, kv_head_of(head));
      for (int query = 0; query < kProblem.shape.seqlen_q; ++query) {
        const ReferenceForward row = reference_forward(inputs, keys, batch, query, head);
        double dout[6];
        inputs.dout.read_row(kProblem.query_row(batch, query, head), dout);
        for (int d = 0; d < 6; ++d) sum += dout[d] * row.out.values[d];
      }
    }
  }
  return sum;
}

void test_gradients() {
  Inputs inputs = make_inputs(kProblem, true);
  const ReferenceGradients gradients = reference_backward(inputs);
  const auto compare = [&](const char* name, HostTensor& tensor, const std::vector<ReferenceRow>& gradient) {
    constexpr double kStep = 1e-4;
    for (int64_t row = 0; row < tensor.rows; row += 7) {
      const int64_t d = row % tensor.width;
      double& x = element(tensor, row, d);
      const double kept = x;
      x = kept + kStep;
      const double above = loss(inputs);
      x = kept - kStep;
      const double below = loss(inputs);
      x = kept;
      const double difference = (above - below) / (2 * kStep);
      CHECK(std::abs(gradient[row].values[d] - difference) < 1e-6, name, " row ", row, " d ", d, ": ",
            gradient[row].values[d], ", not ", difference);
    }
  };
  compare("dq", inputs.q, gradients.dq);
  compare("dk", inputs.k, gradients.dk);
  compare("dv", inputs.v, gradients.dv);
}

}  // namespace

int main() {
  test_mean_of_values();
  test_rows();
  test_gradients();
  return chunkattn::test::report();
}
