#include "cpu/forward_tile.h"
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
        tile.write_out();
        const int64_t row = (static_cast<int64_t>(batch) * params.shape.heads + head) * params.shape.seqlen_q;
        float* const lse = params.softmax_lse + row + (query_tile.begin - params.first_position());
        for (int n = 0; n < tile.rows(); ++n) lse[n] = static_cast<float>(tile.lse_log2(n) * kLn2);
      });
}

}  // namespace

void dca_forward(const ForwardParams& params, ParallelFor parallel_for) {
  with_element_types(params.dtype, [&]<class Storage, class Operand> {
    run_forward<Storage, Operand>(params, nullptr, parallel_for);
  });
}

void select_merge_forward(const SelectMergeParams& params, ParallelFor parallel_for) {
  const ForwardParams forward = group_attention(params);
  with_element_types(params.dtype, [&]<class Storage, class Operand> {
    run_forward<Storage, Operand>(forward, &params.regions, parallel_for);
  });
}

}  // namespace chunkattn::cpu
