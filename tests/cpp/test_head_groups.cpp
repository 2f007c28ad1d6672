// Groups of heads: every plane is in one group, where its own tensors are; long calls have several, and two workspaces
// do for all.
#include <cstdint>

#include "check.h"
#include "cuda/backward/groups.h"
#include "cuda/backward/plan.h"
#include "kernels.h"

namespace {

using chunkattn::AttentionShape;
using chunkattn::BackwardParams;
using chunkattn::ForwardParams;
using chunkattn::Strides;
using chunkattn::cuda::blocks_beside_loop;
using chunkattn::cuda::head_groups;
using chunkattn::cuda::HeadGroups;
using chunkattn::cuda::params_of_group;

// Tensors that lie nowhere, each at an address and with strides of its own.
BackwardParams make_call(const AttentionShape& shape, int total) {
  BackwardParams params{};
  ForwardParams& forward = params.forward;
  forward.shape = shape;
  forward.geometry = {3072, 512};
  static const int offsets[] = {0, 0};
  static const float temperature[64] = {};
  if (total > 0) forward.cu_seqlens_q = forward.cu_seqlens_k = offsets;
  forward.total_q = forward.total_k = total;
  forward.temperature = temperature;
  forward.softmax_lse = reinterpret_cast<float*>(uintptr_t{1} << 50);
  int64_t index = 0;
  const auto place = [&](auto*& tensor, Strides& strides, int heads) {
    ++index;
    tensor = reinterpret_cast<void*>(static_cast<uintptr_t>(index) << 40);
    const int64_t row = int64_t{shape.head_dim} * heads + 8 * index;
    strides = {total > 0 ? 0 : row * shape.seqlen_k, row, shape.head_dim};
  };
  place(forward.q, forward.q_strides, shape.heads);
  place(forward.k, forward.k_strides, shape.kv_heads);
  place(forward.v, forward.v_strides, shape.kv_heads);
  place(forward.out, forward.out_strides, shape.heads);
  place(params.dout, params.dout_strides, shape.heads);
  place(params.dq, params.dq_strides, shape.heads);
  place(params.dk, params.dk_strides, shape.kv_heads);
  place(params.dv, params.dv_strides, shape.kv_heads);
  return params;
}

uintptr_t element(const void* tensor, const Strides& strides, int batch, int head) {
  return reinterpret_cast<uintptr_t>(tensor) + 2 * (batch * strides.batch + head * strides.head);
}

bool same_head(const BackwardParams& a, int a_batch, int a_head, const BackwardParams& b, int b_batch, int b_head) {
  const auto same = [&](const void* x, const void* y, const Strides& strides) {
    return element(x, strides, a_batch, a_head) == element(y, strides, b_batch, b_head);
  };
  const ForwardParams &f = a.forward, &g = b.forward;
  return same(f.q, g.q, f.q_strides) && same(f.out, g.out, f.out_strides) && same(a.dout, b.dout, a.dout_strides) &&
         same(a.dq, b.dq, a.dq_strides) &&
         f.softmax_lse + f.lse_row(a_batch, a_head) == g.softmax_lse + g.lse_row(b_batch, b_head);
}

bool same_kv_head(const BackwardParams& a, int a_batch, int a_head, const BackwardParams& b, int b_batch, int b_head) {
  const auto same = [&](const void* x, const void* y, const Strides& strides) {
    return element(x, strides, a_batch, a_head) == element(y, strides, b_batch, b_head);
  };
  const ForwardParams &f = a.forward, &g = b.forward;
  return same(f.k, g.k, f.k_strides) && same(f.v, g.v, f.v_strides) && same(a.dk, b.dk, a.dk_strides) &&
         same(a.dv, b.dv, a.dv_strides);
}

// Sequences of a packed call are all in each group.
void test_parts(const BackwardParams& call, const HeadGroups& groups) {
  const AttentionShape& all = call.forward.shape;
  const bool packed = call.forward.packed();
  int batch = 0, kv_head = 0;  // which come next
  for (int index = 0; index < groups.count(); ++index) {
    const BackwardParams group = params_of_group(call, groups, index);
    const AttentionShape& shape = group.forward.shape;
    CHECK(shape.batch > 0 && shape.kv_heads > 0 && shape.heads * all.kv_heads == all.heads * shape.kv_heads, "group ",
          index, ": batch ", shape.batch, " heads ", shape.heads, " / ", shape.kv_heads);
    CHECK(packed ? shape.batch == all.batch : shape.batch == 1 || shape.kv_heads == all.kv_heads, "group ", index);
    const int heads_per_kv = all.heads / all.kv_heads;
    const int first = packed ? 0 : batch;
    for (int b = 0; b < (packed ? 1 : shape.batch); ++b) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        CHECK(same_kv_head(group, b, h, call, first + b, kv_head + h), "group ", index, " batch ", b, " KV head ", h);
      }
      for (int h = 0; h < shape.heads; ++h) {
        CHECK(same_head(group, b, h, call, first + b, kv_head * heads_per_kv + h), "group ", index, " batch ", b,
              " head ", h);
      }
    }
    CHECK(group.forward.temperature == call.forward.temperature + first, "group ", index);
    kv_head += shape.kv_heads;
    if (kv_head < all.kv_heads) continue;
    kv_head = 0;
    batch += packed ? all.batch : shape.batch;
  }
  CHECK(batch == all.batch && kv_head == 0, "groups end at batch ", batch, " KV head ", kv_head);
}

