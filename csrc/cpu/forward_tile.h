// One query tile of one head, walking its key segments with one running softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gemm.h"
#include "cpu/operands.h"
#include "cpu/softmax.h"

namespace chunkattn::cpu {

template <class Storage, class Operand>
class ForwardTile {
 public:
  using Accum = Accumulator<Storage>;

  // The logits and probabilities of a block stay in a second-level cache of 2 MB. Tall blocks are best: BLAS packs K
  // and V for each. Rows a power of two apart would compete for the same lines of the first-level cache.
  static constexpr int kQueries = 512;
  static constexpr int kKeys = 192;
  static constexpr int kStride = kKeys + kRowMultiple;

  // For tiles of at most `queries` queries. regions: see TileSegments.
  ForwardTile(const ForwardParams& params, const RegionLists* regions,
              const KeysAndValues<Storage, Operand>& keys_and_values, int queries)
      : params_(params),
        keys_and_values_(keys_and_values),
        segments_(params, regions),
        head_dim_(params.shape.head_dim),
        queries_(queries * head_dim_),
        key_block_(kKeys * head_dim_),
        value_block_(kKeys * head_dim_),
        logits_(queries * kStride),
        separate_probabilities_(std::is_same_v<Operand, Accum> ? 0 : queries * kStride),
        out_(queries * head_dim_),
        shift_(queries),
        sum_(queries) {}

  // Leaves the tile's output and softmax state to the accessors below.
  void run(int batch, int head, QueryTile tile) {
    batch_ = batch;
    head_ = head;
    tile_ = tile;
    scale_ = static_cast<Accum>(logit_scale(params_, batch) * kLog2E);
    std::fill_n(shift_.data(), rows(), -std::numeric_limits<Accum>::infinity());
    std::fill_n(sum_.data(), rows(), Accum(0));
    bool first = true;
    segments_.for_each(batch, head, tile, {0, params_.shape.seqlen_k}, [&](const KeySegment& segment) {
      load_queries<Storage>(params_, batch, head, tile, segment.regime, queries_.data());
      for_each_block<kKeys>(segment, tile, [&](const LogitBlock& block, std::span<const KeyRange> ranges) {
        attend(block, ranges, first);
        first = false;
      });
    });
  }

  void write_out() const {
    const Rows<Storage> to =
        rows_of<Storage>(params_.out, params_.out_strides, batch_, tile_.begin - params_.first_position(), head_);
    vectorized(CHUNKATTN_LOOPS(bytes) {
      for (int n = 0; n < rows(); ++n) {
        const Accum* const from = out_.data() + n * head_dim_;
        const Accum sum = sum_.data()[n];
        convert_row<Simd<Accum, bytes>>(from, to.data + n * to.stride, head_dim_, sum == 0 ? Accum(0) : 1 / sum);
      }
    });
  }

  int rows() const { return tile_.end - tile_.begin; }

  // The log-sum-exp of a row of the tile, in bits.
  Accum lse_log2(int row) const { return shift_.data()[row] + std::log2(sum_.data()[row]); }

 private:
  void attend(const LogitBlock& block, std::span<const KeyRange> ranges, bool first) {
    const int kv_head = head_ / (params_.shape.heads / params_.shape.kv_heads);
    const auto& [keys, values] = keys_and_values_;
    const Rows<const Operand> k = keys.block(batch_, kv_head, ranges, key_block_.data());
    const Rows<const Operand> v = values.block(batch_, kv_head, ranges, value_block_.data());
    const int offset = block.first_row * head_dim_;
    Accum* const out = out_.data() + offset;
    const SoftmaxState<Accum> state = {shift_.data() + block.first_row, sum_.data() + block.first_row};
    gemm(Transpose::kNo, Transpose::kYes, block.rows, block.keys, head_dim_, queries_.data() + offset, head_dim_,
         k.data, static_cast<int>(k.stride), false, logits_.data(), kStride);
    vectorized(CHUNKATTN_LOOPS(bytes) {
      update_softmax<Simd<Accum, bytes>>(block, logits_.data(), probabilities(), kStride, scale_, state, first, out,
                                         head_dim_);
    });
    gemm(Transpose::kNo, Transpose::kNo, block.rows, head_dim_, block.keys, probabilities(), kStride, v.data,
         static_cast<int>(v.stride), !first, out, head_dim_);
  }

  Operand* probabilities() const {
    if constexpr (std::is_same_v<Operand, Accum>) {
      return logits_.data();
    } else {
      return separate_probabilities_.data();
    }
  }

  const ForwardParams& params_;
  const KeysAndValues<Storage, Operand>& keys_and_values_;
  TileSegments segments_;
  const int head_dim_;
  const Buffer<Operand> queries_;                 // [queries, head_dim]
  const Buffer<Operand> key_block_;               // [kKeys, head_dim]
  const Buffer<Operand> value_block_;             // [kKeys, head_dim]
  const Buffer<Accum> logits_;                    // [queries, kStride]
  const Buffer<Operand> separate_probabilities_;  // [queries, kStride] where they do not fit in place of the logits
  const Buffer<Accum> out_;                       // [queries, head_dim]
  const Buffer<Accum> shift_;                     // [queries]
  const Buffer<Accum> sum_;                       // [queries]
  int batch_ = 0;
  int head_ = 0;
  QueryTile tile_ = {};
  Accum scale_ = 0;
};

// Calls visit(tile, batch, head, query_tile) for every query tile of every head; `tile` has run.
template <class Storage, class Operand, class Visit>
void for_each_forward_tile(const ForwardParams& params, const RegionLists* regions,
                           const KeysAndValues<Storage, Operand>& keys_and_values, ParallelFor parallel_for,
                           const Visit& visit) {
  using Tile = ForwardTile<Storage, Operand>;
  const int64_t batch_heads = static_cast<int64_t>(params.shape.batch) * params.shape.heads;
  const int size = choose_tile_size(params, batch_heads, parallel_for, Tile::kQueries);
  const QueryTiling tiling = tile_queries(params, size);
  const int tiles = tiling.count();
  for_each_task(parallel_for, batch_heads * tiles, [&] {
    return [&, tile = Tile(params, regions, keys_and_values, std::min(size, params.shape.seqlen_q))](
               int64_t task) mutable {
      const QueryTile query_tile = tiling.tile(tiles - 1 - static_cast<int>(task / batch_heads));
      const int batch = static_cast<int>(task % batch_heads / params.shape.heads);
      const int head = static_cast<int>(task % params.shape.heads);
      tile.run(batch, head, query_tile);
      visit(tile, batch, head, query_tile);
    };
  });
}

}  // namespace chunkattn::cpu
