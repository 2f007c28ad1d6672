#include "cpu/forward_tile.h"
#include "cpu/sequences.h"
#include "kernels.h"

namespace chunkattn::cpu {
namespace {

template <class Storage, class Operand>
void run_forward(const ForwardParams& params, ParallelFor parallel_for) {
  const auto keys_and_values = make_keys_and_values<Storage, Operand>(params, parallel_for);
  for_each_forward_tile<Storage, Operand>(
      params, keys_and_values, parallel_for,
      [&](const ForwardTile<Storage, Operand>& tile, int batch, int head, QueryTile query_tile) {
        const int query = query_tile.begin - params.first_position();
        tile.write_out(0, rows_of<Storage>(params.out, params.out_strides, batch, query, head));
        const int64_t row = (static_cast<int64_t>(batch) * params.shape.heads + head) * params.shape.seqlen_q;
        float* const lse = params.softmax_lse + row + query;
        for (int n = 0; n < tile.rows(); ++n) lse[n] = static_cast<float>(tile.lse_log2(n) * kLn2);
      });
}

void forward_batch(const ForwardParams& params, ParallelFor parallel_for) {
  switch (params.dtype) {
    case DataType::kFloat64:
      return run_forward<double, double>(params, parallel_for);
    case DataType::kFloat32:
      return run_forward<float, float>(params, parallel_for);
    case DataType::kBFloat16:
      return has_fast_bfloat16_gemm() ? run_forward<BFloat16, BFloat16>(params, parallel_for)
                                      : run_forward<BFloat16, float>(params, parallel_for);
    case DataType::kFloat16:
      return run_forward<Float16, float>(params, parallel_for);
  }
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

}  // namespace chunkattn::cpu
