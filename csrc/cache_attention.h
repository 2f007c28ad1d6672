// A step over a cache in the terms of plain attention. No torch, no CUDA types.
#pragma once

#include "params.h"

namespace chunkattn {

// Attention of the queries to seqlen_k keys of each sequence, rotated as the cache holds them. Where the keys lie is
// for the caller to say.
inline ForwardParams cache_attention(const DecodeParams& params, int seqlen_k) {
  ForwardParams forward{};
  forward.q = params.q;
  forward.out = params.out;
  forward.softmax_lse = params.softmax_lse;
  forward.q_strides = params.q_strides;
  forward.out_strides = params.out_strides;
  forward.shape = {params.batch, params.seqlen_q, seqlen_k, params.heads, params.kv_heads, params.head_dim};
  forward.dtype = params.dtype;
  forward.geometry = params.geometry;
  forward.rotary = params.rotary;
  forward.scale = params.scale;
  forward.temperature = params.temperature;
  forward.q_rotated = params.q_rotated;
  forward.k_rotated = true;
  return forward;
}

}  // namespace chunkattn
