// The attention problem that is benchmarked: its sizes, its work, and random inputs in host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "params.h"

namespace chunkattn::bench {

struct Problem {
  AttentionShape shape;
  ChunkGeometry geometry;
  DataType dtype;

  int rotary_dim() const { return shape.head_dim / 2 * 2; }
  double scale() const;
  int first_position() const { return shape.seqlen_k - shape.seqlen_q; }

  // Indices of rows of head_dim elements in [batch, seqlen, heads, head_dim], and of elements in [batch, heads,
  // seqlen].
  int64_t query_row(int batch, int query, int head) const;
  int64_t key_row(int batch, int key, int kv_head) const;
  int64_t lse_row(int batch, int query, int head) const;

  // Pairs of a query and a key it sees, of one head.
  int64_t visible_pairs() const;
  double forward_flops() const;   // two products of head_dim for every pair
  double backward_flops() const;  // five
};

size_t element_bytes(DataType dtype);
double epsilon(DataType dtype);          // from 1 to the next number
const char* short_name(DataType dtype);  // "bf16"
const char* torch_name(DataType dtype);  // "bfloat16"
bool parse_dtype(const std::string& short_name, DataType& dtype);
std::string all_dtype_names();

// A stack of rows in host memory, contiguous.
struct HostTensor {
  int64_t rows = 0;
  int64_t width = 0;
  DataType dtype = DataType::kFloat32;
  std::vector<std::byte> data;

  HostTensor() = default;
  HostTensor(int64_t rows, int64_t width, DataType dtype);

  size_t bytes() const { return data.size(); }
  void read_row(int64_t row, double* to) const;
};

// Elements of mean 0 and variance 1, nearly normal; the same for the same seed.
HostTensor random_tensor(int64_t rows, int64_t width, DataType dtype, uint64_t seed);

struct Inputs {
  Problem problem;
  HostTensor q;     // [batch, seqlen_q, heads, head_dim]
  HostTensor k;     // [batch, seqlen_k, kv_heads, head_dim]
  HostTensor v;     // [batch, seqlen_k, kv_heads, head_dim]
  HostTensor dout;  // [batch, seqlen_q, heads, head_dim]; empty where no gradients are wanted
  HostTensor cos;   // [chunk_size + 1, rotary_dim / 2], float32
  HostTensor sin;   // the same
};

Inputs make_inputs(const Problem& problem, bool gradients);

}  // namespace chunkattn::bench
