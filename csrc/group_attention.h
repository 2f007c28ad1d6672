// Select-and-merge attention in the terms of dual chunk attention: a group is a chunk whose earlier chunks are replaced
// by lists of regions, and rows that nothing rotates are rows that arrive rotated. No torch, no CUDA types.
#pragma once

#include <algorithm>

#include "params.h"

namespace chunkattn {

inline ForwardParams group_attention(const SelectMergeParams& params) {
  ForwardParams forward{};
  forward.q = params.q;
  forward.k = params.k;
  forward.v = params.v;
  forward.out = params.out;
  forward.softmax_lse = params.softmax_lse;
  forward.q_strides = params.q_strides;
  forward.k_strides = params.k_strides;
  forward.v_strides = params.v_strides;
  forward.out_strides = params.out_strides;
  forward.shape = params.shape;
  forward.dtype = params.dtype;
  // Groups longer than the sequence are as long as it, so that their size fits 32 bits.
  const int64_t group_tokens = params.regions.geometry.group_tokens();
  forward.geometry.chunk_size = static_cast<int>(std::min<int64_t>(group_tokens, params.shape.seqlen_k));
  forward.geometry.local_size = 0;
  forward.scale = params.scale;
  forward.q_rotated = true;
  forward.k_rotated = true;
  return forward;
}

inline BackwardParams group_attention(const SelectMergeBackwardParams& params) {
  BackwardParams backward{};
  backward.forward = group_attention(params.forward);
  backward.dout = params.dout;
  backward.dq = params.dq;
  backward.dk = params.dk;
  backward.dv = params.dv;
  backward.dout_strides = params.dout_strides;
  backward.dq_strides = params.dq_strides;
  backward.dk_strides = params.dk_strides;
  backward.dv_strides = params.dv_strides;
  return backward;
}

}  // namespace chunkattn
