// The softmax of a block of logits: online in the forward pass, from the log-sum-exp in the backward pass.
// Exponentials are powers of two: logits are multiplied by log2(e) on the way. Compiled in softmax.cpp, for Accum and
// Operand double and double, float and float, float and BFloat16.
#pragma once

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace chunkattn::cpu {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// The running softmax of each row, whose probabilities are relative to 2^shift. The shift is near enough to the maximum
// of the scaled logits times log2(e) that sums neither overflow nor vanish.
template <class Accum>
struct SoftmaxState {
  Accum* shift;
  Accum* sum;
};

// Turns logits into probabilities relative to the shift. Where it changes, `out` [rows, head_dim], the running sum of P
// V, is rescaled, unless this is the first block. Rows of logits and probabilities are `stride` apart, at least
// round_up_row(keys): whole vectors are read and written. probabilities may be the logits themselves.
template <class Accum, class Operand>
void update_softmax(const LogitBlock& block, const Accum* logits, Operand* probabilities, int64_t stride, Accum scale,
                    SoftmaxState<Accum> state, bool first, Accum* out, int head_dim);

// From logits and dP = dO V^T: P = 2^(scale * logit - lse) and dS = P * (dP - delta), 0 for keys a row does not see.
// All four have rows `stride` apart; probabilities may be the logits themselves, and dS may be dP.
template <class Accum, class Operand>
void differentiate_softmax(const LogitBlock& block, const Accum* logits, const Accum* probability_gradients,
                           Operand* probabilities, Operand* logit_gradients, int64_t stride, Accum scale,
                           const Accum* lse, const Accum* delta);

}  // namespace chunkattn::cpu
