// The streaming top-k of a warp's 16 rows. Scores come tile by tile in tensor-core accumulators (layout: softmax.cuh).
//
// Each row has a threshold, at first below everything. A score that reaches it is appended to the row's candidates in
// global memory; the four lanes of a quad share a row, and every fourth candidate belongs to the same lane, so that
// nobody has to ask where to write. When a lane has no room for another tile, the warp reduces the row: it finds a
// threshold that about top_k candidates reach and drops the others. So of n scores in random order about
// top_k * log(n / top_k) are ever stored, and the scores themselves are never.
//
// Tiles come from right to left: a score equal to the threshold then belongs to a lower index, which wins the tie.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

#include "cuda/select/sizes.h"

namespace chunkattn::cuda {

// Ordered as the scores are; the zeros are equal, and NaN, which has no order, counts as infinity.
__device__ __forceinline__ uint32_t ordered_bits(float score) {
  const uint32_t bits = __float_as_uint(score == score ? score + 0.f : INFINITY);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_bits(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Entries of the finished lists: larger is better, ties go to the lowest region. 0 where a row lists fewer.
__device__ __forceinline__ uint64_t list_entry(uint32_t ordered_score, int region) {
  return static_cast<uint64_t>(ordered_score) << 32 | ~static_cast<uint32_t>(region);
}
__device__ __forceinline__ int listed_region(uint64_t entry) {
  return entry == 0 ? -1 : static_cast<int>(~static_cast<uint32_t>(entry));
}

// kInRegisters: how many candidates a row has room for, of which a reduction reads the scores once. 0: any number, and
// a reduction reads them again for every step of its search.
template <int kInRegisters>
class RowCandidates {
 public:
  // `memory` has room for 16 rows of `capacity`, each on a multiple of its size: the addresses of a row's candidates
  // then differ in their lower words alone.
  __device__ __forceinline__ RowCandidates(uint64_t* memory, int capacity, int top_k)
      : memory_(memory), capacity_(kInRegisters != 0 ? kInRegisters : capacity), top_k_(top_k) {
    restart();
  }

  __device__ __forceinline__ void restart() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      threshold_[half] = -FLT_MAX;
      cursor_[half] = begin(half);
    }
  }

  // Takes a tile's scores, of which the lane's first belongs to region `first`. NaN reaches every threshold. -inf,
  // which stands for what the row may not list, reaches none: eligible regions that score it are listed by
  // sort_lists_kernel.
  template <int kBlocks>
  __device__ __forceinline__ void append(const float (&scores)[kBlocks][4], int first) {
    const uint32_t upper[2] = {upper_word(0), upper_word(1)};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile(
            "{\n"
            ".reg .pred reaches;\n"
            ".reg .b64 address;\n"
            "setp.geu.f32 reaches, %1, %2;\n"
            "mov.b64 address, {%0, %3};\n"
            "@reaches st.global.v2.b32 [address], {%4, %5};\n"
            "@reaches add.u32 %0, %0, 32;\n"
            "}\n"
            : "+r"(cursor_[i / 2])
            : "f"(scores[block][i]), "f"(threshold_[i / 2]), "r"(upper[i / 2]), "r"(first + block * 8 + i % 2),
              "r"(__float_as_uint(scores[block][i]))
            : "memory");
      }
    }
  }

  // Whether some row has no room for another tile of kColumns. The same for all lanes.
  template <int kColumns>
  __device__ __forceinline__ bool full() const {
    const int most = most_stored(capacity_, kColumns);
    return __any_sync(0xffffffffu, stored(0) > most || stored(1) > most);
  }

  // Reduces the rows that are half full or more.
  template <int kColumns>
  __device__ __forceinline__ void reduce() {
    __syncwarp();  // what other lanes appended
    reduce_rows(half_full_rows<kColumns>(), nullptr);
  }

  // Writes the top_k best of each of the first `rows` rows to `lists`, the warp's first row in it.
  __device__ __forceinline__ void finish(uint64_t* lists, int rows) {
    __syncwarp();  // what other lanes appended
    reduce_rows(first_rows(rows), lists);
  }

  // The one or the other. Most of a kernel's code is in these: where both are wanted this has it once.
  template <int kColumns>
  __device__ __forceinline__ void reduce_or_finish(bool finishes, uint64_t* lists, int rows) {
    __syncwarp();  // what other lanes appended
    reduce_rows(finishes ? first_rows(rows) : half_full_rows<kColumns>(), finishes ? lists : nullptr);
  }

 private:
  static constexpr int kPerLane = kInRegisters != 0 ? kInRegisters / 32 : 1;
  static constexpr int kBatch = kPerLane < 8 ? kPerLane : 8;  // reads under way at once
  // A few are held with their regions; more are read again when they are written.
  static constexpr bool kHolds = kInRegisters != 0 && kInRegisters <= kFewInRegisters;

  uint64_t* memory_;
  int capacity_;
  int top_k_;
  float threshold_[2];  // of rows lane / 4 and lane / 4 + 8
  uint32_t cursor_[2];  // lower word of the address of the lane's next candidate

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ uint64_t* row_memory(int row) const { return memory_ + row * capacity_; }
  __device__ __forceinline__ uint64_t first_address(int half) const {
    return reinterpret_cast<uint64_t>(row_memory(lane() / 4 + 8 * half) + lane() % 4);
  }
  __device__ __forceinline__ uint32_t begin(int half) const { return static_cast<uint32_t>(first_address(half)); }
  __device__ __forceinline__ uint32_t upper_word(int half) const {
    return static_cast<uint32_t>(first_address(half) >> 32);
  }
  __device__ __forceinline__ int stored(int half) const { return (cursor_[half] - begin(half)) / 32; }

  // A row's candidates as the whole warp sees them: lane l has those at l, l + 32, ... that were stored by lane l % 4
  // of the row's quad.
  struct RowView {
    const uint64_t* memory;
    int valid;                // how many that lane stored
    uint32_t keys[kPerLane];  // ordered scores; 0, which no score has, where there is no candidate
    uint32_t regions[kHolds ? kPerLane : 1];
  };

  // A bit for each quad in which it holds for a lane.
  static __device__ __forceinline__ uint32_t rows_of_quads(bool holds) {
    const uint32_t lanes = __ballot_sync(0xffffffffu, holds);
    uint32_t rows = 0;
#pragma unroll
    for (int quad = 0; quad < 8; ++quad) rows |= (lanes >> quad * 4 & 15) != 0 ? 1u << quad : 0;
    return rows;
  }

  // The rows as bits.
  template <int kColumns>
  __device__ __forceinline__ uint32_t half_full_rows() const {
    const int few = (most_stored(capacity_, kColumns) + (top_k_ + reduction_slack(top_k_)) / 4) / 2;
    return rows_of_quads(stored(0) > few) | rows_of_quads(stored(1) > few) << 8;
  }
  static __device__ __forceinline__ uint32_t first_rows(int rows) {
    return rows >= 16 ? 0xffffu : rows > 0 ? (1u << rows) - 1 : 0;
  }

  static __device__ __forceinline__ uint64_t load(const uint64_t* entry) {
    uint64_t x;
    asm volatile("ld.global.cg.b64 %0, [%1];\n" : "=l"(x) : "l"(entry) : "memory");
    return x;
  }
  static __device__ __forceinline__ uint32_t key_of(uint64_t candidate) {
    return ordered_bits(__uint_as_float(static_cast<uint32_t>(candidate >> 32)));
  }
  static __device__ __forceinline__ uint32_t region_of(uint64_t candidate) { return static_cast<uint32_t>(candidate); }
  static __device__ __forceinline__ uint64_t candidate_of(uint32_t key, uint32_t region) {
    return static_cast<uint64_t>(__float_as_uint(from_ordered_bits(key))) << 32 | region;
  }

  __device__ __forceinline__ void read_row(RowView& row, int index) const {
    const int mine = index < 8 ? stored(0) : stored(1);
    row.memory = row_memory(index);
    row.valid = __shfl_sync(0xffffffffu, mine, index % 8 * 4 + lane() % 4);
    if constexpr (kInRegisters != 0) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const bool exists = i * 8 + lane() / 4 < row.valid;
        const uint64_t candidate = exists ? load(row.memory + i * 32 + lane()) : 0;
        row.keys[i] = exists ? key_of(candidate) : 0;
        if constexpr (kHolds) row.regions[i] = region_of(candidate);
      }
    }
  }

  // Calls f(index, key) for the lane's candidates, index counting them.
  template <typename Function>
  __device__ __forceinline__ void for_each(const RowView& row, Function&& f) const {
    if constexpr (kInRegisters != 0) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) f(i, row.keys[i]);
    } else {
#pragma unroll 8
      for (int i = 0; i < capacity_ / 32; ++i) {
        f(i, i * 8 + lane() / 4 < row.valid ? key_of(load(row.memory + i * 32 + lane())) : 0);
      }
    }
  }

  template <typename Predicate>
  __device__ __forceinline__ int count(const RowView& row, Predicate&& predicate) const {
    int found = 0;
    for_each(row, [&](int i, uint32_t key) { found += predicate(i, key) ? 1 : 0; });
    return static_cast<int>(__reduce_add_sync(0xffffffffu, found));
  }

  // Halfway between two keys: between their scores, which finds a threshold sooner, or now and then between their bits,
  // which always finds it.
  static __device__ __forceinline__ uint32_t halfway(uint32_t low, uint32_t high, int step) {
    const uint32_t between = ordered_bits(0.5f * from_ordered_bits(low) + 0.5f * from_ordered_bits(high - 1));
    return step % 4 != 0 && between > low && between < high ? between : low + (high - low) / 2;
  }

  // All regions before the result, of those whose key is `key`, are `wanted`. Rows have many equal scores rarely.
  __device__ __forceinline__ uint32_t tie_end(const RowView& row, uint32_t key, int wanted) const {
    uint32_t low = 0, high = INT32_MAX;
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      const int found = count(row, [&](int i, uint32_t other) {
        return other == key && region_of(load(row.memory + i * 32 + lane())) < middle;
      });
      if (found < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Of the rows whose bit is set.
  __device__ __forceinline__ void reduce_rows(uint32_t rows, uint64_t* lists) {
#pragma unroll 1
    for (; rows != 0; rows &= rows - 1) reduce_row(__ffs(rows) - 1, lists);
  }

  __device__ __forceinline__ void reduce_row(int index, uint64_t* lists) {
    RowView row;
    read_row(row, index);
    uint32_t smallest = UINT32_MAX, largest = 0;
    for_each(row, [&](int, uint32_t key) {
      largest = key > largest ? key : largest;
      smallest = key - 1 < smallest ? key - 1 : smallest;  // what is no candidate becomes the largest
    });
    // At least top_k candidates reach `low`, fewer (`better`) reach `high`; or all are kept.
    uint32_t low = ordered_bits(__shfl_sync(0xffffffffu, index < 8 ? threshold_[0] : threshold_[1], index % 8 * 4));
    const uint32_t lowest = __reduce_min_sync(0xffffffffu, smallest) + 1;
    low = lowest > low ? lowest : low;
    uint32_t high = __reduce_max_sync(0xffffffffu, largest) + 1;
    int kept = static_cast<int>(__reduce_add_sync(0xffffffffu, row.valid)) / 8;  // eight lanes see each quarter
    int better = 0;
    const int allowed = top_k_ + (lists == nullptr ? reduction_slack(top_k_) : 0);
    for (int step = 1; kept > allowed && high - low > 1; ++step) {
      const uint32_t middle = halfway(low, high, step);
      const int reaching = count(row, [&](int, uint32_t key) { return key >= middle; });
      if (reaching >= top_k_) {
        low = middle;
        kept = reaching;
      } else {
        high = middle;
        better = reaching;
      }
    }
    uint32_t end_of_ties = UINT32_MAX;
    if (kept > allowed) {  // all keys below `high` equal `low`
      end_of_ties = tie_end(row, low, top_k_ - better);
      kept = top_k_;
    }
    if (lists != nullptr) {
      write_row(row, low, end_of_ties, lists + static_cast<int64_t>(index) * top_k_, true);
      return;
    }
    write_row(row, low, end_of_ties, row_memory(index), false);
    __syncwarp();
    if (lane() / 4 == index % 8) move_on(index / 8, from_ordered_bits(low), kept);
  }

  // Writes the candidates that are kept one behind the other. As entries of a finished list, with zeros behind them.
  __device__ __forceinline__ void write_row(const RowView& row, uint32_t low, uint32_t end_of_ties, uint64_t* target,
                                            bool finished) {
    int written = 0;
    // What is written lies before what is still to be read: the target may be the row itself.
    const auto reread = [&](int i, uint32_t key) {
      if constexpr (kHolds) return candidate_of(key, row.regions[i]);
      return key >= low ? load(row.memory + i * 32 + lane()) : 0;
    };
    const auto write = [&](uint32_t key, uint64_t candidate) {
      const bool keep = key > low || (key == low && region_of(candidate) < end_of_ties);
      const uint32_t keepers = __ballot_sync(0xffffffffu, keep);
      if (keep) {
        const int place = written + __popc(keepers & ((1u << lane()) - 1));
        target[place] = finished ? list_entry(key, static_cast<int>(region_of(candidate))) : candidate;
      }
      written += __popc(keepers);
    };
    if constexpr (kInRegisters != 0) {
#pragma unroll
      for (int first = 0; first < kPerLane; first += kBatch) {
        uint64_t candidates[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) candidates[i] = reread(first + i, row.keys[first + i]);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) write(row.keys[first + i], candidates[i]);
      }
    } else {
      for_each(row, [&](int i, uint32_t key) { write(key, reread(i, key)); });
    }
    for (int i = written + lane(); finished && i < top_k_; i += 32) target[i] = 0;
  }

  // Of a lane's row, which has `kept` candidates left.
  __device__ __forceinline__ void move_on(int half, float threshold, int kept) {
    const uint32_t cursor = begin(half) + (kept - lane() % 4 + 3) / 4 * 32;
    if (half == 0) {
      threshold_[0] = threshold;
      cursor_[0] = cursor;
    } else {
      threshold_[1] = threshold;
      cursor_[1] = cursor;
    }
  }
};

}  // namespace chunkattn::cuda
