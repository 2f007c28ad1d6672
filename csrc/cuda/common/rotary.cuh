// Rotary embedding of 16-byte chunks (8 elements) on their way from global memory.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/common/vector_paths.h"
#include "params.h"

namespace chunkattn::cuda {

constexpr int kChunk = 8;  // elements of a 16-byte chunk

template <typename T>
__device__ __forceinline__ void unpack8(const uint4& chunk, float (&x)[kChunk]) {
  const float2 a = unpack2<T>(chunk.x), b = unpack2<T>(chunk.y), c = unpack2<T>(chunk.z), d = unpack2<T>(chunk.w);
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y, x[4] = c.x, x[5] = c.y, x[6] = d.x, x[7] = d.y;
}

template <typename T>
__device__ __forceinline__ uint4 pack8(const float (&x)[kChunk]) {
  return {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
}

template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* row, int begin) {
  return __ldg(reinterpret_cast<const uint4*>(row + begin));
}

// Which pair an element below rotary_dim belongs to.
struct RotaryPair {
  int index;    // the pair's column of the table
  int partner;  // the other element
  bool second;  // this one is the pair's second
};

__device__ __forceinline__ RotaryPair rotary_pair(const RotaryTable& table, int d) {
  const int half = table.rotary_dim / 2;
  const bool second = table.interleaved ? d % 2 == 1 : d >= half;
  const int step = table.interleaved ? 1 : half;
  const int partner = second ? d - step : d + step;
  return {table.interleaved ? d / 2 : second ? partner : d, partner, second};
}

// Element d of a row, rotated by row `table_row` of the table. For any alignment.
template <typename T>
__device__ __forceinline__ float rotated_element(const T* row, int d, const RotaryTable& table, int table_row) {
  const float x = to_float(row[d]);
  if (d >= table.rotary_dim) return x;
  const RotaryPair pair = rotary_pair(table, d);
  const float partner = to_float(row[pair.partner]);
  const int64_t index = table_row * table.row_stride + pair.index;
  const float cos = table.cos[index], sin = table.sin[index];
  return pair.second ? x * cos + partner * sin : x * cos - partner * sin;
}

// cos and sin of eight neighbouring pairs.
struct Angles {
  float4 cos[2];
  float4 sin[2];
};

__device__ __forceinline__ Angles load_angles(const RotaryTable& table, int table_row, int pair) {
  const int64_t index = table_row * table.row_stride + pair;
  const float4* cos = reinterpret_cast<const float4*>(table.cos + index);
  const float4* sin = reinterpret_cast<const float4*>(table.sin + index);
  return {{__ldg(cos), __ldg(cos + 1)}, {__ldg(sin), __ldg(sin + 1)}};
}

// Rotates the first and the second elements of eight pairs (rotate-half layout).
__device__ __forceinline__ void rotate_halves(float (&a)[kChunk], float (&b)[kChunk], const Angles& angles) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float cos = reinterpret_cast<const float*>(angles.cos)[i],
                sin = reinterpret_cast<const float*>(angles.sin)[i];
    const float x = a[i], y = b[i];
    a[i] = x * cos - y * sin;
    b[i] = y * cos + x * sin;
  }
}

template <typename T>
__device__ __forceinline__ void rotate_chunks(uint4& first, uint4& second, const Angles& angles) {
  float a[kChunk], b[kChunk];
  unpack8<T>(first, a);
  unpack8<T>(second, b);
  rotate_halves(a, b, angles);
  first = pack8<T>(a);
  second = pack8<T>(b);
}

// Rotates four neighbouring pairs (interleaved layout), the first of which is `pair`.
__device__ __forceinline__ void rotate_neighbours(float (&x)[kChunk], const RotaryTable& table, int table_row,
                                                  int pair) {
  const int64_t index = table_row * table.row_stride + pair;
  const float4 cos = __ldg(reinterpret_cast<const float4*>(table.cos + index));
  const float4 sin = __ldg(reinterpret_cast<const float4*>(table.sin + index));
  const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * c[i] - b * s[i];
    x[2 * i + 1] = b * c[i] + a * s[i];
  }
}

template <typename T>
__device__ __forceinline__ uint4 rotate_interleaved(const uint4& chunk, const RotaryTable& table, int table_row,
                                                    int pair) {
  float x[kChunk];
  unpack8<T>(chunk, x);
  rotate_neighbours(x, table, table_row, pair);
  return pack8<T>(x);
}

