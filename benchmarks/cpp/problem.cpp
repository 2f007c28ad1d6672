#include "problem.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/simd.h"
#include "thread_pool.h"

namespace chunkattn::bench {

namespace {

struct DtypeNames {
  DataType dtype;
  const char* short_name;
  const char* torch_name;
  size_t bytes;
  double epsilon;
};

constexpr DtypeNames kDtypes[] = {
    {DataType::kBFloat16, "bf16", "bfloat16", 2, 0x1p-7},
    {DataType::kFloat16, "fp16", "float16", 2, 0x1p-10},
    {DataType::kFloat32, "fp32", "float32", 4, std::numeric_limits<float>::epsilon()},
    {DataType::kFloat64, "fp64", "float64", 8, std::numeric_limits<double>::epsilon()},
};

const DtypeNames& names_of(DataType dtype) {
  for (const DtypeNames& names : kDtypes) {
    if (names.dtype == dtype) return names;
  }
  return kDtypes[0];
}

// splitmix64 of Steele, Lea and Flood (OOPSLA 2014): 64 well mixed bits for every index.
uint64_t random_bits(uint64_t seed, uint64_t index) {
  uint64_t z = (seed << 48) + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The sum of four numbers uniform in 16 bits has nearly a normal distribution.
float random_normal(uint64_t bits) {
  const auto sum = static_cast<double>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
  return static_cast<float>((sum / 0xffff - 2) * std::sqrt(3.0));
}

template <class Element>
void store_elements(const float* from, std::byte* to, int64_t begin, int count) {
  cpu::convert_row<cpu::Simd<float, 16>>(from, reinterpret_cast<Element*>(to) + begin, count, 1.0f);
}

// to[begin, begin + count) = from[0, count), rounded
void store_elements(DataType dtype, const float* from, std::byte* to, int64_t begin, int count) {
  switch (dtype) {
    case DataType::kBFloat16:
      return store_elements<cpu::BFloat16>(from, to, begin, count);
    case DataType::kFloat16:
      return store_elements<cpu::Float16>(from, to, begin, count);
    case DataType::kFloat32:
      return store_elements<float>(from, to, begin, count);
    case DataType::kFloat64:
      for (int i = 0; i < count; ++i) reinterpret_cast<double*>(to)[begin + i] = from[i];
  }
}

template <class Element>
void load_elements(const std::byte* from, double* to, int64_t count) {
  constexpr int kBlock = 64;
  float block[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int size = static_cast<int>(count - begin < kBlock ? count - begin : kBlock);
    cpu::convert_row<cpu::Simd<float, 16>>(reinterpret_cast<const Element*>(from) + begin, block, size, 1.0f);
    for (int i = 0; i < size; ++i) to[begin + i] = block[i];
  }
}

// Rows 0 to chunk_size of the table of theta^(-2 d / rotary_dim), theta = 10000. In float64 from whole positions:
// float32 angles would be off by what the check is to find.
HostTensor rotary_table(const Problem& problem, double (*function)(double)) {
  const int pairs = problem.rotary_dim() / 2;
  HostTensor table(problem.geometry.chunk_size + 1, pairs, DataType::kFloat32);
  auto* const values = reinterpret_cast<float*>(table.data.data());
  for (int64_t row = 0; row < table.rows; ++row) {
    for (int d = 0; d < pairs; ++d) {
      const double frequency = std::pow(10000.0, -static_cast<double>(d) / pairs);
      values[row * pairs + d] = static_cast<float>(function(static_cast<double>(row) * frequency));
    }
  }
  return table;
}

}  // namespace

double Problem::scale() const { return 1 / std::sqrt(static_cast<double>(shape.head_dim)); }

int64_t Problem::query_row(int batch, int query, int head) const {
  return (static_cast<int64_t>(batch) * shape.seqlen_q + query) * shape.heads + head;
}

int64_t Problem::key_row(int batch, int key, int kv_head) const {
  return (static_cast<int64_t>(batch) * shape.seqlen_k + key) * shape.kv_heads + kv_head;
}

int64_t Problem::lse_row(int batch, int query, int head) const {
  return (static_cast<int64_t>(batch) * shape.heads + head) * shape.seqlen_q + query;
}

int64_t Problem::visible_pairs() const {
  const int64_t queries = shape.seqlen_q;
  return queries * first_position() + queries * (queries + 1) / 2;
}

double Problem::forward_flops() const {
  return 4.0 * shape.batch * shape.heads * shape.head_dim * static_cast<double>(visible_pairs());
}

double Problem::backward_flops() const { return 2.5 * forward_flops(); }

size_t element_bytes(DataType dtype) { return names_of(dtype).bytes; }

double epsilon(DataType dtype) { return names_of(dtype).epsilon; }

const char* short_name(DataType dtype) { return names_of(dtype).short_name; }

const char* torch_name(DataType dtype) { return names_of(dtype).torch_name; }

bool parse_dtype(const std::string& short_name, DataType& dtype) {
  for (const DtypeNames& names : kDtypes) {
    if (short_name != names.short_name) continue;
    dtype = names.dtype;
    return true;
  }
  return false;
}

std::string all_dtype_names() {
  std::string all;
  for (const DtypeNames& names : kDtypes) all += (all.empty() ? "" : ", ") + std::string(names.short_name);
  return all;
}

HostTensor::HostTensor(int64_t rows, int64_t width, DataType dtype)
    : rows(rows), width(width), dtype(dtype), data(static_cast<size_t>(rows * width) * element_bytes(dtype)) {}

void HostTensor::read_row(int64_t row, double* to) const {
  const std::byte* const from = data.data() + static_cast<size_t>(row * width) * element_bytes(dtype);
  switch (dtype) {
    case DataType::kBFloat16:
      return load_elements<cpu::BFloat16>(from, to, width);
    case DataType::kFloat16:
      return load_elements<cpu::Float16>(from, to, width);
    case DataType::kFloat32:
      return load_elements<float>(from, to, width);
    case DataType::kFloat64:
      std::memcpy(to, from, static_cast<size_t>(width) * sizeof(double));
  }
}

HostTensor random_tensor(int64_t rows, int64_t width, DataType dtype, uint64_t seed) {
  constexpr int kBlock = 1024;
  HostTensor tensor(rows, width, dtype);
  const int64_t count = rows * width;
  parallel_blocks((count + kBlock - 1) / kBlock, [&](int64_t block) {
    float values[kBlock];
    const int64_t begin = block * kBlock;
    const int size = static_cast<int>(count - begin < kBlock ? count - begin : kBlock);
    for (int i = 0; i < size; ++i) values[i] = random_normal(random_bits(seed, static_cast<uint64_t>(begin + i)));
    store_elements(dtype, values, tensor.data.data(), begin, size);
  });
  return tensor;
}

Inputs make_inputs(const Problem& problem, bool gradients) {
  const AttentionShape& shape = problem.shape;
  const int64_t query_rows = static_cast<int64_t>(shape.batch) * shape.seqlen_q * shape.heads;
  const int64_t key_rows = static_cast<int64_t>(shape.batch) * shape.seqlen_k * shape.kv_heads;
  const auto random = [&](int64_t rows, uint64_t seed) {
    return random_tensor(rows, shape.head_dim, problem.dtype, seed);
  };
  return {problem,
          random(query_rows, 1),
          random(key_rows, 2),
          random(key_rows, 3),
          gradients ? random(query_rows, 4) : HostTensor(),
          rotary_table(problem, [](double angle) { return std::cos(angle); }),
          rotary_table(problem, [](double angle) { return std::sin(angle); })};
}

}  // namespace chunkattn::bench
