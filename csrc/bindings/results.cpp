#include "results.h"

#include <torch/csrc/stable/ops.h>

#include <array>

namespace chunkattn::bindings {

Tensor new_contiguous(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

Tensor new_softmax_lse(const Tensor& q) {
  const std::array<int64_t, 3> shape{q.size(0), q.size(2), q.size(1)};
  return torch::stable::new_empty(q, {shape.data(), shape.size()}, torch::headeronly::ScalarType::Float);
}

Gradients new_gradients(const Tensor& q, const Tensor& k, const Tensor& v) {
  Gradients gradients{new_contiguous(q), new_contiguous(k), new_contiguous(v), q.numel() == 0};
  if (gradients.empty) {
    torch::stable::zero_(gradients.dk);
    torch::stable::zero_(gradients.dv);
  }
  return gradients;
}

}  // namespace chunkattn::bindings
