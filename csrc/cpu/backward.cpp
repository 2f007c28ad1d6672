#include <vector>

#include "cpu/backward_unit.h"
#include "cpu/forward_tile.h"
#include "cpu/sequences.h"
#include "group_attention.h"
#include "kernels.h"

namespace chunkattn::cpu {
namespace {

struct BackwardPlan {
  QueryTiling tiling;
  std::vector<BackwardShare> shares;  // the longest first
  int max_keys;                       // of a share whose key gradients are wanted
};

template <class Add>
void for_each_kv_head(const AttentionShape& shape, const Add& add) {
  const int group = shape.heads / shape.kv_heads;
  for (int batch = 0; batch < shape.batch; ++batch) {
    for (int head = 0; head < shape.kv_heads; ++head) add(batch, head * group, (head + 1) * group);
  }
}

// One share per KV head takes five matrix products for each block. Where these would leave threads idle, queries and
// keys get shares of their own: as many as are wanted, but logits and dP are computed twice, seven products.
BackwardPlan plan_backward(const ForwardParams& params, ParallelFor parallel_for, int tile_size) {
  const AttentionShape& shape = params.shape;
  const int64_t kv_heads = static_cast<int64_t>(shape.batch) * shape.kv_heads;
  const int threads = count_threads(parallel_for);
  const int64_t rounds = (kv_heads + threads - 1) / threads;
  if (7 * kv_heads >= 5 * rounds * threads) {
    BackwardPlan plan = {tile_queries(params, tile_size), {}, shape.seqlen_k};
    for_each_kv_head(shape, [&](int batch, int head_begin, int head_end) {
      plan.shares.push_back({batch, head_begin, head_end, 0, plan.tiling.count(), 0, shape.seqlen_k, true, true});
    });
    return plan;
  }
  const int size = choose_tile_size(params, static_cast<int64_t>(shape.batch) * shape.heads, parallel_for, tile_size);
  BackwardPlan plan = {tile_queries(params, size), {}, size};
  const int tiles = plan.tiling.count();
  for (int key = 0; key < shape.seqlen_k; key += size) {
    const int key_end = std::min(key + size, shape.seqlen_k);
    for_each_kv_head(shape, [&](int batch, int head_begin, int head_end) {
      plan.shares.push_back({batch, head_begin, head_end, 0, tiles, key, key_end, false, true});
    });
  }
  for (int tile = tiles - 1; tile >= 0; --tile) {
    for_each_kv_head(shape, [&](int batch, int head_begin, int head_end) {
      for (int head = head_begin; head < head_end; ++head) {
        plan.shares.push_back({batch, head, head + 1, tile, tile + 1, 0, shape.seqlen_k, true, false});
      }
    });
  }
  return plan;
}

// delta of a query
template <class Storage>
Accumulator<Storage> out_dot_gradient(const BackwardParams& params, int batch, int head, int query) {
  const ForwardParams& forward = params.forward;
  const Storage* const out =
      rows_of<Storage>(static_cast<const void*>(forward.out), forward.out_strides, batch, query, head).data;
  const Storage* const dout = rows_of<Storage>(params.dout, params.dout_strides, batch, query, head).data;
  Accumulator<Storage> delta;
  vectorized(CHUNKATTN_LOOPS(bytes) {
    delta = dot_row<Simd<Accumulator<Storage>, bytes>>(out, dout, forward.shape.head_dim);
  });
  return delta;
}

template <class Storage, class Operand>
void compute_statistics(const BackwardParams& params, const RegionLists* regions,
                        const KeysAndValues<Storage, Operand>& keys_and_values, ParallelFor parallel_for,
                        QueryStatistics<Accumulator<Storage>> statistics) {
  const ForwardParams& forward = params.forward;
  const AttentionShape& shape = forward.shape;
  for_each_task(parallel_for, static_cast<int64_t>(shape.batch) * shape.heads, [&] {
    return [&](int64_t task) {
      const int batch = static_cast<int>(task / shape.heads);
      const int head = static_cast<int>(task % shape.heads);
      for (int query = 0; query < shape.seqlen_q; ++query) {
        const int64_t i = task * shape.seqlen_q + query;
        statistics.lse_log2[i] = static_cast<Accumulator<Storage>>(forward.softmax_lse[i] * kLog2E);
        statistics.delta[i] = out_dot_gradient<Storage>(params, batch, head, query);
      }
    };
  });
  if constexpr (std::is_same_v<Storage, double>) {
    // softmax_lse is float: too coarse for gradients in double.
    for_each_forward_tile<Storage, Operand>(
        forward, regions, keys_and_values, parallel_for,
        [&](const ForwardTile<Storage, Operand>& tile, int batch, int head, QueryTile query_tile) {
          const int64_t row = (static_cast<int64_t>(batch) * shape.heads + head) * shape.seqlen_q;
          double* const lse = statistics.lse_log2 + row + (query_tile.begin - forward.first_position());
          for (int n = 0; n < tile.rows(); ++n) lse[n] = tile.lse_log2(n);
        });
  }
}

template <class Storage, class Operand>
void run_backward(const BackwardParams& params, const RegionLists* regions, ParallelFor parallel_for) {
  using Accum = Accumulator<Storage>;
  const ForwardParams& forward = params.forward;
  const auto keys_and_values = make_keys_and_values<Storage, Operand>(forward, parallel_for);
  const int64_t queries = static_cast<int64_t>(forward.shape.batch) * forward.shape.heads * forward.shape.seqlen_q;
  const Buffer<Accum> lse_log2(queries);
  const Buffer<Accum> delta(queries);
  const QueryStatistics<Accum> statistics = {lse_log2.data(), delta.data()};
  compute_statistics(params, regions, keys_and_values, parallel_for, statistics);

  using Unit = BackwardUnit<Storage, Operand>;
  const BackwardPlan plan = plan_backward(forward, parallel_for, Unit::kQueries);
  for_each_task(parallel_for, static_cast<int64_t>(plan.shares.size()), [&] {
    return [&, unit = Unit(params, regions, keys_and_values, statistics, plan.tiling, plan.max_keys)](
               int64_t task) mutable { unit.run(plan.shares[task]); };
  });
}

void backward_batch(const BackwardParams& params, ParallelFor parallel_for) {
  with_element_types(params.forward.dtype, [&]<class Storage, class Operand> {
    run_backward<Storage, Operand>(params, nullptr, parallel_for);
  });
}

void backward_sequence(const BackwardParams& params, const PackedSequence& sequence, ParallelFor parallel_for) {
  const ForwardParams& forward = params.forward;
  const AttentionShape& shape = forward.shape;
  const DataType dtype = forward.dtype;
  const Sequence& rows = sequence.rows;
  zero_rows(params.dq, params.dq_strides, rows.first_q, sequence.unseeing, shape.heads, shape.head_dim, dtype);
  const int queries = sequence.seeing();
  if (queries == 0) {
    zero_rows(params.dk, params.dk_strides, rows.first_k, rows.seqlen_k, shape.kv_heads, shape.head_dim, dtype);
    zero_rows(params.dv, params.dv_strides, rows.first_k, rows.seqlen_k, shape.kv_heads, shape.head_dim, dtype);
    return;
  }
  const Buffer<float> lse(static_cast<int64_t>(shape.heads) * queries);
  for (int head = 0; head < shape.heads; ++head) {
    std::copy_n(packed_lse(forward, sequence, head), queries, lse.data() + static_cast<int64_t>(head) * queries);
  }
  BackwardParams one = params;
  one.forward = batch_of_one(forward, sequence, lse.data());
  one.dout = from_row(params.dout, params.dout_strides, rows.first_q + sequence.unseeing, dtype);
  one.dq = from_row(params.dq, params.dq_strides, rows.first_q + sequence.unseeing, dtype);
  one.dk = from_row(params.dk, params.dk_strides, rows.first_k, dtype);
  one.dv = from_row(params.dv, params.dv_strides, rows.first_k, dtype);
  backward_batch(one, parallel_for);
}

}  // namespace

void dca_backward(const BackwardParams& params, ParallelFor parallel_for) {
  if (!params.forward.packed()) return backward_batch(params, parallel_for);
  for_each_sequence(params.forward, parallel_for, [&](const PackedSequence& sequence, ParallelFor threads) {
    backward_sequence(params, sequence, threads);
  });
}

void select_merge_backward(const SelectMergeBackwardParams& params, ParallelFor parallel_for) {
  const BackwardParams backward = group_attention(params);
  with_element_types(backward.forward.dtype, [&]<class Storage, class Operand> {
    run_backward<Storage, Operand>(backward, &params.forward.regions, parallel_for);
  });
}

}  // namespace chunkattn::cpu
