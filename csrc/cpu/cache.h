// The key-value cache: where its rows lie, how they are appended and how the matrix products read them.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <type_traits>

#include "cpu/operands.h"

namespace chunkattn::cpu {

// The rows of a cache's keys or values, in pages. A cache without a block table has one page for each sequence.
template <class Stored>
class CachePages {
 public:
  CachePages(const KeyValueCache& cache, void* data, const Strides& strides)
      : cache_(cache),
        data_(data),
        strides_(strides),
        page_size_(cache.block_table == nullptr ? cache.capacity : cache.page_size) {}

  // The rows of a head from `position` on to the end of their page.
  Rows<Stored> rows(int batch, int head, int position) const {
    const int64_t page = cache_.block_table == nullptr
                             ? batch
                             : cache_.block_table[batch * cache_.block_table_stride + position / page_size_];
    Stored* const first = static_cast<Stored*>(data_) + page * strides_.batch + head * strides_.head;
    return {first + position % page_size_ * strides_.seq, strides_.seq};
  }

  // How many there are.
  int rows_left(int position) const { return page_size_ - position % page_size_; }

  // Calls visit(n, rows, count) for the parts of [begin, end) that lie in one page; n counts from begin.
  template <class Visit>
  void for_each_page(int batch, int head, int begin, int end, const Visit& visit) const {
    for (int position = begin; position < end;) {
      const int count = std::min(rows_left(position), end - position);
      visit(position - begin, rows(batch, head, position), count);
      position += count;
    }
  }

  int64_t row_stride() const { return strides_.seq; }

 private:
  const KeyValueCache& cache_;
  void* data_;
  Strides strides_;
  int page_size_;
};

// Keys or values of a cache; takes the place of a KeyOperand.
template <class Stored, class Operand>
class CacheOperand {
 public:
  // `queries` times each row is read.
  CacheOperand(CachePages<Stored> pages, const float* factors, int head_dim, int64_t queries)
      : pages_(pages),
        factors_(factors),
        head_dim_(head_dim),
        in_place_(std::is_same_v<Stored, Operand> && read_in_place(pages.row_stride(), head_dim, queries)) {}

  // The rows of a block of keys of a head, one range behind the other: in place, or gathered in scratch [keys,
  // head_dim].
  Rows<const Operand> block(int batch, int head, std::span<const KeyRange> ranges, Operand* scratch) const {
    const auto [begin, end] = ranges.front();
    if constexpr (std::is_same_v<Stored, Operand>) {
      if (in_place_ && ranges.size() == 1 && end - begin <= pages_.rows_left(begin)) {
        const Rows<Stored> rows = pages_.rows(batch, head, begin);
        return {rows.data, rows.stride};
      }
    }
    Operand* to = scratch;
    for (const KeyRange& range : ranges) {
      pages_.for_each_page(batch, head, range.begin, range.end, [&](int, Rows<Stored> rows, int in_page) {
        convert_rows(Rows<const Stored>{rows.data, rows.stride}, Rows<Operand>{to, head_dim_}, in_page, head_dim_);
        to += static_cast<int64_t>(in_page) * head_dim_;
      });
    }
    return {scratch, head_dim_};
  }

  double factor(int head) const { return factors_ == nullptr ? 1 : factors_[head]; }

 private:
  CachePages<Stored> pages_;
  const float* factors_;  // [kv_heads] or null
  int head_dim_;
  bool in_place_;
};

// Rotates the new keys and writes them and the new values behind what the cache holds.
template <class Storage, class Stored>
void append_to_cache(const DecodeParams& params, const CachePages<Stored>& keys, const CachePages<Stored>& values,
                     ParallelFor parallel_for) {
  using Accum = Accumulator<Storage>;
  constexpr int block = 512;
  const KeyValueCache& cache = params.cache;
  const int blocks = QueryTiling::ceil_div(params.seqlen_new, block);
  for_each_task(parallel_for, static_cast<int64_t>(params.batch) * params.kv_heads * blocks, [&] {
    return [&](int64_t task) {
      const int begin = static_cast<int>(task % blocks) * block;
      const int head = static_cast<int>(task / blocks % params.kv_heads);
      const int batch = static_cast<int>(task / blocks / params.kv_heads);
      const int first = cache.cache_seqlens[batch] + begin;
      const int end = first + std::min(block, params.seqlen_new - begin);
      const Accum k_factor = cache.k_scale == nullptr ? 1 : 1 / Accum(cache.k_scale[head]);
      const Accum v_factor = cache.v_scale == nullptr ? 1 : 1 / Accum(cache.v_scale[head]);
      keys.for_each_page(batch, head, first, end, [&](int n, Rows<Stored> rows, int count) {
        rotate_rows(
            rows_of<Storage>(params.new_k, params.new_k_strides, batch, begin + n, head), rows, count, params.head_dim,
            params.rotary, RotationSense::kForward, [&](int row) { return params.geometry.key_row(first + n + row); },
            k_factor);
      });
      values.for_each_page(batch, head, first, end, [&](int n, Rows<Stored> rows, int count) {
        convert_rows(rows_of<Storage>(params.new_v, params.new_v_strides, batch, begin + n, head), rows, count,
                     params.head_dim, v_factor);
      });
    };
  });
}

}  // namespace chunkattn::cpu
