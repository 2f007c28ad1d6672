// The operators, each for all devices. Parameters stand in the order of the schemas in library.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"

namespace chunkattn::bindings {

// Return out [batch, seqlen_q, heads, head_dim] and softmax_lse [batch, heads, seqlen_q]. deterministic is for
// autograd, which hands it on to the backward.
std::tuple<Tensor, Tensor> dca(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int64_t chunk_size,
                               int64_t local_size, std::optional<double> scale, std::optional<Tensor> temperature,
                               bool interleaved, bool q_rotated, bool k_rotated, bool deterministic);

// Makes every later CUDA call take one kernel, for tests and benchmarks.
void force_kernel(std::string name);

// Return dq, dk and dv, shaped as q, k and v. With deterministic they repeat bit by bit; on the CPU they always do.
std::tuple<Tensor, Tensor, Tensor> dca_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                Tensor softmax_lse, Tensor cos, Tensor sin, int64_t chunk_size,
                                                int64_t local_size, std::optional<double> scale,
                                                std::optional<Tensor> temperature, bool interleaved, bool q_rotated,
                                                bool k_rotated, bool deterministic);

// The same of packed sequences: tensors [total, heads, head_dim] and softmax_lse [heads, total_q].
std::tuple<Tensor, Tensor> dca_varlen(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor cu_seqlens_q,
                                      Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                      int64_t chunk_size, int64_t local_size, std::optional<double> scale,
                                      std::optional<Tensor> temperature, bool interleaved, bool q_rotated,
                                      bool k_rotated, bool deterministic);
std::tuple<Tensor, Tensor, Tensor> dca_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                       Tensor softmax_lse, Tensor cos, Tensor sin, Tensor cu_seqlens_q,
                                                       Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                       int64_t chunk_size, int64_t local_size,
                                                       std::optional<double> scale, std::optional<Tensor> temperature,
                                                       bool interleaved, bool q_rotated, bool k_rotated,
                                                       bool deterministic);

// Append k and v to the cache, then attend. Return out [batch, seqlen_q, heads, head_dim] and softmax_lse [batch,
// heads, seqlen_q], or write to the given out and return softmax_lse.
std::tuple<Tensor, Tensor> dca_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin,
                                            Tensor cache_seqlens, int64_t chunk_size, int64_t local_size,
                                            std::optional<Tensor> block_table, std::optional<Tensor> k,
                                            std::optional<Tensor> v, std::optional<Tensor> k_scale,
                                            std::optional<Tensor> v_scale, int64_t num_splits,
                                            std::optional<double> scale, std::optional<Tensor> temperature,
                                            bool interleaved, bool q_rotated);
Tensor dca_with_kvcache_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin, Tensor cache_seqlens,
                            int64_t chunk_size, int64_t local_size, std::optional<Tensor> block_table,
                            std::optional<Tensor> k, std::optional<Tensor> v, std::optional<Tensor> k_scale,
                            std::optional<Tensor> v_scale, int64_t num_splits, std::optional<double> scale,
                            std::optional<Tensor> temperature, bool interleaved, bool q_rotated, Tensor out);

// Returns int32 [batch, kv_heads or heads, groups, top_k].
Tensor select(Tensor q, Tensor k, int64_t region_size, int64_t top_k, int64_t merge, std::string eligibility,
              std::string selection, std::string heads);

// Return out [batch, seqlen, heads, head_dim] and softmax_lse [batch, heads, seqlen]; dq, dk and dv.
std::tuple<Tensor, Tensor> select_merge(Tensor q, Tensor k, Tensor v, Tensor indices, int64_t region_size,
                                        int64_t merge, std::optional<double> scale, bool deterministic);
std::tuple<Tensor, Tensor, Tensor> select_merge_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                         Tensor softmax_lse, Tensor indices, int64_t region_size,
                                                         int64_t merge, std::optional<double> scale,
                                                         bool deterministic);

// Append the tokens to the cache, then attend. Return out [batch, seqlen, heads, head_dim] and softmax_lse [batch,
// heads, seqlen], or write to the given out and return softmax_lse; or only append.
std::tuple<Tensor, Tensor> select_merge_with_kvcache(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache,
                                                     Tensor region_sums, Tensor query_sums, Tensor indices,
                                                     Tensor seqlens, int64_t capacity, int64_t region_size,
                                                     int64_t merge, std::string eligibility, std::string selection,
                                                     std::optional<Tensor> block_table, std::optional<Tensor> select_q,
                                                     std::optional<Tensor> select_k, std::optional<Tensor> new_seqlens,
                                                     std::optional<double> scale);
Tensor select_merge_with_kvcache_out(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor region_sums,
                                     Tensor query_sums, Tensor indices, Tensor seqlens, int64_t capacity,
                                     int64_t region_size, int64_t merge, std::string eligibility, std::string selection,
                                     std::optional<Tensor> block_table, std::optional<Tensor> select_q,
                                     std::optional<Tensor> select_k, std::optional<Tensor> new_seqlens,
                                     std::optional<double> scale, Tensor out);
void select_merge_append(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor region_sums,
                         Tensor query_sums, Tensor indices, Tensor seqlens, int64_t capacity, int64_t region_size,
                         int64_t merge, std::string eligibility, std::string selection,
                         std::optional<Tensor> block_table, std::optional<Tensor> select_q,
                         std::optional<Tensor> select_k, std::optional<Tensor> new_seqlens);

}  // namespace chunkattn::bindings
