// How the tokens of a step are cut into spans: regions.h against the rule written out token by token.
#include <cstdint>

#include "check.h"
#include "regions.h"

namespace {

using chunkattn::RegionGeometry;
using chunkattn::TokenSpan;
using chunkattn::TokenSpans;

// Spans cover the tokens in order, none is empty or lies in two groups, and there are no more or longer ones than said.
void test_step(const TokenSpans& spans, int begin, int count) {
  const int64_t group = spans.geometry.group_tokens();
  const int end = begin + count;
  int covered = begin, index = 0;
  for (; spans.span(begin, end, index).count() > 0; ++index) {
    const TokenSpan span = spans.span(begin, end, index);
    CHECK(span.begin == covered, "begin ", begin, " count ", count, " index ", index, " from ", span.begin);
    CHECK(span.begin / group == (span.end - 1) / group, "begin ", begin, " count ", count, " index ", index);
    CHECK(!spans.single_tokens || span.count() == 1, "begin ", begin, " count ", count, " index ", index);
    CHECK(span.count() <= spans.longest(count), "begin ", begin, " count ", count, " longest ", spans.longest(count));
    covered = span.end;
  }
  CHECK(covered == end, "begin ", begin, " count ", count, " covered ", covered);
  CHECK(index <= spans.most(count), "begin ", begin, " count ", count, " most ", spans.most(count));
  for (int behind = index; behind < index + 3; ++behind) CHECK(spans.span(begin, end, behind).count() == 0, "behind");
}

// Some step of so many tokens has as many spans as it may have, and one as long.
void test_bounds_are_reached(const TokenSpans& spans, int count) {
  const int group = static_cast<int>(spans.geometry.group_tokens());
  bool most = false, longest = false;
  for (int begin = 0; begin < group; ++begin) {
    most = most || spans.span(begin, begin + count, spans.most(count) - 1).count() > 0;
    longest = longest || spans.span(begin, begin + count, 0).count() == spans.longest(count);
  }
  CHECK(most && longest, "group ", group, " count ", count);
}

}  // namespace

int main() {
  for (const bool single : {false, true}) {
    for (const int region_size : {1, 2, 5}) {
      for (const int merge : {1, 3}) {
        const TokenSpans spans{{region_size, merge}, single};
        for (int begin = 0; begin < 40; ++begin) {
          for (int count = 0; count < 40; ++count) test_step(spans, begin, count);
        }
        for (int count = 1; count < 40; ++count) test_bounds_are_reached(spans, count);
      }
    }
    // Sizes whose products have 62 bits, and positions up to 2^31 - 1.
    constexpr int kLargest = INT32_MAX;
    const TokenSpans wide{{kLargest, kLargest}, single};
    test_step(wide, 0, 3);
    test_step(wide, kLargest - 3, 3);
    test_step({{16, 128}, single}, kLargest - 5000, 5000);
  }
  return chunkattn::test::report();
}
