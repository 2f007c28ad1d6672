#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace bindings = chunkattn::bindings;

STABLE_TORCH_LIBRARY(chunkattn, library) {
  library.def(
      "dca(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int chunk_size, int local_size, float? scale=None, "
      "Tensor? temperature=None, bool interleaved=False, bool q_rotated=False, bool k_rotated=False, "
      "bool deterministic=False) -> (Tensor out, Tensor softmax_lse)");
  library.def(
      "dca_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor cos, Tensor sin, "
      "int chunk_size, int local_size, float? scale=None, Tensor? temperature=None, bool interleaved=False, "
      "bool q_rotated=False, bool k_rotated=False, bool deterministic=False) -> (Tensor dq, Tensor dk, Tensor dv)");
  library.def(
      "dca_varlen(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, int chunk_size, int local_size, float? scale=None, "
      "Tensor? temperature=None, bool interleaved=False, bool q_rotated=False, bool k_rotated=False, "
      "bool deterministic=False) -> (Tensor out, Tensor softmax_lse)");
  library.def(
      "dca_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor cos, "
      "Tensor sin, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int chunk_size, "
      "int local_size, float? scale=None, Tensor? temperature=None, bool interleaved=False, bool q_rotated=False, "
      "bool k_rotated=False, bool deterministic=False) -> (Tensor dq, Tensor dk, Tensor dv)");
  // The cache is written to: new keys and values are appended.
  library.def(
      "dca_with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos, Tensor sin, "
      "Tensor cache_seqlens, int chunk_size, int local_size, Tensor? block_table=None, Tensor? k=None, Tensor? v=None, "
      "Tensor? k_scale=None, Tensor? v_scale=None, int num_splits=0, float? scale=None, Tensor? temperature=None, "
      "bool interleaved=False, bool q_rotated=False) -> (Tensor out, Tensor softmax_lse)");
  library.def(
      "dca_with_kvcache.out(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos, Tensor sin, "
      "Tensor cache_seqlens, int chunk_size, int local_size, Tensor? block_table, Tensor? k, Tensor? v, "
      "Tensor? k_scale, Tensor? v_scale, int num_splits, float? scale, Tensor? temperature, bool interleaved, "
      "bool q_rotated, Tensor(c!) out) -> Tensor softmax_lse");
  library.def(
      "select(Tensor q, Tensor k, int region_size, int top_k, int merge, str eligibility=\"group\", "
      "str selection=\"lookahead\", str heads=\"kv\") -> Tensor");
  library.def(
      "select_merge(Tensor q, Tensor k, Tensor v, Tensor indices, int region_size, int merge, float? scale=None, "
      "bool deterministic=False) -> (Tensor out, Tensor softmax_lse)");
  library.def(
      "select_merge_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "Tensor indices, int region_size, int merge, float? scale=None, bool deterministic=False) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  // The tokens are appended: everything that is the cache's is written to.
  library.def(
      "select_merge_with_kvcache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) region_sums, Tensor(d!) query_sums, Tensor(e!) indices, Tensor(f!) seqlens, int capacity, "
      "int region_size, int merge, str eligibility=\"group\", str selection=\"causal\", Tensor? block_table=None, "
      "Tensor? select_q=None, Tensor? select_k=None, Tensor? new_seqlens=None, float? scale=None) "
      "-> (Tensor out, Tensor softmax_lse)");
  library.def(
      "select_merge_with_kvcache.out(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) region_sums, Tensor(d!) query_sums, Tensor(e!) indices, Tensor(f!) seqlens, int capacity, "
      "int region_size, int merge, str eligibility, str selection, Tensor? block_table, Tensor? select_q, "
      "Tensor? select_k, Tensor? new_seqlens, float? scale, Tensor(g!) out) -> Tensor softmax_lse");
  library.def(
      "select_merge_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) region_sums, Tensor(d!) query_sums, Tensor(e!) indices, Tensor(f!) seqlens, int capacity, "
      "int region_size, int merge, str eligibility=\"group\", str selection=\"causal\", Tensor? block_table=None, "
      "Tensor? select_q=None, Tensor? select_k=None, Tensor? new_seqlens=None) -> ()");
#ifdef CHUNKATTN_WITH_CUDA
  library.def("force_kernel(str name) -> ()");
#endif
}

namespace {

// The functions tell the devices apart.
template <class Library>
void implement(Library& library) {
  library.impl("dca", TORCH_BOX(&bindings::dca));
  library.impl("dca_backward", TORCH_BOX(&bindings::dca_backward));
  library.impl("dca_varlen", TORCH_BOX(&bindings::dca_varlen));
  library.impl("dca_varlen_backward", TORCH_BOX(&bindings::dca_varlen_backward));
  library.impl("dca_with_kvcache", TORCH_BOX(&bindings::dca_with_kvcache));
  library.impl("dca_with_kvcache.out", TORCH_BOX(&bindings::dca_with_kvcache_out));
  library.impl("select", TORCH_BOX(&bindings::select));
  library.impl("select_merge", TORCH_BOX(&bindings::select_merge));
  library.impl("select_merge_backward", TORCH_BOX(&bindings::select_merge_backward));
  library.impl("select_merge_with_kvcache", TORCH_BOX(&bindings::select_merge_with_kvcache));
  library.impl("select_merge_with_kvcache.out", TORCH_BOX(&bindings::select_merge_with_kvcache_out));
  library.impl("select_merge_append", TORCH_BOX(&bindings::select_merge_append));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(chunkattn, CPU, library) { implement(library); }

#ifdef CHUNKATTN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(chunkattn, CUDA, library) { implement(library); }

STABLE_TORCH_LIBRARY_IMPL(chunkattn, CompositeExplicitAutograd, library) {
  library.impl("force_kernel", TORCH_BOX(&bindings::force_kernel));
}
#endif
