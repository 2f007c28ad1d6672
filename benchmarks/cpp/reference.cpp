#include "reference.h"

#include <algorithm>
#include <cmath>

#include "thread_pool.h"

namespace chunkattn::bench {

namespace {

using Vector = std::vector<double>;

constexpr Regime kRegimes[] = {Regime::kIntra, Regime::kSucc, Regime::kInter};

Vector read_row(const HostTensor& tensor, int64_t row) {
  Vector values(tensor.width);
  tensor.read_row(row, values.data());
  return values;
}

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

void add(Vector& to, double factor, const Vector& from) {
  for (size_t d = 0; d < to.size(); ++d) to[d] += factor * from[d];
}

double square(double x) { return x * x; }

// R(row) x, or R(-row) x: the pairs (d, d + rotary_dim / 2) turn by the angles of a row of the table.
Vector rotate(const Inputs& inputs, Vector x, int row, int sense) {
  const Vector cos = read_row(inputs.cos, row);
  const Vector sin = read_row(inputs.sin, row);
  const size_t pairs = cos.size();
  for (size_t d = 0; d < pairs; ++d) {
    const double first = x[d];
    const double second = x[d + pairs];
    x[d] = first * cos[d] - sense * second * sin[d];
    x[d + pairs] = second * cos[d] + sense * first * sin[d];
  }
  return x;
}

Vector rotated_key(const Inputs& inputs, int batch, int key, int kv_head) {
  const Problem& problem = inputs.problem;
  return rotate(inputs, read_row(inputs.k, problem.key_row(batch, key, kv_head)), problem.geometry.key_row(key), 1);
}

// A query as each regime wants it, and what the softmax makes of its logits.
struct QueryState {
  int position;
  Vector rotated[3];
  Vector probabilities;  // of the keys [0, position]
  double lse;

  const Vector& for_key(const ChunkGeometry& geometry, int key) const {
    return rotated[static_cast<int>(geometry.regime(position, key))];
  }
};

QueryState attend(const Inputs& inputs, const ReferenceKeys& keys, int batch, int query, int head) {
  const Problem& problem = inputs.problem;
  QueryState state;
  state.position = problem.first_position() + query;
  const Vector q = read_row(inputs.q, problem.query_row(batch, query, head));
  for (const Regime regime : kRegimes) {
    const int row = problem.geometry.query_row(regime, state.position);
    state.rotated[static_cast<int>(regime)] = rotate(inputs, q, row, 1);
  }
  Vector& logits = state.probabilities;
  for (int key = 0; key <= state.position; ++key) {
    logits.push_back(problem.scale() * dot(state.for_key(problem.geometry, key), keys.keys[key]));
  }
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - largest);
  state.lse = largest + std::log(sum);
  for (double& logit : logits) logit = std::exp(logit - state.lse);
  return state;
}

// The gradients of one KV head: the queries of all heads that share it add to dK and dV.
class KvHeadGradients {
 public:
  KvHeadGradients(const Inputs& inputs, int batch, int kv_head)
      : inputs_(inputs),
        problem_(inputs.problem),
        keys_(reference_keys(inputs, batch, kv_head)),
        batch_(batch),
        kv_head_(kv_head) {
    const AttentionShape& shape = problem_.shape;
    dk_rotated_.resize(shape.seqlen_k, Vector(shape.head_dim));
    dk_squares_.resize(shape.seqlen_k);
    dv_squares_.resize(shape.seqlen_k);
  }

  void compute(ReferenceGradients& gradients) {
    const AttentionShape& shape = problem_.shape;
    const int group = shape.heads / shape.kv_heads;
    for (int key = 0; key < shape.seqlen_k; ++key) {
      gradients.dv[problem_.key_row(batch_, key, kv_head_)].values.resize(shape.head_dim);
    }
    for (int head = kv_head_ * group; head < (kv_head_ + 1) * group; ++head) {
      for (int query = 0; query < shape.seqlen_q; ++query) add_query(query, head, gradients);
    }
    for (int key = 0; key < shape.seqlen_k; ++key) {
      const int64_t row = problem_.key_row(batch_, key, kv_head_);
      gradients.dk[row] = {rotate(inputs_, dk_rotated_[key], problem_.geometry.key_row(key), -1),
                           std::sqrt(dk_squares_[key])};
      gradients.dv[row].scale = std::sqrt(dv_squares_[key]);
    }
  }

