#include "cpu/forward_tile.h"
#include "cpu/sequences.h"
#include "group_attention.h"
#include "kernels.h"

namespace chunkattn::cpu {
namespace {

template <class Storage, class Operand>
void run_forward(const ForwardParams& params, const RegionLists* regions, ParallelFor parallel_for) {
  const auto keys_and_values = make_keys_and_values<Storage, Operand>(params, parallel_for);
  for_each_forward_tile<Storage, Operand>(
      params, regions, keys_and_values, parallel_for,
      [&](const ForwardTile<Storage, Operand>& tile, int batch, int head, QueryTile query_tile) {
        const int query = query_tile.begin - params.first_position();
        tile.write_out(0, rows_of<Storage>(params.out, params.out_strides, batch, query, head));
        float* const lse = params.softmax_lse + params.lse_row(batch, head) + query;
        for (int n = 0; n < tile.rows(); ++n) lse[n] = static_cast<float>(tile.lse_log2(n) * kLn2);
      });
}

void forward_batch(const ForwardParams& params, ParallelFor parallel_for) {
  with_element_types(params.dtype, [&]<class Storage, class Operand> {
    run_forward<Storage, Operand>(params, nullptr, parallel_for);
  });
}

void forward_sequence(const ForwardParams& params, const PackedSequence& sequence, ParallelFor parallel_for) {
  const AttentionShape& shape = params.shape;
  zero_rows(params.out, params.out_strides, sequence.rows.first_q, sequence.unseeing, shape.heads, shape.head_dim,
            params.dtype);
  const int queries = sequence.seeing();
  const Buffer<float> lse(static_cast<int64_t>(shape.heads) * queries);
  if (queries > 0) forward_batch(batch_of_one(params, sequence, lse.data()), parallel_for);
  for (int head = 0; head < shape.heads; ++head) {
    float* const to = packed_lse(params, sequence, head);
    std::fill_n(to - sequence.unseeing, sequence.unseeing, -std::numeric_limits<float>::infinity());
    std::copy_n(lse.data() + static_cast<int64_t>(head) * queries, queries, to);
  }
}

}  // namespace

void dca_forward(const ForwardParams& params, ParallelFor parallel_for) {
  if (!params.packed()) return forward_batch(params, parallel_for);
  for_each_sequence(params, parallel_for, [&](const PackedSequence& sequence, ParallelFor threads) {
    forward_sequence(params, sequence, threads);
  });
}

void select_merge_forward(const SelectMergeParams& params, ParallelFor parallel_for) {
  const ForwardParams forward = group_attention(params);
  with_element_types(params.dtype, [&]<class Storage, class Operand> {
    run_forward<Storage, Operand>(forward, &params.regions, parallel_for);
  });
}

}  // namespace chunkattn::cpu