// A row is rotated in units of two chunks: in the rotate-half layout the two that share eight pairs, otherwise two
// neighbours. Where the units of a row lie:
struct RotaryUnit {
  int first;     // element at which the first chunk begins
  int second;    // and the second
  bool rotated;  // false: both pass through
};

__device__ __forceinline__ RotaryUnit rotary_unit(const RotaryTable& table, int unit) {
  const int begin = unit * kChunk;
  const int half = table.rotary_dim / 2;
  if (!table.interleaved && begin < half) return {begin, begin + half, true};
  return {2 * begin, 2 * begin + kChunk, 2 * begin < table.rotary_dim};
}

// Rotates both chunks of a unit by row `table_row`. The second chunk of an interleaved unit may lie beyond rotary_dim.
template <typename T>
__device__ __forceinline__ void rotate_unit(uint4& first, uint4& second, const RotaryUnit& unit,
                                            const RotaryTable& table, int table_row) {
  if (!unit.rotated) return;
  if (table.interleaved) {
    first = rotate_interleaved<T>(first, table, table_row, unit.first / 2);
    if (unit.second < table.rotary_dim) second = rotate_interleaved<T>(second, table, table_row, unit.second / 2);
  } else {
    rotate_chunks<T>(first, second, load_angles(table, table_row, unit.first));
  }
}

// The same of float32 rows.
__device__ __forceinline__ void rotate_unit(float (&first)[kChunk], float (&second)[kChunk], const RotaryUnit& unit,
                                            const RotaryTable& table, int table_row) {
  if (!unit.rotated) return;
  if (table.interleaved) {
    rotate_neighbours(first, table, table_row, unit.first / 2);
    if (unit.second < table.rotary_dim) rotate_neighbours(second, table, table_row, unit.second / 2);
  } else {
    rotate_halves(first, second, load_angles(table, table_row, unit.first));
  }
}

// The way back, which gradients take: the rotation by minus the row, of float32 rows.

__device__ __forceinline__ void rotate_pair_back(float& first, float& second, float cos, float sin) {
  const float x = first, y = second;
  first = x * cos + y * sin;
  second = y * cos - x * sin;
}

__device__ __forceinline__ void load_floats(const float* source, float (&x)[kChunk]) {
  const float4 low = *reinterpret_cast<const float4*>(source), high = *reinterpret_cast<const float4*>(source + 4);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void rotate_interleaved_back(float (&x)[kChunk], const RotaryTable& table, int table_row,
                                                        int pair) {
  const int64_t index = table_row * table.row_stride + pair;
  const float4 cos = __ldg(reinterpret_cast<const float4*>(table.cos + index));
  const float4 sin = __ldg(reinterpret_cast<const float4*>(table.sin + index));
  const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) rotate_pair_back(x[2 * i], x[2 * i + 1], c[i], s[i]);
}

__device__ __forceinline__ void rotate_unit_back(float (&first)[kChunk], float (&second)[kChunk],
                                                 const RotaryUnit& unit, const RotaryTable& table, int table_row) {
  if (!unit.rotated) return;
  if (table.interleaved) {
    rotate_interleaved_back(first, table, table_row, unit.first / 2);
    if (unit.second < table.rotary_dim) rotate_interleaved_back(second, table, table_row, unit.second / 2);
    return;
  }
  const Angles angles = load_angles(table, table_row, unit.first);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    rotate_pair_back(first[i], second[i], reinterpret_cast<const float*>(angles.cos)[i],
                     reinterpret_cast<const float*>(angles.sin)[i]);
  }
}

// Element d of a float32 row, rotated back. For any alignment. `row` is indexed by the element.
template <typename Row>
__device__ __forceinline__ float rotated_back_element(const Row& row, int d, const RotaryTable& table, int table_row) {
  if (d >= table.rotary_dim) return row[d];
  const RotaryPair pair = rotary_pair(table, d);
  const int64_t index = table_row * table.row_stride + pair.index;
  const float cos = table.cos[index], sin = table.sin[index];
  return pair.second ? row[d] * cos - row[pair.partner] * sin : row[d] * cos + row[pair.partner] * sin;
}

}  // namespace chunkattn::cuda
