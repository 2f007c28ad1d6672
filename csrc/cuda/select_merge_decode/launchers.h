// The kernels of a step. Each launcher returns null, or a sentence that says what failed.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/select_merge_decode/plan.h"

namespace chunkattn::cuda {

// One span of all sequences.
struct SpanStep {
  SelectMergeDecodeParams params;
  StepPlan plan;
  StepWorkspace workspace;
  int index;
  bool last;

  // Before begins and ends are known.
  CHUNKATTN_HOST_DEVICE TokenSpan first_span(int batch) const {
    const int stored = params.stored(batch);
    return params.spans().span(stored, params.end_of(stored, batch), index);
  }
  CHUNKATTN_HOST_DEVICE TokenSpan span(int batch) const {
    return params.spans().span(workspace.begins[batch], workspace.ends[batch], index);
  }

  CHUNKATTN_HOST_DEVICE int sequence(int plane) const { return plane / params.index_heads; }
  CHUNKATTN_HOST_DEVICE int kv_head(int plane) const {
    return plane % params.index_heads / (params.index_heads / params.kv_heads);
  }
};

// The regions each voting row lists of each split, in any order.
const char* launch_cache_scores(const SpanStep& step, cudaStream_t stream);

// The lists of regions of groups that begin. Writes begins and ends first of all.
const char* launch_choice(const SpanStep& step, cudaStream_t stream);

// Appends the span's tokens, adds up the sums, writes the block table, and after the last span the lengths.
const char* launch_append_span(const SpanStep& step, cudaStream_t stream);

// Queries of the span to where the decode kernels want them, and results to where the caller does.
const char* launch_gather_queries(const SpanStep& step, cudaStream_t stream);
const char* launch_scatter_results(const SpanStep& step, cudaStream_t stream);

}  // namespace chunkattn::cuda
