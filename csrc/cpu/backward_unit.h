// A share of the backward pass: some query tiles against some keys, with the gradients of either or of both.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/operands.h"
#include "cpu/softmax.h"

namespace chunkattn::cpu {

// What the backward pass needs to know of each query: lse in bits, and delta = sum(dout * out).
template <class Accum>
struct QueryStatistics {
  Accum* lse_log2;  // [batch, heads, seqlen_q]
  Accum* delta;     // [batch, heads, seqlen_q]
};

// Gradients are complete only for the queries whose keys, and the keys whose queries, all lie in the share.
struct BackwardShare {
  int batch;
  int head_begin;  // query heads, all of one KV head
  int head_end;
  int tile_begin;  // query tiles
  int tile_end;
  int key_begin;
  int key_end;
  bool query_gradients;
  bool key_gradients;
};

template <class Storage, class Operand>
class BackwardUnit {
 public:
  using Accum = Accumulator<Storage>;

  static constexpr int kQueries = 384;
  static constexpr int kKeys = 128;
  static constexpr int kStride = kKeys + kRowMultiple;

  // For shares of at most max_keys keys whose gradients are wanted. regions: see TileSegments.
  BackwardUnit(const BackwardParams& params, const RegionLists* regions,
               const KeysAndValues<Storage, Operand>& keys_and_values, QueryStatistics<Accum> statistics,
               QueryTiling tiling, int max_keys)
      : params_(params),
        keys_and_values_(keys_and_values),
        segments_(params.forward, regions),
        statistics_(statistics),
        tiling_(tiling),
        head_dim_(params.forward.shape.head_dim),
        queries_(tiling.size * head_dim_),
        key_block_(kKeys * head_dim_),
        value_block_(kKeys * head_dim_),
        out_gradients_(tiling.size * head_dim_),
        logits_(tiling.size * kStride),
        probability_gradients_(tiling.size * kStride),
        separate_probabilities_(kSeparate ? tiling.size * kStride : 0),
        separate_logit_gradients_(kSeparate ? tiling.size * kStride : 0),
        segment_gradients_(tiling.size * head_dim_),
        query_gradients_(tiling.size * head_dim_),
        block_gradients_(kKeys * head_dim_),
        key_gradients_(static_cast<int64_t>(max_keys) * head_dim_),
        value_gradients_(static_cast<int64_t>(max_keys) * head_dim_) {}

  void run(const BackwardShare& share) {
    share_ = share;
    const ForwardParams& forward = params_.forward;
    kv_head_ = share.head_begin / (forward.shape.heads / forward.shape.kv_heads);
    scale_ = static_cast<Accum>(logit_scale(forward, share.batch));
    if (share.key_gradients) {
      const int64_t size = static_cast<int64_t>(share.key_end - share.key_begin) * head_dim_;
      std::fill_n(key_gradients_.data(), size, Accum(0));
      std::fill_n(value_gradients_.data(), size, Accum(0));
    }
    for (int head = share.head_begin; head < share.head_end; ++head) {
      for (int tile = share.tile_begin; tile < share.tile_end; ++tile) run_tile(head, tiling_.tile(tile));
    }
    if (share.key_gradients) write_key_gradients();
  }

 private:
  static constexpr bool kSeparate = !std::is_same_v<Operand, Accum>;

  void run_tile(int head, QueryTile tile) {
    head_ = head;
    tile_ = tile;
    const ForwardParams& forward = params_.forward;
    bool first = true;
    segments_.for_each(share_.batch, head, tile, {share_.key_begin, share_.key_end}, [&](const KeySegment& segment) {
      if (first) begin_tile();
      first = false;
      load_queries<Storage>(forward, share_.batch, {head, head + 1}, tile, segment.regime, queries_.data());
      if (share_.query_gradients) std::fill_n(segment_gradients_.data(), rows() * head_dim_, Accum(0));
      for_each_block<kKeys>(segment, tile, 1, [&](const LogitBlock& block, std::span<const KeyRange> ranges) {
        differentiate(block, ranges);
      });
      if (share_.query_gradients) add_segment_gradients(segment.regime);
    });
    if (share_.query_gradients) {
      convert_rows(Rows<const Accum>{query_gradients_.data(), head_dim_},
                   rows_of<Storage>(params_.dq, params_.dq_strides, share_.batch, first_query(), head), rows(),
                   head_dim_, scale_);
    }
  }

  void begin_tile() {
    convert_rows(rows_of<Storage>(params_.dout, params_.dout_strides, share_.batch, first_query(), head_),
                 Rows<Operand>{out_gradients_.data(), head_dim_}, rows(), head_dim_);
    if (share_.query_gradients) std::fill_n(query_gradients_.data(), rows() * head_dim_, Accum(0));
  }

