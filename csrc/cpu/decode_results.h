// What a call over a cache writes.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/cache.h"
#include "cpu/forward_tile.h"

namespace chunkattn::cpu {

inline float* lse_of(const ForwardParams& params, int batch, int head) {
  return params.softmax_lse + params.lse_row(batch, head);
}

// The results of queries [begin, end) of a sequence, which see nothing.
template <class Storage>
void write_unseeing(const ForwardParams& params, int batch, int begin, int end) {
  for (int head = 0; head < params.shape.heads && begin < end; ++head) {
    const Rows<Storage> out = rows_of<Storage>(params.out, params.out_strides, batch, begin, head);
    for (int n = 0; n < end - begin; ++n) {
      std::memset(static_cast<void*>(out.data + n * out.stride), 0, params.shape.head_dim * sizeof(Storage));
    }
    std::fill(lse_of(params, batch, head) + begin, lse_of(params, batch, head) + end,
              -std::numeric_limits<float>::infinity());
  }
}

// The results of a tile of heads that share a KV head.
template <class Storage, class Operand>
void store_tile(const ForwardParams& params, int batch, HeadRange heads, QueryTile tile,
                const ForwardTile<Storage, Operand>& result) {
  const int query = tile.begin - params.first_position();
  for (int head = 0; head < heads.count(); ++head) {
    const int query_head = heads.begin + head;
    result.write_out(head, rows_of<Storage>(params.out, params.out_strides, batch, query, query_head));
    float* const lse = lse_of(params, batch, query_head) + query;
    for (int n = head; n < result.rows(); n += heads.count()) {
      lse[n / heads.count()] = static_cast<float>(result.lse_log2(n) * kLn2);
    }
  }
}

template <class Stored, class Operand>
struct CachedKeysAndValues {
  CacheOperand<Stored, Operand> keys;
  CacheOperand<Stored, Operand> values;
};

}  // namespace chunkattn::cpu
