// Lists of regions as kernels walk them: the tokens of a list's regions, one region behind the other, count as one
// range of keys, which is cut into tiles like any other.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace chunkattn::cuda {

// The regions a group attends to beside itself. All of them may be attended and are whole.
struct ListedRegions {
  const int* ids;
  int count;
  int region_size;

  CHUNKATTN_HOST_DEVICE int keys() const { return count * region_size; }

  // The position of key `index` of the list.
  CHUNKATTN_HOST_DEVICE int token(int index) const {
    return ids[index / region_size] * region_size + index % region_size;
  }
};

// All lists of a call, without the ids that are ignored (SelectMergeWorkspace).
struct AttendedRegions {
  const int* ids;     // [batch, index_heads, groups, capacity]
  const int* counts;  // [batch, index_heads, groups]
  int capacity;
  int groups;
  int index_heads;
  int heads_per_list;  // query heads that share a list
  RegionGeometry geometry;

  CHUNKATTN_HOST_DEVICE ListedRegions of(int batch, int head, int position) const {
    return of_group(batch, head / heads_per_list, geometry.group(position));
  }

  // By the index head.
  CHUNKATTN_HOST_DEVICE ListedRegions of_group(int batch, int index_head, int group) const {
    const int64_t plane = static_cast<int64_t>(batch) * index_heads + index_head;
    const int64_t list = plane * groups + group;
    return {ids + list * capacity, counts[list], geometry.region_size};
  }

  // What a tile of queries, which lies in one group, attends: the keys of its group up to its own, then the list, whose
  // keys are counted from 0.
  CHUNKATTN_HOST_DEVICE SegmentList segments(int batch, int head, const QueryTile& queries) const {
    SegmentList list;
    list.items[0] = {geometry.first_token(geometry.group(queries.begin)), queries.end, Regime::kIntra, Mask::kCausal};
    list.items[1] = {0, of(batch, head, queries.begin).keys(), Regime::kInter, Mask::kNone};
    list.count = list.items[1].key_end > 0 ? 2 : 1;
    return list;
  }
};

inline int64_t count_lists(const SelectMergeParams& params) {
  const RegionLists& lists = params.regions;
  return static_cast<int64_t>(params.shape.batch) * lists.index_heads * lists.geometry.groups(params.shape.seqlen_k);
}

// Fills in the workspace's lists. Returns null, or what failed.
const char* launch_attended_regions(const SelectMergeParams& params, const SelectMergeWorkspace& workspace,
                                    cudaStream_t stream);

inline AttendedRegions attended_regions(const SelectMergeParams& params, const SelectMergeWorkspace& workspace) {
  const RegionLists& lists = params.regions;
  return {workspace.regions, workspace.counts,
          lists.capacity,    lists.geometry.groups(params.shape.seqlen_k),
          lists.index_heads, params.shape.heads / lists.index_heads,
          lists.geometry};
}

}  // namespace chunkattn::cuda
