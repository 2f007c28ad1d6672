// Where packed sequences lie: ForwardParams::sequence, which stays inside the tensors whatever the offsets hold, and
// ForwardParams::lse_row.
#include <climits>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "params.h"

namespace {

using chunkattn::ForwardParams;
using chunkattn::Sequence;

constexpr int kTotalQ = 20;
constexpr int kTotalK = 50;
constexpr int kMaxSeqlenQ = 9;
constexpr int kMaxSeqlenK = 30;

ForwardParams packed_params(const std::vector<int>& cu_seqlens_q, const std::vector<int>& cu_seqlens_k) {
  ForwardParams params{};
  params.shape.batch = static_cast<int>(cu_seqlens_q.size()) - 1;
  params.shape.heads = 3;
  params.shape.seqlen_q = kMaxSeqlenQ;
  params.shape.seqlen_k = kMaxSeqlenK;
  params.cu_seqlens_q = cu_seqlens_q.data();
  params.cu_seqlens_k = cu_seqlens_k.data();
  params.total_q = kTotalQ;
  params.total_k = kTotalK;
  return params;
}

void test_plain_batch() {
  ForwardParams params{};
  params.shape = {4, 7, 11, 3, 1, 64};
  for (int batch = 0; batch < 4; ++batch) {
    const Sequence rows = params.sequence(batch);
    CHECK(rows.first_q == 0 && rows.first_k == 0, "batch ", batch);
    CHECK(rows.seqlen_q == 7 && rows.seqlen_k == 11, "batch ", batch);
    CHECK(rows.first_position() == params.first_position(), "batch ", batch);
    for (int head = 0; head < 3; ++head) {
      CHECK(params.lse_row(batch, head) == (batch * 3 + head) * 7, "batch ", batch, ", head ", head);
    }
  }
}

void test_good_offsets() {
  const std::vector<int> cu_seqlens_q = {0, 5, 5, 14, 20};
  const std::vector<int> cu_seqlens_k = {0, 30, 31, 31, 50};
  const ForwardParams params = packed_params(cu_seqlens_q, cu_seqlens_k);
  for (int batch = 0; batch < params.shape.batch; ++batch) {
    const Sequence rows = params.sequence(batch);
    CHECK(rows.first_q == cu_seqlens_q[batch], "batch ", batch);
    CHECK(rows.first_k == cu_seqlens_k[batch], "batch ", batch);
    CHECK(rows.seqlen_q == cu_seqlens_q[batch + 1] - cu_seqlens_q[batch], "batch ", batch);
    CHECK(rows.seqlen_k == cu_seqlens_k[batch + 1] - cu_seqlens_k[batch], "batch ", batch);
    CHECK(params.lse_row(batch, 2) == 2 * kTotalQ + cu_seqlens_q[batch], "batch ", batch);
  }
}

// Every pair of offsets, good or not.
void test_any_offsets() {
  const std::initializer_list<int> offsets = {INT_MIN, -1, 0, 1, 9, 10, 19, 20, 21, 49, 50, 51, INT_MAX};
  for (const int begin : offsets) {
    for (const int end : offsets) {
      const std::vector<int> cu_seqlens = {begin, end};
      const ForwardParams params = packed_params(cu_seqlens, cu_seqlens);
      const Sequence rows = params.sequence(0);
      CHECK(rows.first_q >= 0 && rows.seqlen_q >= 0 && rows.first_q + rows.seqlen_q <= kTotalQ, begin, " .. ", end);
      CHECK(rows.first_k >= 0 && rows.seqlen_k >= 0 && rows.first_k + rows.seqlen_k <= kTotalK, begin, " .. ", end);
      CHECK(rows.seqlen_q <= kMaxSeqlenQ && rows.seqlen_k <= kMaxSeqlenK, begin, " .. ", end);
      CHECK(params.lse_row(0, 2) >= 2 * kTotalQ && params.lse_row(0, 2) <= 3 * kTotalQ, begin, " .. ", end);
    }
  }
}

}  // namespace

int main() {
  test_plain_batch();
  test_good_offsets();
  test_any_offsets();
  return chunkattn::test::report();
}
