// Dual Chunk Attention in float64, one pair of query and key after the other: slow, and with nothing in common with the
// kernels but the position rules of geometry.h. Source: arXiv 2402.17463.
#pragma once

#include <vector>

#include "problem.h"

namespace chunkattn::bench {

// A row of a result. Its elements are sums; `scale` is the root of the sum of the squared lengths of what is added up,
// the size of a rounding error in proportion to which a result may be off. Where terms cancel, it is larger than the
// row.
struct ReferenceRow {
  std::vector<double> values;
  double scale = 0;
};

struct ReferenceForward {
  ReferenceRow out;  // [head_dim]
  double softmax_lse;
};

struct ReferenceGradients {
  std::vector<ReferenceRow> dq;  // by Problem::query_row
  std::vector<ReferenceRow> dk;  // by Problem::key_row
  std::vector<ReferenceRow> dv;
};

// The rotated keys and the values of a KV head, one vector of head_dim for each position.
struct ReferenceKeys {
  std::vector<std::vector<double>> keys;
  std::vector<std::vector<double>> values;
};

ReferenceKeys reference_keys(const Inputs& inputs, int batch, int kv_head);

// `keys` are those of the KV head that the query's head reads.
ReferenceForward reference_forward(const Inputs& inputs, const ReferenceKeys& keys, int batch, int query, int head);

ReferenceRow reference_rotated_key(const Inputs& inputs, int batch, int key, int kv_head);

// Of all queries and keys, so for small problems.
ReferenceGradients reference_backward(const Inputs& inputs);

}  // namespace chunkattn::bench
