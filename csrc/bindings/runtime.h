// What the kernels borrow from torch: its threads and its current CUDA stream.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace chunkattn::bindings {

// cpu::ParallelFor on torch's own thread pool.
void parallel_for(int64_t count, cpu::ParallelBody body, void* context);

// A cudaStream_t.
void* current_cuda_stream(int32_t device_index);

// Turns what a CUDA launcher returns into an exception.
void throw_if_failed(const char* error);

}  // namespace chunkattn::bindings
