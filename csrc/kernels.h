// Every entry point the bindings and the microbenchmark call. No torch, no CUDA headers.
#pragma once

#include <cstddef>

#include "params.h"

namespace chunkattn {

namespace cpu {

// Runs body(context, begin, end) over disjoint parts of [0, count), each on one thread of the caller's pool.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, ParallelBody body, void* context);

void dca_forward(const ForwardParams& params, ParallelFor parallel_for);
void dca_backward(const BackwardParams& params, ParallelFor parallel_for);

void select(const SelectParams& params, ParallelFor parallel_for);
void select_merge_forward(const SelectMergeParams& params, ParallelFor parallel_for);
void select_merge_backward(const SelectMergeBackwardParams& params, ParallelFor parallel_for);

// Appends the new keys and values to the cache, then attends.
void dca_decode(const DecodeParams& params, ParallelFor parallel_for);

// Appends the tokens to the cache, then attends.
void select_merge_decode(const SelectMergeDecodeParams& params, ParallelFor parallel_for);

}  // namespace cpu

namespace cuda {

// Launches return null, or a sentence that says what failed. `stream` is a cudaStream_t.
// Keys of dca_forward must be rotated: rotate_keys writes a rotated copy.
const char* rotate_keys(const ForwardParams& params, void* rotated, const Strides& rotated_strides, void* stream);
const char* dca_forward(const ForwardParams& params, void* stream);

// The workspace of dca_backward, in bytes; it starts on a multiple of 256 bytes and holds nothing yet. deterministic:
// dq is summed in a fixed order.
size_t backward_workspace_bytes(const BackwardParams& params, bool deterministic);

// Keys may be raw. Until the end dq holds rotated queries and dk rotated keys, so neither may overlap another tensor.
// Long calls take streams of their own as well, which begin and end with `stream`.
const char* dca_backward(const BackwardParams& params, bool deterministic, void* workspace, void* stream);

// The workspace of dca_decode, laid out from `memory` on, and its size: without memory it tells the size alone. The
// memory starts on a multiple of 256 bytes and holds nothing yet. The size depends on shapes and the device alone.
DecodeWorkspace decode_workspace(const DecodeParams& params, void* memory, size_t* bytes);

// Appends the new keys and values to the cache, then attends. Lengths and block table are read on the device: a graph
// that captured the call may be replayed with others.
const char* dca_decode(const DecodeParams& params, const DecodeWorkspace& workspace, void* stream);

// The workspace of select, as decode_workspace lays out its own.
SelectWorkspace select_workspace(const SelectParams& params, void* memory, size_t* bytes);

const char* select(const SelectParams& params, const SelectWorkspace& workspace, void* stream);

// The workspace of select_merge_forward.
SelectMergeWorkspace select_merge_workspace(const SelectMergeParams& params, void* memory, size_t* bytes);

const char* select_merge_forward(const SelectMergeParams& params, const SelectMergeWorkspace& workspace, void* stream);

// The workspace of select_merge_backward. deterministic: all gradients are summed in a fixed order.
SelectMergeBackwardWorkspace select_merge_backward_workspace(const SelectMergeBackwardParams& params,
                                                             bool deterministic, void* memory, size_t* bytes);

const char* select_merge_backward(const SelectMergeBackwardParams& params,
                                  const SelectMergeBackwardWorkspace& workspace, void* stream);

// The workspace of select_merge_decode, in bytes; it starts on a multiple of 256 bytes and holds nothing yet. The size
// depends on shapes and the device alone.
const char* select_merge_decode_workspace(const SelectMergeDecodeParams& params, size_t* bytes);

// Appends the tokens to the cache, then attends. Lengths, lists and block table are read on the device: a graph that
// captured the call may be replayed as sequences grow.
const char* select_merge_decode(const SelectMergeDecodeParams& params, void* workspace, void* stream);

// For tests and benchmarks: makes every later call take this kernel ("auto", "portable" or "hopper").
const char* force_kernel(const char* name);

}  // namespace cuda

}  // namespace chunkattn
