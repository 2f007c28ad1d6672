#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <stdexcept>
#include <string>

// Lives in libtorch_cuda. Weak, so that one build of this library loads beside CPU builds of torch as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace chunkattn::bindings {

void parallel_for(int64_t count, cpu::ParallelBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
}

torch::stable::Tensor new_workspace(const torch::stable::Tensor& like, size_t bytes) {
  const std::array<int64_t, 1> shape{static_cast<int64_t>(bytes)};
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, torch::headeronly::ScalarType::Byte);
}

void* current_cuda_stream(int32_t device_index) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("chunkattn: the CUDA library of torch is not loaded, so there is no stream to launch on");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

void throw_if_failed(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("chunkattn: ") + error);
}

}  // namespace chunkattn::bindings
