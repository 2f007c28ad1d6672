// The tensors that the operators return, uninitialised.
#pragma once

#include <tuple>

#include "arguments.h"

namespace chunkattn::bindings {

// A tensor like `like`, contiguous.
Tensor new_contiguous(const Tensor& like);

// float32 [batch, heads, seqlen_q].
Tensor new_softmax_lse(const Tensor& q);

struct Gradients {
  Tensor dq;
  Tensor dk;
  Tensor dv;
  bool empty;  // there is no query, so nothing flows back to the keys: dk and dv are zero

  std::tuple<Tensor, Tensor, Tensor> as_tuple() const { return {dq, dk, dv}; }
};

Gradients new_gradients(const Tensor& q, const Tensor& k, const Tensor& v);

// Fills in what is the same for every attention, all but `forward`.
template <class Params>
void set_gradients(Params& params, const Tensor& dout, const Gradients& gradients) {
  params.dout = dout.const_data_ptr();
  params.dq = gradients.dq.mutable_data_ptr();
  params.dk = gradients.dk.mutable_data_ptr();
  params.dv = gradients.dv.mutable_data_ptr();
  params.dout_strides = strides_of(dout);
  params.dq_strides = strides_of(gradients.dq);
  params.dk_strides = strides_of(gradients.dk);
  params.dv_strides = strides_of(gradients.dv);
}

}  // namespace chunkattn::bindings
