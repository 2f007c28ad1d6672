// Keys, values and queries as the matrix products read them: in the operand type, with usable strides, rotated.
#pragma once

#include <algorithm>
#include <climits>
#include <utility>

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/rotary.h"
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

  // Rows [first, first + count) of a head: in place, or copied to scratch [count, head_dim].
  Rows<const Operand> block(int batch, int head, int first, int count, Operand* scratch) const {
    if (!by_block_) return rows_of<Operand>(data_, strides_, batch, first, head);
    convert_rows(rows_of<Storage>(data_, strides_, batch, first, head), Rows<Operand>{scratch, head_dim_}, count,
                 head_dim_);
    return {scratch, head_dim_};
  }

  // What the rows of a head stand for, in multiples of what they are.
  double factor(int /*head*/) const { return 1; }

 private:
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

// scale and temperature of a batch row
inline double logit_scale(const ForwardParams& params, int batch) {
  return params.temperature == nullptr ? params.scale : params.scale * params.temperature[batch];
}

}  // namespace chunkattn::cpu
