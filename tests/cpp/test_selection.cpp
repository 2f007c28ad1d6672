// Which rows vote for which group, and the sizes of the selection's lists and candidates.
#include <cstdint>

#include "check.h"
#include "cuda/select/selection_rule.h"
#include "cuda/select/sizes.h"

namespace {

using namespace chunkattn;
using namespace chunkattn::cuda;

SelectionRule make_rule(int regions, int merge, int top_k, Eligibility eligibility, Voters voters) {
  const RegionGeometry geometry{1, merge};
  return {geometry, eligibility, voters, top_k, regions, geometry.groups(regions)};
}

// A group's voters are the rows that say they vote for it, and what a row may list is what its group may.
void test_voters(const SelectionRule& rule) {
  int voters = 0;
  for (int group = 0; group < rule.groups; ++group) {
    const int first = rule.voter_count(group) == 0 ? 0 : rule.first_voter(group);
    int most = 0;
    for (int row = first; row < first + rule.voter_count(group); ++row) {
      CHECK(rule.group_of(row) == group, "row ", row, " group ", group);
      most = rule.row_end(row) > most ? rule.row_end(row) : most;
    }
    voters += rule.voter_count(group);
    CHECK(most == (rule.keeps_all(group) ? 0 : rule.eligible(group)), "group ", group, " most ", most);
  }
  for (int row = 0; row < rule.regions; ++row) voters -= rule.group_of(row) < rule.groups ? 1 : 0;
  CHECK(voters == 0, "rows that vote for no group, ", voters);
}

void test_sizes(int top_k) {
  for (int merge : {1, 2, 7, 16, 64, 128, 1000, 1 << 20, INT32_MAX}) {
    const int length = short_list(top_k, merge);
    CHECK(length == top_k || (length > 0 && length <= top_k / 2), "top_k ", top_k, " merge ", merge);
    CHECK(int64_t{length} * merge >= top_k, "lists of ", length, " that can never hold ", top_k, " of ", merge,
          " rows");
    CHECK(candidates_per_row(length) <= candidates_per_row(top_k), "top_k ", top_k, " merge ", merge);
  }
  const int capacity = candidates_per_row(top_k);
  CHECK((capacity & (capacity - 1)) == 0, "capacity ", capacity);
  // What a reduction leaves is dealt out to four lanes, and none may be full then.
  const int left = (top_k + reduction_slack(top_k) + 3) / 4;
  CHECK(left < most_stored(capacity, kLargestTileColumns), "top_k ", top_k, " capacity ", capacity);
}

}  // namespace

int main() {
  for (int regions : {1, 5, 12, 13, 40}) {
    for (int merge : {1, 3, 4, 50}) {
      for (int top_k : {1, 3, 10}) {
        for (Eligibility eligibility : {Eligibility::kGroup, Eligibility::kRow}) {
          for (Voters voters : {Voters::kOwnGroup, Voters::kPreviousGroup}) {
            test_voters(make_rule(regions, merge, top_k, eligibility, voters));
          }
        }
      }
    }
  }
  for (int top_k = 1; top_k <= 5000; ++top_k) test_sizes(top_k);
  for (int top_k : {10000, 1 << 17, kLargestTopK}) test_sizes(top_k);
  return chunkattn::test::report();
}
