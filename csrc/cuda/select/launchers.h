// The steps of the selection. Each returns null, or a sentence that says what failed.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/select/selection_rule.h"

namespace chunkattn::cuda {

// Some planes (batch row and index head) and the KV planes (batch row and KV head) they select from. Tensors of the
// workspace begin with the first of each.
//
// A pass is attempted with short lists first; groups whose merge came to their ends are done again with whole ones.
struct SelectPass {
  SelectParams params;
  SelectWorkspace workspace;
  SelectionRule rule;
  int first_plane;
  int planes;
  int first_kv_plane;
  int kv_planes;
  int listed;              // regions of a row's list, at most top_k
  int candidates_per_row;  // at most those of the workspace
  bool again;              // for the groups in SelectWorkspace::unmerged alone

  CHUNKATTN_HOST_DEVICE int kv_plane(int plane) const {
    const int all = first_plane + plane;
    const int sharing = params.index_heads / params.shape.kv_heads;
    return all / params.index_heads * params.shape.kv_heads + all % params.index_heads / sharing - first_kv_plane;
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ bool to_merge(int plane, int group) const {
    return !again || workspace.unmerged[static_cast<int64_t>(plane) * rule.groups + group] != 0;
  }

  // As SelectionRule::row_end; 0 where the row's group is done.
  __device__ __forceinline__ int row_end(int plane, int row) const {
    const int end = rule.row_end(row);
    return end != 0 && to_merge(plane, rule.group_of(row)) ? end : 0;
  }
#endif
};

// Semantic tokens of all regions, as pairs of float16 whose sum is scaled to have 22 significant bits.
const char* launch_region_means(const SelectPass& pass, cudaStream_t stream);

// The regions each row lists, in any order.
const char* launch_scores_sm80(const SelectPass& pass, cudaStream_t stream);
const char* launch_scores_sm90(const SelectPass& pass, cudaStream_t stream);  // padded_dim up to 128

// Puts the rows' lists in order, best first.
const char* launch_sort_lists(const SelectPass& pass, cudaStream_t stream);

// Merges the lists of each group's rows, or names all regions where it keeps them all; that needs no workspace. Says in
// SelectWorkspace::unmerged where lists shorter than top_k ended before the walk did.
const char* launch_merge(const SelectPass& pass, cudaStream_t stream);

}  // namespace chunkattn::cuda
