#include "registry.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/backward/plan.h"
#include "cuda/forward/plan.h"
#include "kernels.h"
#include "problem.h"
#include "thread_pool.h"

namespace chunkattn::bench {

namespace {

const std::vector<DataType> kEveryDtype = {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32,
                                           DataType::kFloat64};
const std::vector<DataType> kHalfDtypes = {DataType::kBFloat16, DataType::kFloat16};

const char* forward_cpu(const Arguments& arguments, void*) {
  cpu::dca_forward(arguments.backward.forward, parallel_for);
  return nullptr;
}

const char* backward_cpu(const Arguments& arguments, void*) {
  cpu::dca_backward(arguments.backward, parallel_for);
  return nullptr;
}

// A build without CUDA links none of what stands under kBuiltWithCuda.
constexpr const char* kNoCuda = "this build has no CUDA kernels";

const char* rotate_keys(const Arguments& arguments, void* stream) {
  if constexpr (kBuiltWithCuda) {
    return cuda::rotate_keys(arguments.backward.forward, arguments.rotated_keys, arguments.rotated_keys_strides,
                             stream);
  }
  return kNoCuda;
}

const char* forward_cuda(const char* kernel, const Arguments& arguments, void* stream) {
  if constexpr (kBuiltWithCuda) {
    if (const char* const failure = cuda::force_kernel(kernel)) return failure;
    ForwardParams params = arguments.backward.forward;
    params.k = arguments.rotated_keys;
    params.k_strides = arguments.rotated_keys_strides;
    params.k_rotated = true;
    return cuda::dca_forward(params, stream);
  }
  return kNoCuda;
}

const char* forward_portable(const Arguments& arguments, void* stream) {
  return forward_cuda("portable", arguments, stream);
}

const char* forward_hopper(const Arguments& arguments, void* stream) {
  return forward_cuda("hopper", arguments, stream);
}

const char* forward_fastest(const Arguments& arguments, void* stream) {
  return forward_cuda("auto", arguments, stream);
}

size_t backward_scratch_bytes(const Arguments& arguments) {
  return kBuiltWithCuda ? cuda::backward_workspace_bytes(arguments.backward, false) : 0;
}

const char* backward_cuda(const char* kernel, const Arguments& arguments, void* stream) {
  if constexpr (kBuiltWithCuda) {
    if (const char* const failure = cuda::force_kernel(kernel)) return failure;
    return cuda::dca_backward(arguments.backward, false, arguments.scratch, stream);
  }
  return kNoCuda;
}

const char* backward_portable(const Arguments& arguments, void* stream) {
  return backward_cuda("portable", arguments, stream);
}

const char* backward_hopper(const Arguments& arguments, void* stream) {
  return backward_cuda("hopper", arguments, stream);
}

template <typename Plan>
std::string plan_refusal(Plan plan, const AttentionShape& shape, int compute_capability, cuda::KernelChoice choice) {
  constexpr int kAlignedElements = 8;  // 16 bytes
  try {
    plan(shape, compute_capability, shape.head_dim % kAlignedElements == 0, choice);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

std::string forward_portable_refusal(const AttentionShape& shape, int compute_capability) {
  return plan_refusal(cuda::plan_forward, shape, compute_capability, cuda::KernelChoice::kPortable);
}

std::string forward_hopper_refusal(const AttentionShape& shape, int compute_capability) {
  return plan_refusal(cuda::plan_forward, shape, compute_capability, cuda::KernelChoice::kHopper);
}

std::string backward_portable_refusal(const AttentionShape& shape, int compute_capability) {
  return plan_refusal(cuda::plan_backward, shape, compute_capability, cuda::KernelChoice::kPortable);
}

std::string backward_hopper_refusal(const AttentionShape& shape, int compute_capability) {
  return plan_refusal(cuda::plan_backward, shape, compute_capability, cuda::KernelChoice::kHopper);
}

}  // namespace

// A new kernel is one more entry.
const std::vector<Kernel>& all_kernels() {
  static const std::vector<Kernel> kernels = {
      {.name = "dca_forward_cpu",
       .pass = Pass::kForward,
       .place = Place::kCpu,
       .dtypes = kEveryDtype,
       .head_dims = "any",
       .prepare = {},
       .launch = forward_cpu},
      {.name = "dca_backward_cpu",
       .pass = Pass::kBackward,
       .place = Place::kCpu,
       .dtypes = kEveryDtype,
       .head_dims = "any",
       .prepare = {forward_cpu},
       .launch = backward_cpu},
      {.name = "dca_forward_portable",
       .pass = Pass::kForward,
       .place = Place::kCuda,
       .dtypes = kHalfDtypes,
       .head_dims = "up to 256",
       .prepare = {rotate_keys},
       .launch = forward_portable,
       .refusal = forward_portable_refusal},
      {.name = "dca_forward_hopper",
       .pass = Pass::kForward,
       .place = Place::kCuda,
       .dtypes = kHalfDtypes,
       .head_dims = "8 to 256, multiples of 8",
       .prepare = {rotate_keys},
       .launch = forward_hopper,
       .refusal = forward_hopper_refusal},
      {.name = "dca_backward_portable",
       .pass = Pass::kBackward,
       .place = Place::kCuda,
       .dtypes = kHalfDtypes,
       .head_dims = "up to 256",
       .prepare = {rotate_keys, forward_fastest},
       .launch = backward_portable,
       .scratch_bytes = backward_scratch_bytes,
       .refusal = backward_portable_refusal},
      {.name = "dca_backward_hopper",
       .pass = Pass::kBackward,
       .place = Place::kCuda,
       .dtypes = kHalfDtypes,
       .head_dims = "8 to 256, multiples of 8",
       .prepare = {rotate_keys, forward_fastest},
       .launch = backward_hopper,
       .scratch_bytes = backward_scratch_bytes,
       .refusal = backward_hopper_refusal},
      {.name = "rotate_keys",
       .pass = Pass::kRotateKeys,
       .place = Place::kCuda,
       .dtypes = kHalfDtypes,
       .head_dims = "any",
       .prepare = {},
       .launch = rotate_keys},
  };
  return kernels;
}

const char* pass_name(Pass pass) {
  switch (pass) {
    case Pass::kForward:
      return "forward";
    case Pass::kBackward:
      return "backward";
    case Pass::kRotateKeys:
      break;
  }
  return "rotate_keys";
}

std::string dtype_names(const Kernel& kernel, const char* separator) {
  std::string names;
  for (const DataType dtype : kernel.dtypes) names += (names.empty() ? "" : separator) + std::string(short_name(dtype));
  return names;
}

bool takes_dtype(const Kernel& kernel, DataType dtype) {
  return std::find(kernel.dtypes.begin(), kernel.dtypes.end(), dtype) != kernel.dtypes.end();
}

std::string unavailable_reason(const Kernel& kernel, const Devices& devices) {
  const Device* const device = devices.at(kernel.place);
  if (device == nullptr) return devices.no_cuda;
  constexpr AttentionShape kPlain{1, 64, 64, 1, 1, 64};
  return kernel.refusal == nullptr ? "" : kernel.refusal(kPlain, device->compute_capability());
}

}  // namespace chunkattn::bench
