// What the operators accept. Everything else throws std::invalid_argument, a ValueError in Python, whose message names
// the argument, what it got and what it takes. Nothing is allocated or launched before.
#pragma once

#include "arguments.h"

namespace chunkattn::bindings {

void check_dca(const DcaArguments& arguments);

// The tensors the backward takes on top of the arguments of the forward.
void check_dca_backward(const DcaArguments& arguments, const Tensor& dout, const Tensor& out,
                        const Tensor& softmax_lse);

// The offsets of packed sequences that the host can read.
void check_packed_contents(const ForwardParams& params);

void check_decode(const DecodeArguments& arguments, const Tensor* out);

// The lengths and the table of a cache that the host can read.
void check_cache_contents(const DecodeParams& params);

void check_select(const SelectArguments& arguments);

// Without `out` where nothing is attended.
void check_select_merge_decode(const SelectMergeDecodeArguments& arguments, const Tensor* out);
void check_cache_contents(const SelectMergeDecodeParams& params);

// With CHUNKATTN_DEBUG=1 in the environment also ids that would be ignored are refused, which waits for the device.
void check_select_merge(const SelectMergeArguments& arguments);
void check_select_merge_backward(const SelectMergeArguments& arguments, const Tensor& dout, const Tensor& out,
                                 const Tensor& softmax_lse);

}  // namespace chunkattn::bindings
