// Selection and merge.
#include <algorithm>

#include "cpu/group_selection.h"
#include "cpu/operands.h"
#include "kernels.h"

namespace chunkattn::cpu {
namespace {

// The semantic token of a region, [head_dim]: the mean of its rows. Those of several heads are added up.
template <class Storage>
void average_region(const void* tensor, const Strides& strides, const SelectParams& params, int batch, int head_begin,
                    int head_end, int region, Accumulator<Storage>* mean) {
  using Accum = Accumulator<Storage>;
  const int begin = region * params.geometry.region_size;
  const int tokens = std::min(params.geometry.region_size, params.shape.seqlen_k - begin);
  const int head_dim = params.shape.head_dim;
  std::fill_n(mean, head_dim, Accum(0));
  for (int head = head_begin; head < head_end; ++head) {
    add_rows(rows_of<Storage>(tensor, strides, batch, begin, head), tokens, head_dim, mean);
  }
  for (int d = 0; d < head_dim; ++d) mean[d] /= Accum(tokens);
}

// Of all keys: [batch, kv_heads, regions, head_dim].
template <class Storage>
Buffer<Accumulator<Storage>> average_keys(const SelectParams& params, ParallelFor parallel_for) {
  const AttentionShape& shape = params.shape;
  const int regions = params.geometry.regions(shape.seqlen_k);
  const int64_t count = static_cast<int64_t>(shape.batch) * shape.kv_heads * regions;
  Buffer<Accumulator<Storage>> means(count * shape.head_dim);
  for_each_task(parallel_for, count, [&] {
    return [&](int64_t task) {
      const int region = static_cast<int>(task % regions);
      const int head = static_cast<int>(task / regions % shape.kv_heads);
      const int batch = static_cast<int>(task / regions / shape.kv_heads);
      average_region<Storage>(params.k, params.k_strides, params, batch, head, head + 1, region,
                              means.data() + task * shape.head_dim);
    };
  });
  return means;
}

// Chooses the regions of a group of a call.
template <class Storage>
void select_group(const SelectParams& params, const Accumulator<Storage>* key_means, int batch, int index_head,
                  int group, GroupSelection<Accumulator<Storage>>& selection, int* ids) {
  using Accum = Accumulator<Storage>;
  const AttentionShape& shape = params.shape;
  const RegionGeometry& geometry = params.geometry;
  const int regions = geometry.regions(shape.seqlen_k);
  const int first = geometry.first_region(group);
  const int first_voter = params.voters == Voters::kOwnGroup ? first : std::max(0, first - geometry.merge);
  const int rows = static_cast<int>(std::min<int64_t>(geometry.merge, regions - first_voter));
  const int kv_head = index_head / (params.index_heads / shape.kv_heads);
  const Accum* const keys =
      key_means + (static_cast<int64_t>(batch) * shape.kv_heads + kv_head) * regions * shape.head_dim;
  const int share = shape.heads / params.index_heads;
  selection.run(
      rows, keys, [&](int row) { return geometry.eligible_end(params.eligibility, group, row); },
      [&](int first_row, int count, Accum* to) {
        for (int n = 0; n < count; ++n) {
          average_region<Storage>(params.q, params.q_strides, params, batch, index_head * share,
                                  (index_head + 1) * share, first_voter + first_row + n, to + n * shape.head_dim);
        }
      },
      ids);
}

template <class Storage>
void run_select(const SelectParams& params, ParallelFor parallel_for) {
  const auto key_means = average_keys<Storage>(params, parallel_for);
  const int groups = params.geometry.groups(params.shape.seqlen_k);
  const int64_t batch_heads = static_cast<int64_t>(params.shape.batch) * params.index_heads;
  for_each_task(parallel_for, batch_heads * groups, [&] {
    return [&, selection =
                   GroupSelection<Accumulator<Storage>>(params.shape.head_dim, params.top_k)](int64_t task) mutable {
      const int group = groups - 1 - static_cast<int>(task / batch_heads);
      const int64_t list = task % batch_heads;
      select_group<Storage>(params, key_means.data(), static_cast<int>(list / params.index_heads),
                            static_cast<int>(list % params.index_heads), group, selection,
                            params.indices + (list * groups + group) * params.top_k);
    };
  });
}

}  // namespace

void select(const SelectParams& params, ParallelFor parallel_for) {
  with_element_types(params.dtype, [&]<class Storage, class Operand> { run_select<Storage>(params, parallel_for); });
}

}  // namespace chunkattn::cpu
