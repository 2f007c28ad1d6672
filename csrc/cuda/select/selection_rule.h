// Which rows (query regions) are scored against which key regions, and for which group. No CUDA types; host and device
// read the same rule.
#pragma once

#include "params.h"

namespace chunkattn::cuda {

struct SelectionRule {
  RegionGeometry geometry;
  Eligibility eligibility;
  Voters voters;
  int top_k;
  int regions;  // of the sequence
  int groups;

  CHUNKATTN_HOST_DEVICE int lag() const { return voters == Voters::kPreviousGroup ? 1 : 0; }

  CHUNKATTN_HOST_DEVICE int first_voter(int group) const { return geometry.first_region(group - lag()); }

  CHUNKATTN_HOST_DEVICE int voter_count(int group) const {
    if (group < lag()) return 0;
    const int left = regions - first_voter(group);
    return left < geometry.merge ? left : geometry.merge;
  }

  // Regions that some row of the group may list: these are the first ones, and its last row may list them all.
  CHUNKATTN_HOST_DEVICE int eligible(int group) const {
    const int rows = voter_count(group);
    return rows == 0 ? 0 : geometry.eligible_end(eligibility, group, rows - 1);
  }

  // The last row then lists every region that any row may list, and there is nothing to choose.
  CHUNKATTN_HOST_DEVICE bool keeps_all(int group) const { return eligible(group) <= top_k; }

  // The group that the row votes for.
  CHUNKATTN_HOST_DEVICE int group_of(int row) const { return row / geometry.merge + lag(); }

  // A row is scored against the regions before this one; 0 where there is nothing to choose.
  CHUNKATTN_HOST_DEVICE int row_end(int row) const {
    if (row >= regions) return 0;
    const int group = group_of(row);
    if (group >= groups || keeps_all(group)) return 0;
    return geometry.eligible_end(eligibility, group, row % geometry.merge);
  }
};

inline SelectionRule selection_rule(const SelectParams& params) {
  const RegionGeometry& geometry = params.geometry;
  const int seqlen = params.shape.seqlen_k;
  return {geometry, params.eligibility, params.voters, params.top_k, geometry.regions(seqlen), geometry.groups(seqlen)};
}

// Whether any group has more regions to choose from than it keeps. Only of a partial last group may fewer be eligible
// than of the group before.
inline bool chooses(const SelectionRule& rule) {
  for (int group = rule.groups - 1; group >= 0 && group >= rule.groups - 2; --group) {
    if (!rule.keeps_all(group)) return true;
  }
  return false;
}

}  // namespace chunkattn::cuda
