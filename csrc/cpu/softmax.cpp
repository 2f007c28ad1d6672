#include "cpu/softmax.h"

#include <algorithm>
#include <limits>

namespace chunkattn::cpu {
namespace {

// The first n lanes of `values`, `fill` in the others.
template <class S, class Accum>
CHUNKATTN_INLINE auto first_lanes(const typename S::Vector& values, int n, Accum fill) {
  typename S::Ints lanes;
  for (int lane = 0; lane < S::kLanes; ++lane) lanes[lane] = lane;
  const typename S::Vector zero = {};
  return lanes < n ? values : zero + fill;
}

template <class Element>
CHUNKATTN_INLINE void zero_row(Element* row, int begin, int end) {
  if (begin < end) std::memset(static_cast<void*>(row + begin), 0, (end - begin) * sizeof(Element));
}

template <class S, class Accum>
CHUNKATTN_INLINE Accum max_of_row(const Accum* logits, int visible, Accum scale) {
  constexpr Accum infinity = std::numeric_limits<Accum>::infinity();
  typename S::Vector best = {};
  best -= infinity;
  for (int j = 0; j < visible; j += S::kLanes) {
    auto x = load<S>(logits + j) * scale;
    if (j + S::kLanes > visible) x = first_lanes<S>(x, visible - j, -infinity);
    best = x > best ? x : best;
  }
  return reduce_lanes<S>(best,
                         [](const auto& a, const auto& b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// probabilities = 2^(scale * logits - shift), 0 beyond the visible keys. Returns their sum.
template <class S, class Accum, class Operand>
CHUNKATTN_INLINE Accum exponentiate_row(const Accum* logits, Operand* probabilities, int visible, int keys, Accum scale,
                                        Accum shift) {
  typename S::Vector sums = {};
  int j = 0;
  for (; j < visible; j += S::kLanes) {
    auto power = exp2_vector<S, Operand>(load<S>(logits + j) * scale - shift);
    if (j + S::kLanes > visible) power = first_lanes<S>(power, visible - j, Accum(0));
    sums += power;
    store_fast<S>(probabilities + j, power);
  }
  zero_row(probabilities, j, keys);
  return sum_lanes<S>(sums);
}

// How far, in bits, a logit may exceed the shift before the shift follows: rescaling sums is then rare.
constexpr int kShiftSlack = 8;

template <class S, class Accum, class Operand>
CHUNKATTN_INLINE void update_loops(const LogitBlock block, const Accum* logits, Operand* probabilities, int64_t stride,
                                   Accum scale, SoftmaxState<Accum> state, bool first, Accum* out, int head_dim) {
  constexpr Accum infinity = std::numeric_limits<Accum>::infinity();
  // A vector of rows at a time: their logits stay in the first-level cache between the two passes.
  for (int begin = 0; begin < block.rows; begin += S::kLanes) {
    const int end = std::min(begin + S::kLanes, block.rows);
    Accum maxima[S::kLanes] = {};
    for (int n = begin; n < end; ++n) {
      maxima[n - begin] = max_of_row<S>(logits + n * stride, block.visible(n), scale);
    }
    const typename S::Vector zero = {};
    const auto max = load<S>(maxima);
    const auto old_shift = load_partial<S>(state.shift + begin, end - begin);
    const auto shift = max > old_shift + Accum(kShiftSlack) ? max : old_shift;
    const auto finite_shift = shift == zero - infinity ? zero : shift;
    const auto rescale = exp2_vector<S, Accum>(old_shift - finite_shift);
    typename S::Vector sums = {};
    for (int n = begin; n < end; ++n) {
      const int lane = n - begin;
      sums[lane] = exponentiate_row<S>(logits + n * stride, probabilities + n * stride, block.visible(n), block.keys,
                                       scale, Accum(finite_shift[lane]));
      if (!first && rescale[lane] != 1) {
        convert_row<S>(out + n * head_dim, out + n * head_dim, head_dim, Accum(rescale[lane]));
      }
    }
    sums += load_partial<S>(state.sum + begin, end - begin) * rescale;
    store_partial<S>(state.sum + begin, sums, end - begin);
    store_partial<S>(state.shift + begin, shift, end - begin);
  }
}

template <class S, class Accum, class Operand>
CHUNKATTN_INLINE void differentiate_loops(const LogitBlock block, const Accum* logits,
                                          const Accum* probability_gradients, Operand* probabilities,
                                          Operand* logit_gradients, int64_t stride, Accum scale, const Accum* lse,
                                          const Accum* delta) {
  for (int n = 0; n < block.rows; ++n) {
    const int64_t row = n * stride;
    const int visible = block.visible(n);
    int j = 0;
    for (; j < visible; j += S::kLanes) {
      auto power = exp2_vector<S, Operand>(load<S>(logits + row + j) * scale - lse[n]);
      auto gradient = power * (load<S>(probability_gradients + row + j) - delta[n]);
      if (j + S::kLanes > visible) {
        power = first_lanes<S>(power, visible - j, Accum(0));
        gradient = first_lanes<S>(gradient, visible - j, Accum(0));
      }
      store_fast<S>(probabilities + row + j, power);
      store_fast<S>(logit_gradients + row + j, gradient);
    }
    zero_row(probabilities + row, j, block.keys);
    zero_row(logit_gradients + row, j, block.keys);
  }
}

}  // namespace

template <class Accum, class Operand>
void update_softmax(const LogitBlock& block, const Accum* logits, Operand* probabilities, int64_t stride, Accum scale,
                    SoftmaxState<Accum> state, bool first, Accum* out, int head_dim) {
  vectorized(CHUNKATTN_LOOPS(bytes) {
    update_loops<Simd<Accum, bytes>>(block, logits, probabilities, stride, scale, state, first, out, head_dim);
  });
}

template <class Accum, class Operand>
void differentiate_softmax(const LogitBlock& block, const Accum* logits, const Accum* probability_gradients,
                           Operand* probabilities, Operand* logit_gradients, int64_t stride, Accum scale,
                           const Accum* lse, const Accum* delta) {
  vectorized(CHUNKATTN_LOOPS(bytes) {
    differentiate_loops<Simd<Accum, bytes>>(block, logits, probability_gradients, probabilities, logit_gradients,
                                            stride, scale, lse, delta);
  });
}

#define CHUNKATTN_SOFTMAX(Accum, Operand)                                                                            \
  template void update_softmax(const LogitBlock&, const Accum*, Operand*, int64_t, Accum, SoftmaxState<Accum>, bool, \
                               Accum*, int);                                                                         \
  template void differentiate_softmax(const LogitBlock&, const Accum*, const Accum*, Operand*, Operand*, int64_t,    \
                                      Accum, const Accum*, const Accum*)

CHUNKATTN_SOFTMAX(double, double);
CHUNKATTN_SOFTMAX(float, float);
CHUNKATTN_SOFTMAX(float, BFloat16);

}  // namespace chunkattn::cpu
