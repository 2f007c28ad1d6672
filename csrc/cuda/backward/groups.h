// How dca_backward cuts its heads into groups. While the main loop has one group, the steps around it finish the group
// before and prepare the next, and only two groups need a workspace. Host only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace chunkattn::cuda {

// Groups take turns at so many workspaces.
constexpr int kGroupWorkspaces = 2;

// Parts of the batch, or of the KV heads of every batch row.
struct HeadGroups {
  int batch_parts;
  int head_parts;  // more than one only where a part of the batch is one row: planes of a group are neighbours

  int count() const { return batch_parts * head_parts; }
};

// The keys a query attends to, on average. Of packed sequences as if all were as long as the longest may be.
inline double keys_per_query(const ForwardParams& forward) {
  const int seqlen_k = std::min(forward.shape.seqlen_k, forward.rows_k());
  return std::max(1.0, seqlen_k - 0.5 * std::min(forward.shape.seqlen_q, seqlen_k));
}

// Where tiles add to dq in turns all heads are one group: the more there are, the less a tile waits for another.
inline HeadGroups head_groups(const ForwardParams& forward, bool in_turns) {
  constexpr double kMost = 8;
  constexpr double kLeastWork = 3e11;   // floating-point operations: half a millisecond, beside which a launch is short
  constexpr double kLeastKeys = 65536;  // of all KV heads: tiles enough that long and short ones even out
  const AttentionShape& shape = forward.shape;
  const int entries = std::max(1, forward.entries());
  const double work =
      10.0 * forward.planes() * forward.rows_q() * keys_per_query(forward) * shape.head_dim;  // five products
  const double keys = 1.0 * entries * shape.kv_heads * forward.rows_k();
  const int wanted =
      in_turns ? 1 : static_cast<int>(std::max(1.0, std::min({kMost, work / kLeastWork, keys / kLeastKeys})));
  if (wanted <= entries) return {wanted, 1};
  return {entries, std::min(shape.kv_heads, (wanted + entries - 1) / entries)};
}

// Of one group, as if it were all.
inline BackwardParams params_of_group(const BackwardParams& params, const HeadGroups& groups, int index) {
  constexpr int kElementBytes = 2;
  const auto begin = [](int64_t count, int part, int parts) { return static_cast<int>(count * part / parts); };
  const ForwardParams& all = params.forward;
  const int batch_part = index / groups.head_parts, head_part = index % groups.head_parts;
  const int batch = begin(all.entries(), batch_part, groups.batch_parts);
  const int kv_head = begin(all.shape.kv_heads, head_part, groups.head_parts);
  const int heads_per_kv = all.shape.heads / all.shape.kv_heads;

  BackwardParams group = params;
  ForwardParams& forward = group.forward;
  if (!all.packed()) forward.shape.batch = begin(all.shape.batch, batch_part + 1, groups.batch_parts) - batch;
  forward.shape.kv_heads = begin(all.shape.kv_heads, head_part + 1, groups.head_parts) - kv_head;
  forward.shape.heads = forward.shape.kv_heads * heads_per_kv;
  const auto skip = [&](auto*& tensor, const Strides& strides, int head) {
    const int64_t elements = batch * strides.batch + head * strides.head;
    tensor = const_cast<char*>(static_cast<const char*>(tensor)) + elements * kElementBytes;
  };
  const int head = kv_head * heads_per_kv;
  skip(forward.q, forward.q_strides, head);
  skip(forward.k, forward.k_strides, kv_head);
  skip(forward.v, forward.v_strides, kv_head);
  skip(forward.out, forward.out_strides, head);
  skip(group.dout, group.dout_strides, head);
  skip(group.dq, group.dq_strides, head);
  skip(group.dk, group.dk_strides, kv_head);
  skip(group.dv, group.dv_strides, kv_head);
  forward.softmax_lse += (int64_t{batch} * all.shape.heads + head) * all.rows_q();
  if (all.temperature != nullptr && !all.packed()) forward.temperature += batch;
  return group;
}

// How many thread blocks the steps around the loop may have beside it, of a device with so many multiprocessors: as few
// as keep up with it. Each takes a multiprocessor's place among those of the loop.
inline int blocks_beside_loop(const ForwardParams& forward, int multiprocessors) {
  constexpr int kBlocksOfMultiprocessor = 4;
  // A multiprocessor takes as long for a query in these steps as in the loop, where that attends to some 400 keys.
  constexpr double kKeys = 1536;
  const double share = std::min(1.0, kKeys / keys_per_query(forward));
  return std::max(1, static_cast<int>(share * multiprocessors * kBlocksOfMultiprocessor));
}

}  // namespace chunkattn::cuda
