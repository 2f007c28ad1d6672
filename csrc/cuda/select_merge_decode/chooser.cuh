// Who chooses the regions of a span, and from which.
#pragma once

#include "cuda/select_merge_decode/launchers.h"

namespace chunkattn::cuda {

struct Chooser {
  int group;      // of the span
  int first_row;  // in the group, of the rows that vote, for eligibility by row
  bool begins;    // there is something to choose now
  bool keeps_all;
  int eligible;  // regions that some row may list: the first ones

  // Row `row` of those that vote may list the regions before this one.
  __device__ __forceinline__ int row_end(const SpanStep& step, int row) const {
    return step.params.geometry.eligible_end(step.params.eligibility, group, first_row + row);
  }
};

// `span`: of a sequence.
__device__ __forceinline__ Chooser chooser(const SpanStep& step, const TokenSpan& span) {
  const SelectMergeDecodeParams& params = step.params;
  const RegionGeometry& geometry = params.geometry;
  Chooser result{};
  if (span.count() == 0) return result;
  result.group = geometry.group(span.begin);
  int rows = 1;  // in the first group nobody votes, and there is nothing to choose from
  if (params.each_token_chooses) {
    result.begins = params.attends;
    result.first_row = span.begin / geometry.region_size - geometry.first_region(result.group);
  } else {
    result.begins = span.begin % geometry.group_tokens() == 0;
    if (result.group > 0) rows = step.plan.voters;
  }
  result.eligible = result.row_end(step, rows - 1);
  result.keeps_all = result.eligible <= params.top_k;
  return result;
}

}  // namespace chunkattn::cuda
