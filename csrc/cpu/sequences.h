// Packed sequences of different lengths, each computed as a batch of one.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"

namespace chunkattn::cpu {

// A packed sequence as a plain batch of one. The first queries see nothing and are left out.
struct PackedSequence {
  int batch;
  Sequence rows;
  int unseeing;  // queries

  int seeing() const { return rows.seqlen_q - unseeing; }
  int64_t work() const { return static_cast<int64_t>(seeing()) * rows.seqlen_k; }
};

inline size_t element_size(DataType dtype) {
  return dtype == DataType::kFloat64 ? 8 : dtype == DataType::kFloat32 ? 4 : 2;
}

// The tensor from a row on.
template <class Pointer>
Pointer from_row(Pointer tensor, const Strides& strides, int64_t row, DataType dtype) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(tensor) + row * strides.seq * static_cast<int64_t>(element_size(dtype));
}

inline void zero_rows(void* tensor, const Strides& strides, int64_t first, int rows, int heads, int head_dim,
                      DataType dtype) {
  for (int n = 0; n < rows; ++n) {
    for (int head = 0; head < heads; ++head) {
      const int64_t offset = (first + n) * strides.seq + head * strides.head;
      const auto size = static_cast<int64_t>(element_size(dtype));
      std::memset(static_cast<char*>(tensor) + offset * size, 0, head_dim * size);
    }
  }
}

// What the sequence is as a batch of one. softmax_lse [heads, seeing()] is a tensor of its own.
inline ForwardParams batch_of_one(const ForwardParams& params, const PackedSequence& sequence, float* softmax_lse) {
  ForwardParams one = params;
  const int64_t query = sequence.rows.first_q + sequence.unseeing;
  one.q = from_row(params.q, params.q_strides, query, params.dtype);
  one.k = from_row(params.k, params.k_strides, sequence.rows.first_k, params.dtype);
  one.v = from_row(params.v, params.v_strides, sequence.rows.first_k, params.dtype);
  one.out = from_row(params.out, params.out_strides, query, params.dtype);
  one.softmax_lse = softmax_lse;
  one.shape.batch = 1;
  one.shape.seqlen_q = sequence.seeing();
  one.shape.seqlen_k = sequence.rows.seqlen_k;
  one.temperature = params.temperature == nullptr ? nullptr : params.temperature + sequence.batch;
  one.cu_seqlens_q = nullptr;
  one.cu_seqlens_k = nullptr;
  return one;
}

// The row of softmax_lse that belongs to the sequence's first query that sees a key.
inline float* packed_lse(const ForwardParams& params, const PackedSequence& sequence, int head) {
  return params.softmax_lse + params.lse_row(sequence.batch, head) + sequence.unseeing;
}

// Calls run(sequence, parallel_for) for every packed sequence. Long ones get all threads, one after the other; the
// others one thread each.
template <class Run>
void for_each_sequence(const ForwardParams& params, ParallelFor parallel_for, const Run& run) {
  std::vector<PackedSequence> sequences;
  int64_t all = 0;
  for (int batch = 0; batch < params.shape.batch; ++batch) {
    const Sequence rows = params.sequence(batch);
    sequences.push_back({batch, rows, std::min(rows.seqlen_q, std::max(0, -rows.first_position()))});
    all += sequences.back().work();
  }
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const PackedSequence& a, const PackedSequence& b) { return a.work() > b.work(); });
  const int64_t shares = 2 * int64_t{count_threads(parallel_for)};
  size_t first_short = 0;
  for (; first_short < sequences.size() && sequences[first_short].work() > all / shares; ++first_short) {
    run(sequences[first_short], parallel_for);
  }
  const ParallelFor one_thread = [](int64_t count, ParallelBody body, void* context) { body(0, count, context); };
  for_each_task(parallel_for, static_cast<int64_t>(sequences.size() - first_short),
                [&] { return [&](int64_t task) { run(sequences[first_short + task], one_thread); }; });
}

}  // namespace chunkattn::cpu