 private:
  void add_query(int query, int head, ReferenceGradients& gradients) {
    const int head_dim = problem_.shape.head_dim;
    const QueryState state = attend(inputs_, keys_, batch_, query, head);
    const int64_t row = problem_.query_row(batch_, query, head);
    const Vector dout = read_row(inputs_.dout, row);
    const double dout_square = dot(dout, dout);
    const double q_square = dot(state.rotated[0], state.rotated[0]);
    Vector dp;
    double delta = 0;
    for (int key = 0; key <= state.position; ++key) {
      dp.push_back(dot(dout, keys_.values[key]));
      delta += state.probabilities[key] * dp[key];
    }
    Vector dq_rotated[3] = {Vector(head_dim), Vector(head_dim), Vector(head_dim)};
    double dq_squares = 0;
    for (int key = 0; key <= state.position; ++key) {
      const double p = state.probabilities[key];
      const double ds = problem_.scale() * p * (dp[key] - delta);
      const Vector& value = keys_.values[key];
      const double dp_terms = std::sqrt(dout_square * dot(value, value) / head_dim);
      const double ds_terms = problem_.scale() * p * std::hypot(dp[key], delta, dp_terms);
      add(dq_rotated[static_cast<int>(problem_.geometry.regime(state.position, key))], ds, keys_.keys[key]);
      add(dk_rotated_[key], ds, state.for_key(problem_.geometry, key));
      add(gradients.dv[problem_.key_row(batch_, key, kv_head_)].values, p, dout);
      dq_squares += square(ds_terms) * dot(keys_.keys[key], keys_.keys[key]);
      dk_squares_[key] += square(ds_terms) * q_square;
      dv_squares_[key] += square(p) * dout_square;
    }
    ReferenceRow& dq = gradients.dq[row];
    dq.values.resize(head_dim);
    dq.scale = std::sqrt(dq_squares);
    for (const Regime regime : kRegimes) {
      const Vector& rotated = dq_rotated[static_cast<int>(regime)];
      add(dq.values, 1, rotate(inputs_, rotated, problem_.geometry.query_row(regime, state.position), -1));
    }
  }

  const Inputs& inputs_;
  const Problem& problem_;
  ReferenceKeys keys_;
  int batch_;
  int kv_head_;
  std::vector<Vector> dk_rotated_;
  Vector dk_squares_;
  Vector dv_squares_;
};

}  // namespace

ReferenceKeys reference_keys(const Inputs& inputs, int batch, int kv_head) {
  ReferenceKeys keys;
  for (int key = 0; key < inputs.problem.shape.seqlen_k; ++key) {
    keys.keys.push_back(rotated_key(inputs, batch, key, kv_head));
    keys.values.push_back(read_row(inputs.v, inputs.problem.key_row(batch, key, kv_head)));
  }
  return keys;
}

ReferenceForward reference_forward(const Inputs& inputs, const ReferenceKeys& keys, int batch, int query, int head) {
  const QueryState state = attend(inputs, keys, batch, query, head);
  ReferenceRow out{Vector(inputs.problem.shape.head_dim), 0};
  double squares = 0;
  for (int key = 0; key <= state.position; ++key) {
    const Vector& value = keys.values[key];
    add(out.values, state.probabilities[key], value);
    squares += square(state.probabilities[key]) * dot(value, value);
  }
  out.scale = std::sqrt(squares);
  return {out, state.lse};
}

ReferenceRow reference_rotated_key(const Inputs& inputs, int batch, int key, int kv_head) {
  const Vector rotated = rotated_key(inputs, batch, key, kv_head);
  return {rotated, std::sqrt(dot(rotated, rotated))};
}

ReferenceGradients reference_backward(const Inputs& inputs) {
  const AttentionShape& shape = inputs.problem.shape;
  ReferenceGradients gradients;
  gradients.dq.resize(inputs.q.rows);
  gradients.dk.resize(inputs.k.rows);
  gradients.dv.resize(inputs.k.rows);
  parallel_blocks(static_cast<int64_t>(shape.batch) * shape.kv_heads, [&](int64_t head) {
    KvHeadGradients(inputs, static_cast<int>(head / shape.kv_heads), static_cast<int>(head % shape.kv_heads))
        .compute(gradients);
  });
  return gradients;
}

}  // namespace chunkattn::bench
