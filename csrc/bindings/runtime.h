// What the kernels borrow from torch: its threads and its current CUDA stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

#include "../kernels.h"

namespace chunkattn::bindings {

// cpu::ParallelFor on torch's own thread pool.
void parallel_for(int64_t count, cpu::ParallelBody body, void* context);

// Bytes of workspace on the device of `like`, which the allocator hands on in stream order: they need not outlive the
// enqueueing of the kernels that use them.
torch::stable::Tensor new_workspace(const torch::stable::Tensor& like, size_t bytes);

// A cudaStream_t.
void* current_cuda_stream(int32_t device_index);

// Turns what a CUDA launcher returns into an exception.
void throw_if_failed(const char* error);

}  // namespace chunkattn::bindings
