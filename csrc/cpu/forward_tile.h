// One query tile, of one head or of several that share a KV head, walking its key segments with one running softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gemm.h"
#include "cpu/operands.h"
#include "cpu/softmax.h"

namespace chunkattn::cpu {

// What a ForwardTile computes in one run.
struct TileWork {
  int batch;
  HeadRange heads;
  QueryTile tile;
  KeyRange keys;  // attended, among those the tile sees; begins no later than the tile's first query
};

template <class Storage, class Operand>
class ForwardTile {
 public:
  using Accum = Accumulator<Storage>;

  // The logits and probabilities of a block stay in a second-level cache of 2 MB. Tall blocks are best: BLAS packs K
  // and V for each. Rows a power of two apart would compete for the same lines of the first-level cache.
  static constexpr int kRows = 512;
  static constexpr int kKeys = 192;
  static constexpr int kStride = kKeys + kRowMultiple;

  // For tiles of at most `rows` rows: queries times heads.
  ForwardTile(int head_dim, int rows)
      : head_dim_(head_dim),
        queries_(rows * head_dim_),
        key_block_(kKeys * head_dim_),
        value_block_(kKeys * head_dim_),
        logits_(rows * kStride),
        separate_probabilities_(std::is_same_v<Operand, Accum> ? 0 : rows * kStride),
        out_(rows * head_dim_),
        shift_(rows),
        sum_(rows) {}

  // Leaves the tile's output and softmax state to the accessors below. regions: see TileSegments; heads that run
  // together have the same. keys_and_values has keys and values, of which block() and factor() are used: see
  // KeyOperand.
  template <class KeysAndValues>
  void run(const ForwardParams& params, const RegionLists* regions, const KeysAndValues& keys_and_values,
           const TileWork& work) {
    heads_ = work.heads.count();
    rows_ = (work.tile.end - work.tile.begin) * heads_;
    const int kv_head = work.heads.begin / (params.shape.heads / params.shape.kv_heads);
    scale_ = static_cast<Accum>(logit_scale(params, work.batch) * keys_and_values.keys.factor(kv_head) * kLog2E);
    value_factor_ = static_cast<Accum>(keys_and_values.values.factor(kv_head));
    std::fill_n(shift_.data(), rows_, -std::numeric_limits<Accum>::infinity());
    std::fill_n(sum_.data(), rows_, Accum(0));
    bool first = true;
    TileSegments segments(params, regions);
    segments.for_each(work.batch, work.heads.begin, work.tile, work.keys, [&](const KeySegment& segment) {
      load_queries<Storage>(params, work.batch, work.heads, work.tile, segment.regime, queries_.data());
      for_each_block<kKeys>(segment, work.tile, heads_, [&](const LogitBlock& block, std::span<const KeyRange> ranges) {
        const auto& [keys, values] = keys_and_values;
        attend(block, keys.block(work.batch, kv_head, ranges, key_block_.data()),
               values.block(work.batch, kv_head, ranges, value_block_.data()), first);
        first = false;
      });
    });
  }

  // The output of one of the heads, counted from 0, to `to`, a row for each query.
  template <class To>
  void write_out(int head, Rows<To> to) const {
    for (int n = head; n < rows_; n += heads_) {
      const Accum sum = sum_.data()[n];
      convert_rows(Rows<const Accum>{out_.data() + n * head_dim_, head_dim_},
                   Rows<To>{to.data + n / heads_ * to.stride, to.stride}, 1, head_dim_,
                   sum == 0 ? Accum(0) : value_factor_ / sum);
    }
  }

  // Rows of the tile: those of a query, one for each head, lie together.
  int rows() const { return rows_; }

  // The log-sum-exp of a row of the tile, in bits.
  Accum lse_log2(int row) const { return shift_.data()[row] + std::log2(sum_.data()[row]); }

 private:
  void attend(const LogitBlock& block, Rows<const Operand> keys, Rows<const Operand> values, bool first) {
    const int offset = block.first_row * head_dim_;
    Accum* const out = out_.data() + offset;
    const SoftmaxState<Accum> state = {shift_.data() + block.first_row, sum_.data() + block.first_row};
    gemm(Transpose::kNo, Transpose::kYes, block.rows, block.keys, head_dim_, queries_.data() + offset, head_dim_,
         keys.data, static_cast<int>(keys.stride), false, logits_.data(), kStride);
    update_softmax(block, logits_.data(), probabilities(), kStride, scale_, state, first, out, head_dim_);
    gemm(Transpose::kNo, Transpose::kNo, block.rows, head_dim_, block.keys, probabilities(), kStride, values.data,
         static_cast<int>(values.stride), !first, out, head_dim_);
  }

  Operand* probabilities() const {
    if constexpr (std::is_same_v<Operand, Accum>) {
      return logits_.data();
    } else {
      return separate_probabilities_.data();
    }
  }

  const int head_dim_;
  const Buffer<Operand> queries_;                 // [rows, head_dim]
  const Buffer<Operand> key_block_;               // [kKeys, head_dim]
  const Buffer<Operand> value_block_;             // [kKeys, head_dim]
  const Buffer<Accum> logits_;                    // [rows, kStride]
  const Buffer<Operand> separate_probabilities_;  // [rows, kStride] where they do not fit in place of the logits
  const Buffer<Accum> out_;                       // [rows, head_dim]
  const Buffer<Accum> shift_;                     // [rows]
  const Buffer<Accum> sum_;                       // [rows]
  int heads_ = 1;
  int rows_ = 0;
  Accum scale_ = 0;
  Accum value_factor_ = 1;
};

// Calls visit(tile, batch, head, query_tile) for every query tile of every head; `tile` has run.
template <class Storage, class Operand, class Visit>
void for_each_forward_tile(const ForwardParams& params, const RegionLists* regions,
                           const KeysAndValues<Storage, Operand>& keys_and_values, ParallelFor parallel_for,
                           const Visit& visit) {
  using Tile = ForwardTile<Storage, Operand>;
  const AttentionShape& shape = params.shape;
  const int64_t batch_heads = static_cast<int64_t>(shape.batch) * shape.heads;
  const int size = choose_tile_size(params, batch_heads, parallel_for, Tile::kRows);
  const QueryTiling tiling = tile_queries(params, size);
  const int tiles = tiling.count();
  for_each_task(parallel_for, batch_heads * tiles, [&] {
    return [&, tile = Tile(shape.head_dim, std::min(size, shape.seqlen_q))](int64_t task) mutable {
      const QueryTile query_tile = tiling.tile(tiles - 1 - static_cast<int>(task / batch_heads));
      const int batch = static_cast<int>(task % batch_heads / shape.heads);
      const int head = static_cast<int>(task % shape.heads);
      tile.run(params, regions, keys_and_values, {batch, {head, head + 1}, query_tile, {0, shape.seqlen_k}});
      visit(tile, batch, head, query_tile);
    };
  });
}

}  // namespace chunkattn::cpu