void test_every_cut() {
  for (int batch : {1, 2, 3, 5}) {
    for (int kv_heads : {1, 2, 5, 8}) {
      for (int ratio : {1, 4}) {
        const AttentionShape shape{batch, 300, 400, kv_heads * ratio, kv_heads, 64};
        for (int parts = 1; parts <= batch; ++parts) test_parts(make_call(shape, 0), {parts, 1});
        for (int parts = 1; parts <= kv_heads; ++parts) {
          test_parts(make_call(shape, 0), {batch, parts});
          test_parts(make_call(shape, 700), {1, parts});
        }
      }
    }
  }
}

int count_groups(const AttentionShape& shape, bool deterministic = false) {
  const BackwardParams call = make_call(shape, 0);
  const HeadGroups groups = head_groups(call.forward, deterministic);
  test_parts(call, groups);
  return groups.count();
}

void test_rule() {
  CHECK(count_groups({1, 1, 1, 1, 1, 1}) == 1, "one query");
  CHECK(count_groups({4, 2048, 2048, 8, 8, 128}) == 1, "short");
  CHECK(count_groups({1, 32768, 32768, 32, 32, 128}, true) == 1, "deterministic");
  CHECK(count_groups({1, 8192, 8192, 32, 32, 128}) == 4, "8k");
  CHECK(count_groups({1, 32768, 32768, 32, 32, 128}) == 8, "32k");
  CHECK(count_groups({1, 32768, 32768, 32, 8, 128}) == 4, "eight KV heads");
  CHECK(count_groups({1, 32768, 32768, 32, 2, 128}) == 1, "two KV heads");
  CHECK(count_groups({1, 131072, 131072, 1, 1, 128}) == 1, "one head");
  CHECK(count_groups({2, 32768, 32768, 32, 32, 128}) == 8, "two rows");
  CHECK(count_groups({64, 8192, 8192, 32, 32, 128}) == 8, "many rows");
  CHECK(count_groups({3, 32768, 32768, 5, 5, 128}) == 9, "three rows");
  BackwardParams packed = make_call({16, 8192, 8192, 32, 8, 128}, 40000);
  CHECK(head_groups(packed.forward, false).count() == 4, "packed");
  packed = make_call({16, 1 << 30, 1 << 30, 32, 8, 128}, 400);
  CHECK(head_groups(packed.forward, false).count() == 1, "packed, a maximum far above the lengths");
  packed.forward.shape.batch = 0;
  packed.forward.cu_seqlens_q = packed.forward.cu_seqlens_k = nullptr;
  CHECK(head_groups(packed.forward, false).count() == 1, "nothing");

  // LONG_CALLS of tests/test_dca_backward.py, and what tests/test_varlen.py packs: they are there for their groups.
  for (const AttentionShape& shape : {AttentionShape{1, 8192, 8192, 32, 16, 128},
                                      {1, 6000, 6000, 50, 25, 128},
                                      {3, 8000, 8000, 6, 6, 128},
                                      {2, 4096, 12000, 16, 8, 64},
                                      {1, 8192, 8192, 16, 16, 256}}) {
    CHECK(count_groups(shape) == 2, "head_dim ", shape.head_dim, " heads ", shape.heads, " / ", shape.kv_heads);
  }
  packed = make_call({4, 9000, 9000, 20, 10, 128}, 16000);
  packed.forward.total_q = 13000;
  CHECK(head_groups(packed.forward, false).count() == 2, "packed, of tests/test_varlen.py");

  constexpr int kMultiprocessors = 132;
  int before = 4 * kMultiprocessors;
  for (int seqlen = 1; seqlen < (1 << 22); seqlen *= 2) {
    const int blocks = blocks_beside_loop(make_call({1, seqlen, seqlen, 1, 1, 64}, 0).forward, kMultiprocessors);
    CHECK(blocks > 0 && blocks <= before, "seqlen ", seqlen, " blocks ", blocks, " after ", before);
    before = blocks;
  }
}

// Where a call is eight groups the workspace is smaller than a float32 tensor of dQ's shape.
void test_workspace() {
  for (const AttentionShape& shape : {AttentionShape{1, 16384, 16384, 32, 32, 128},
                                      {1, 65536, 65536, 32, 8, 128},
                                      {1, 131072, 131072, 32, 8, 64},
                                      {8, 16384, 16384, 16, 4, 256}}) {
    const BackwardParams call = make_call(shape, 0);
    const double dq = 4.0 * shape.batch * shape.seqlen_q * shape.heads * shape.head_dim;
    const double bytes = static_cast<double>(chunkattn::cuda::backward_workspace_bytes(call, false));
    CHECK(bytes > 0 && bytes <= dq, "bytes ", bytes, " of ", dq);
    const double in_turns = static_cast<double>(chunkattn::cuda::backward_workspace_bytes(call, true));
    CHECK(in_turns > dq && in_turns <= 3 * dq, "bytes ", in_turns, " of ", dq);
  }
}

}  // namespace

int main() {
  test_every_cut();
  test_rule();
  test_workspace();
  return chunkattn::test::report();
}