  void differentiate(const LogitBlock& block, std::span<const KeyRange> ranges) {
    const auto& [keys, values] = keys_and_values_;
    const Rows<const Operand> k = keys.block(share_.batch, kv_head_, ranges, key_block_.data());
    const Rows<const Operand> v = values.block(share_.batch, kv_head_, ranges, value_block_.data());
    const int offset = block.first_row * head_dim_;
    const Operand* const queries = queries_.data() + offset;
    const Operand* const out_gradients = out_gradients_.data() + offset;
    gemm(Transpose::kNo, Transpose::kYes, block.rows, block.keys, head_dim_, queries, head_dim_, k.data,
         static_cast<int>(k.stride), false, logits_.data(), kStride);
    gemm(Transpose::kNo, Transpose::kYes, block.rows, block.keys, head_dim_, out_gradients, head_dim_, v.data,
         static_cast<int>(v.stride), false, probability_gradients_.data(), kStride);
    Operand* const probabilities = in_place_or(logits_, separate_probabilities_);
    Operand* const logit_gradients = in_place_or(probability_gradients_, separate_logit_gradients_);
    const int64_t head_row =
        (static_cast<int64_t>(share_.batch) * params_.forward.shape.heads + head_) * params_.forward.shape.seqlen_q;
    const int64_t row = head_row + first_query() + block.first_row;
    differentiate_softmax<Accum>(block, logits_.data(), probability_gradients_.data(), probabilities, logit_gradients,
                                 kStride, static_cast<Accum>(scale_ * kLog2E), statistics_.lse_log2 + row,
                                 statistics_.delta + row);
    if (share_.query_gradients) {
      gemm(Transpose::kNo, Transpose::kNo, block.rows, head_dim_, block.keys, logit_gradients, kStride, k.data,
           static_cast<int>(k.stride), true, segment_gradients_.data() + offset, head_dim_);
    }
    if (share_.key_gradients) {
      add_key_gradients(block, ranges, probabilities, out_gradients, value_gradients_.data());
      add_key_gradients(block, ranges, logit_gradients, queries, key_gradients_.data());
    }
  }

  // Adds coefficients^T [keys, rows] times factors [rows, head_dim] to the gradients of the block's keys.
  void add_key_gradients(const LogitBlock& block, std::span<const KeyRange> ranges, const Operand* coefficients,
                         const Operand* factors, Accum* gradients) {
    const auto gradients_from = [&](int key) {
      return gradients + static_cast<int64_t>(key - share_.key_begin) * head_dim_;
    };
    const bool in_place = ranges.size() == 1;
    Accum* const sums = in_place ? gradients_from(ranges.front().begin) : block_gradients_.data();
    gemm(Transpose::kYes, Transpose::kNo, block.keys, head_dim_, block.rows, coefficients, kStride, factors, head_dim_,
         in_place, sums, head_dim_);
    if (in_place) return;
    const Accum* from = sums;
    for (const KeyRange& range : ranges) {
      const int size = (range.end - range.begin) * head_dim_;
      add_rows(Rows<const Accum>{from, size}, 1, size, gradients_from(range.begin));
      from += size;
    }
  }

  // Adds the gradients of the queries of one regime, rotated back to the queries that were passed in.
  void add_segment_gradients(Regime regime) {
    const ForwardParams& forward = params_.forward;
    const Rows<Accum> gradients = {segment_gradients_.data(), head_dim_};
    if (!forward.q_rotated || regime != Regime::kIntra) {
      rotate_rows(Rows<const Accum>{gradients.data, head_dim_}, gradients, rows(), head_dim_, forward.rotary,
                  RotationSense::kInverse,
                  [&](int n) { return forward.geometry.query_rotation(regime, tile_.begin + n, forward.q_rotated); });
    }
    const int size = rows() * head_dim_;
    add_rows(Rows<const Accum>{gradients.data, size}, 1, size, query_gradients_.data());
  }

  void write_key_gradients() {
    const ForwardParams& forward = params_.forward;
    const int keys = share_.key_end - share_.key_begin;
    const Rows<const Accum> from = {key_gradients_.data(), head_dim_};
    const auto to = rows_of<Storage>(params_.dk, params_.dk_strides, share_.batch, share_.key_begin, kv_head_);
    if (forward.k_rotated) {
      convert_rows(from, to, keys, head_dim_, scale_);
    } else {
      const auto key_row = [&](int n) { return forward.geometry.key_row(share_.key_begin + n); };
      rotate_rows(from, to, keys, head_dim_, forward.rotary, RotationSense::kInverse, key_row, scale_);
    }
    convert_rows(Rows<const Accum>{value_gradients_.data(), head_dim_},
                 rows_of<Storage>(params_.dv, params_.dv_strides, share_.batch, share_.key_begin, kv_head_), keys,
                 head_dim_);
  }

  static Operand* in_place_or(const Buffer<Accum>& place, const Buffer<Operand>& separate) {
    if constexpr (kSeparate) {
      return separate.data();
    } else {
      return place.data();
    }
  }

  int rows() const { return tile_.end - tile_.begin; }
  int first_query() const { return tile_.begin - params_.forward.first_position(); }

  const BackwardParams& params_;
  const KeysAndValues<Storage, Operand>& keys_and_values_;
  TileSegments segments_;
  const QueryStatistics<Accum> statistics_;
  const QueryTiling tiling_;
  const int head_dim_;
  const Buffer<Operand> queries_;                   // [tile, head_dim]
  const Buffer<Operand> key_block_;                 // [kKeys, head_dim]
  const Buffer<Operand> value_block_;               // [kKeys, head_dim]
  const Buffer<Operand> out_gradients_;             // [tile, head_dim]
  const Buffer<Accum> logits_;                      // [tile, kStride]
  const Buffer<Accum> probability_gradients_;       // [tile, kStride]
  const Buffer<Operand> separate_probabilities_;    // [tile, kStride] where they do not fit in place
  const Buffer<Operand> separate_logit_gradients_;  // [tile, kStride] where they do not fit in place
  const Buffer<Accum> segment_gradients_;           // [tile, head_dim], of rotated queries
  const Buffer<Accum> query_gradients_;             // [tile, head_dim]
  const Buffer<Accum> block_gradients_;             // [kKeys, head_dim], of keys from several ranges
  const Buffer<Accum> key_gradients_;               // [keys of the share, head_dim], of rotated keys
  const Buffer<Accum> value_gradients_;             // [keys of the share, head_dim]
  BackwardShare share_ = {};
  QueryTile tile_ = {};
  int head_ = 0;
  int kv_head_ = 0;
  Accum scale_ = 0;
};

}  // namespace chunkattn::cpu
