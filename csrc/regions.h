// Rules of select-and-merge attention (arXiv 2410.04211): which tokens form a region and a group, which regions a group
// may select, and which keys a query then sees. Shared by CPU code, CUDA code and C++ tests. No torch, no CUDA types.
//
// Regions of region_size tokens and groups of merge regions are aligned at token 0; the last of each may be partial.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace chunkattn {

// Which regions a voting row may list.
enum class Eligibility : int {
  kGroup = 0,  // every region before the group the list is for
  kRow = 1,  // the paper's code: row r of those that vote, those up to the group's first region + r - merge, inclusive
};

// Whose rows (query regions) vote on what a group attends to.
enum class Voters : int {
  kOwnGroup = 0,       // "lookahead", the paper
  kPreviousGroup = 1,  // "causal"; the first group has nothing to select and needs none
};

struct RegionGeometry {
  int region_size;  // tokens
  int merge;        // regions of a group

  static CHUNKATTN_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  CHUNKATTN_HOST_DEVICE int64_t group_tokens() const { return static_cast<int64_t>(region_size) * merge; }
  CHUNKATTN_HOST_DEVICE int regions(int seqlen) const { return static_cast<int>(ceil_div(seqlen, region_size)); }
  CHUNKATTN_HOST_DEVICE int groups(int seqlen) const { return static_cast<int>(ceil_div(seqlen, group_tokens())); }
  CHUNKATTN_HOST_DEVICE int group(int position) const { return static_cast<int>(position / group_tokens()); }
  CHUNKATTN_HOST_DEVICE int first_region(int group) const { return group * merge; }
  CHUNKATTN_HOST_DEVICE int first_token(int group) const { return static_cast<int>(group * group_tokens()); }

  // The first region that voting row `row` of those for `group` may no longer list.
  CHUNKATTN_HOST_DEVICE int eligible_end(Eligibility eligibility, int group, int row) const {
    const int first = first_region(group);
    if (eligibility == Eligibility::kGroup) return first;
    const int end = first + row - merge + 1;
    return end > 0 ? end : 0;
  }

  // Ids from elsewhere than a selection may be anything; only regions before the group are attended.
  CHUNKATTN_HOST_DEVICE bool may_attend(int group, int region) const {
    return region >= 0 && region < first_region(group);
  }
};

// Neighbouring tokens of a sequence, [begin, end), that attend to the same list of regions.
struct TokenSpan {
  int begin;
  int end;

  CHUNKATTN_HOST_DEVICE int count() const { return end - begin; }
};

// Cuts the tokens that a step appends into spans: the parts of each group, or every token by itself.
struct TokenSpans {
  RegionGeometry geometry;
  bool single_tokens;

  // How many spans a step of so many tokens has at most, wherever it begins.
  CHUNKATTN_HOST_DEVICE int most(int tokens) const {
    if (single_tokens || tokens == 0) return tokens;
    return static_cast<int>(RegionGeometry::ceil_div(tokens - 1, geometry.group_tokens())) + 1;
  }

  // How many tokens a span of such a step has at most.
  CHUNKATTN_HOST_DEVICE int longest(int tokens) const {
    if (single_tokens) return tokens < 1 ? tokens : 1;
    return tokens < geometry.group_tokens() ? tokens : static_cast<int>(geometry.group_tokens());
  }

  // Span `index` of the tokens at [begin, end); empty behind the last.
  CHUNKATTN_HOST_DEVICE TokenSpan span(int begin, int end, int index) const {
    // Larger groups than positions have bits hold all tokens, too.
    const int64_t group = geometry.group_tokens(), most = int64_t{1} << 31;
    const int64_t size = single_tokens ? 1 : group < most ? group : most;
    const int64_t first = single_tokens ? begin : begin / size * size;
    const int64_t from = first + index * size;
    const int64_t to = from + size;
    if (from >= end) return {end, end};
    return {from < begin ? begin : static_cast<int>(from), to < end ? static_cast<int>(to) : end};
  }
};

}  // namespace chunkattn
