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

// Keys or values [batch, seqlen_k, kv_heads, head_dim]: the caller's tensor, or a copy of it.
template <class Operand>
class KeyOperand {
 public:
  KeyOperand(const Operand* data, const Strides& strides) : data_(data), strides_(strides) {}
  KeyOperand(Buffer<Operand> copy, const Strides& strides)
      : copy_(std::move(copy)), data_(copy_.data()), strides_(strides) {}

  const Operand* at(int batch, int position, int head) const {
    return rows_of<Operand>(data_, strides_, batch, position, head).data;
  }
  int ld() const { return static_cast<int>(strides_.seq); }

 private:
  Buffer<Operand> copy_;
  const Operand* data_;
  Strides strides_;
};

// Copies to rotate (`rotate` reads the keys' rows of the rotary table), to convert, because BLAS takes no such stride, or
// because rows far apart are slow to read and more than one query tile reads them.
template <class Storage, class Operand>
KeyOperand<Operand> make_key_operand(const ForwardParams& params, const void* tensor, const Strides& strides,
                                     bool rotate, ParallelFor parallel_for) {
  const AttentionShape& shape = params.shape;
  const int head_dim = shape.head_dim;
  if constexpr (std::is_same_v<Storage, Operand>) {
    const bool usable = strides.seq >= head_dim && strides.seq <= INT_MAX;
    const int64_t readers = static_cast<int64_t>(shape.heads / shape.kv_heads) * shape.seqlen_q;
    if (!rotate && usable && (strides.seq == head_dim || readers <= 256)) return {static_cast<const Operand*>(tensor), strides};
  }
  constexpr int block = 512;
  const int blocks = QueryTiling::ceil_div(shape.seqlen_k, block);
  const int64_t head_size = static_cast<int64_t>(shape.seqlen_k) * head_dim;
  const Strides copy_strides = {shape.kv_heads * head_size, head_dim, head_size};
  Buffer<Operand> copy(shape.batch * copy_strides.batch);
  for_each_task(parallel_for, static_cast<int64_t>(shape.batch) * shape.kv_heads * blocks, [&] {
    return [&](int64_t task) {
      const int begin = static_cast<int>(task % blocks) * block;
      const int head = static_cast<int>(task / blocks % shape.kv_heads);
      const int batch = static_cast<int>(task / blocks / shape.kv_heads);
      const int rows = std::min(block, shape.seqlen_k - begin);
      const auto from = rows_of<Storage>(tensor, strides, batch, begin, head);
      const auto to = rows_of<Operand>(static_cast<void*>(copy.data()), copy_strides, batch, begin, head);
      if (rotate) {
        const ChunkGeometry geometry = params.geometry;
        const auto key_row = [=](int n) { return geometry.key_row(begin + n); };
        rotate_rows(from, to, rows, head_dim, params.rotary, RotationSense::kForward, key_row);
      } else {
        convert_rows(from, to, rows, head_dim);
      }
    };
  });
  return {std::move(copy), copy_strides};
}

template <class Operand>
struct KeysAndValues {
  KeyOperand<Operand> keys;
  KeyOperand<Operand> values;
};

template <class Storage, class Operand>
KeysAndValues<Operand> make_keys_and_values(const ForwardParams& params, ParallelFor parallel_for) {
  return {make_key_operand<Storage, Operand>(params, params.k, params.k_strides, !params.k_rotated, parallel_for),
          make_key_operand<Storage, Operand>(params, params.v, params.v_strides, false, parallel_for)};
}

// The queries of a tile as a regime wants them, packed.
template <class Storage, class Operand>
void load_queries(const ForwardParams& params, int batch, int head, QueryTile tile, Regime regime, Operand* queries) {
  const int head_dim = params.shape.head_dim;
  const int rows = tile.end - tile.begin;
  const auto from = rows_of<Storage>(params.q, params.q_strides, batch, tile.begin - params.first_position(), head);
  const Rows<Operand> to = {queries, head_dim};
  if (params.q_rotated && regime == Regime::kIntra) {
    convert_rows(from, to, rows, head_dim);
    return;
  }
  const auto row = [geometry = params.geometry, regime, tile, rotated = params.q_rotated](int n) {
    return geometry.query_rotation(regime, tile.begin + n, rotated);
  };
  rotate_rows(from, to, rows, head_dim, params.rotary, RotationSense::kForward, row);
}

// scale and temperature of a batch row
inline double logit_scale(const ForwardParams& params, int batch) {
  return params.temperature == nullptr ? params.scale : params.scale * params.temperature[batch];
}

}  // namespace chunkattn::cpu
