#include "cpu/forward_tile.h"
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

}  // namespace

void dca_forward(const ForwardParams& params, ParallelFor parallel_for) {
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

}  // namespace chunkattn::cpu
