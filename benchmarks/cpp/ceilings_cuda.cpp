#include <cuda_runtime_api.h>

#include <stdexcept>

#include "ceilings.h"
#include "cublas.h"
#include "problem.h"
#include "statistics.h"

namespace chunkattn::bench {

namespace {

// The median of so many calls after a few: under load the clocks settle where they are for the kernels too.
double settled(Device& device, const Work& work) {
  constexpr int kWarmups = 3;
  constexpr int kRepeats = 30;
  device.time(work, kWarmups);
  return median(device.time(work, kRepeats));
}

// Random matrices: products of zeros take less power and run at higher clocks.
void measure_products(Device& device, DataType dtype, Ceilings& ceilings) {
  constexpr int kSize = 8192;
  try {
    const Cublas cublas;
    const HostTensor values = random_tensor(kSize, kSize, dtype, 1);
    const Memory a = device.allocate(values.bytes());
    const Memory b = device.allocate(values.bytes());
    const Memory product = device.allocate(values.bytes());
    device.upload(a.get(), values.data.data(), values.bytes());
    device.upload(b.get(), values.data.data(), values.bytes());
    const double milliseconds = settled(
        device, [&](void* stream) { return cublas.multiply(kSize, dtype, a.get(), b.get(), product.get(), stream); });
    ceilings.matmul_tflops = 2.0 * kSize * kSize * kSize / milliseconds / 1e9;
    ceilings.matmul = std::string("8192^3 ") + torch_name(dtype) + ", cuBLAS";
  } catch (const std::runtime_error& error) {
    ceilings.matmul = error.what();
  }
}

void measure_copy(Device& device, Ceilings& ceilings) {
  constexpr size_t kBytes = size_t{1} << 30;
  const Memory source = device.allocate(kBytes);
  const Memory target = device.allocate(kBytes);
  device.fill(source.get(), 1, kBytes);
  const double milliseconds = settled(device, [&](void* stream) -> const char* {
    const cudaError_t status = cudaMemcpyAsync(target.get(), source.get(), kBytes, cudaMemcpyDeviceToDevice,
                                               static_cast<cudaStream_t>(stream));
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  });
  ceilings.copy_gbps = 2.0 * kBytes / milliseconds / 1e6;
  ceilings.copy = "1 GiB, cudaMemcpyAsync";
}

}  // namespace

Ceilings measure_cuda_ceilings(Device& device, DataType dtype) {
  Ceilings ceilings;
  measure_products(device, dtype, ceilings);
  measure_copy(device, ceilings);
  return ceilings;
}

}  // namespace chunkattn::bench
