// Keys, values and queries as the matrix products read them: in the operand type, with usable strides, rotated.
#pragma once

#include <algorithm>
#include <climits>
#include <span>
#include <utility>

#include "cpu/buffer.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"
#include "params.h"

namespace chunkattn::cpu {

template <class Element>
Rows<const Element> rows_of(const void* tensor, const Strides& strides, int batch, int64_t seq, int head) {
  const int64_t offset = batch * strides.batch + seq * strides.seq + head * strides.head;
  return {static_cast<const Element*>(tensor) + offset, strides.seq};
}

template <class Element>
Rows<Element> rows_of(void* tensor, const Strides& strides, int batch, int64_t seq, int head) {
  const int64_t offset = batch * strides.batch + seq * strides.seq + head * strides.head;
  return {static_cast<Element*>(tensor) + offset, strides.seq};
}

// Whether products read rows `stride` apart where they lie. BLAS takes no shorter or longer stride, and rows far apart
// are slow to read again and again, once for each query of each head that shares them.
inline bool read_in_place(int64_t stride, int head_dim, int64_t queries) {
  return stride == head_dim || (stride > head_dim && stride <= INT_MAX && queries <= 256);
}

// Keys or values [batch, seqlen_k, kv_heads, head_dim]: the caller's tensor, or a copy of it.
template <class Storage, class Operand>
class KeyOperand {
 public:
  KeyOperand(const AttentionShape& shape, const void* tensor, const Strides& strides)
      : data_(tensor), strides_(strides), head_dim_(shape.head_dim) {
    const int64_t queries = static_cast<int64_t>(shape.heads / shape.kv_heads) * shape.seqlen_q;
    by_block_ = !std::is_same_v<Storage, Operand> || !read_in_place(strides.seq, head_dim_, queries);
  }

  KeyOperand(const AttentionShape& shape, Buffer<Operand> copy, const Strides& strides)
      : copy_(std::move(copy)), data_(copy_.data()), strides_(strides), head_dim_(shape.head_dim) {}

  // The rows of a block of keys of a head, one range behind the other: in place, or copied to scratch [keys, head_dim].
  Rows<const Operand> block(int batch, int head, std::span<const KeyRange> ranges, Operand* scratch) const {
    if (by_block_) return copy_block<Storage>(batch, head, ranges, scratch);
    if (ranges.size() > 1) return copy_block<Operand>(batch, head, ranges, scratch);
    return rows_of<Operand>(data_, strides_, batch, ranges.front().begin, head);
  }

  // What the rows of a head stand for, in multiples of what they are.
  double factor(int /*head*/) const { return 1; }

 private:
  template <class Element>
  Rows<const Operand> copy_block(int batch, int head, std::span<const KeyRange> ranges, Operand* scratch) const {
    Operand* to = scratch;
    for (const KeyRange& range : ranges) {
      const int keys = range.end - range.begin;
      convert_rows(rows_of<Element>(data_, strides_, batch, range.begin, head), Rows<Operand>{to, head_dim_}, keys,
                   head_dim_);
      to += static_cast<int64_t>(keys) * head_dim_;
    }
    return {scratch, head_dim_};
  }

  Buffer<Operand> copy_;
  const void* data_;
  Strides strides_;
  int head_dim_;
  bool by_block_ = false;
};

// The keys, rotated by their rows of the rotary table.
template <class Storage, class Operand>
KeyOperand<Storage, Operand> rotate_keys(const ForwardParams& params, ParallelFor parallel_for) {
  constexpr int block = 512;
  const AttentionShape& shape = params.shape;
  const int blocks = QueryTiling::ceil_div(shape.seqlen_k, block);
  const int64_t head_size = static_cast<int64_t>(shape.seqlen_k) * shape.head_dim;
  const Strides strides = {shape.kv_heads * head_size, shape.head_dim, head_size};
  Buffer<Operand> copy(shape.batch * strides.batch);
  for_each_task(parallel_for, static_cast<int64_t>(shape.batch) * shape.kv_heads * blocks, [&] {
    return [&](int64_t task) {
      const int begin = static_cast<int>(task % blocks) * block;
      const int head = static_cast<int>(task / blocks % shape.kv_heads);
      const int batch = static_cast<int>(task / blocks / shape.kv_heads);
      rotate_rows(rows_of<Storage>(params.k, params.k_strides, batch, begin, head),
                  rows_of<Operand>(static_cast<void*>(copy.data()), strides, batch, begin, head),
                  std::min(block, shape.seqlen_k - begin), shape.head_dim, params.rotary, RotationSense::kForward,
                  [&](int n) { return params.geometry.key_row(begin + n); });
    };
  });
  return {shape, std::move(copy), strides};
}

template <class Storage, class Operand>
struct KeysAndValues {
  KeyOperand<Storage, Operand> keys;
  KeyOperand<Storage, Operand> values;
};

template <class Storage, class Operand>
KeysAndValues<Storage, Operand> make_keys_and_values(const ForwardParams& params, ParallelFor parallel_for) {
  return {params.k_rotated ? KeyOperand<Storage, Operand>(params.shape, params.k, params.k_strides)
                           : rotate_keys<Storage, Operand>(params, parallel_for),
          KeyOperand<Storage, Operand>(params.shape, params.v, params.v_strides)};
}

// Query heads that share a KV head.
struct HeadRange {
  int begin;
  int end;

  int count() const { return end - begin; }
};

// The queries of a tile as a regime wants them, packed [queries, heads, head_dim].
template <class Storage, class Operand>
void load_queries(const ForwardParams& params, int batch, HeadRange heads, QueryTile tile, Regime regime,
                  Operand* queries) {
  const int head_dim = params.shape.head_dim;
  const int rows = tile.end - tile.begin;
  for (int head = heads.begin; head < heads.end; ++head) {
    const auto from = rows_of<Storage>(params.q, params.q_strides, batch, tile.begin - params.first_position(), head);
    const Rows<Operand> to = {queries + (head - heads.begin) * head_dim, int64_t{head_dim} * heads.count()};
    if (params.q_rotated && regime == Regime::kIntra) {
      convert_rows(from, to, rows, head_dim);
    } else {
      rotate_rows(from, to, rows, head_dim, params.rotary, RotationSense::kForward,
                  [&](int n) { return params.geometry.query_rotation(regime, tile.begin + n, params.q_rotated); });
    }
  }
}

// Calls run.operator()<Storage, Operand>() with the element types of tensors of a dtype and of their matrix products.
template <class Run>
void with_element_types(DataType dtype, const Run& run) {
  switch (dtype) {
    case DataType::kFloat64:
      return run.template operator()<double, double>();
    case DataType::kFloat32:
      return run.template operator()<float, float>();
    case DataType::kBFloat16:
      return has_fast_bfloat16_gemm() ? run.template operator()<BFloat16, BFloat16>()
                                      : run.template operator()<BFloat16, float>();
    case DataType::kFloat16:
      return run.template operator()<Float16, float>();
  }
}

// scale and temperature of a batch row
inline double logit_scale(const ForwardParams& params, int batch) {
  return params.temperature == nullptr ? params.scale : params.scale * params.temperature[batch];
}

}  // namespace chunkattn::cpu
