// The kernels that can be benchmarked.
#pragma once

#include <string>
#include <vector>

#include "device.h"
#include "params.h"

namespace chunkattn::bench {

// What a kernel computes: decides how its work is counted and which outputs are checked.
enum class Pass { kForward, kBackward, kRotateKeys };

// Pointers and strides of every tensor of the problem; each kernel takes its part.
struct Arguments {
  BackwardParams backward;
  void* rotated_keys;  // [batch, seqlen_k, kv_heads, head_dim]
  Strides rotated_keys_strides;
  void* scratch;  // as many bytes as the kernel asks for
};

using Launch = const char* (*)(const Arguments& arguments, void* stream);

struct Kernel {
  const char* name;
  Pass pass;
  Place place;
  std::vector<DataType> dtypes;
  const char* head_dims;        // in words
  std::vector<Launch> prepare;  // run once, in this order: they write what `launch` reads beside the random inputs
  Launch launch;                // what is timed
  // Bytes of memory it needs beside the tensors. Null: none.
  size_t (*scratch_bytes)(const Arguments& arguments) = nullptr;
  // Why a device does not take a shape; empty when it does. Null: every device takes every shape.
  std::string (*refusal)(const AttentionShape& shape, int compute_capability) = nullptr;
};

const std::vector<Kernel>& all_kernels();

const char* pass_name(Pass pass);
std::string dtype_names(const Kernel& kernel, const char* separator);
bool takes_dtype(const Kernel& kernel, DataType dtype);

// Why the kernel does not run on these devices, whatever the shape; empty when it does.
std::string unavailable_reason(const Kernel& kernel, const Devices& devices);

}  // namespace chunkattn::bench
