#include <cstring>
#include <type_traits>

#include "ceilings.h"
#include "cpu/gemm.h"
#include "problem.h"
#include "statistics.h"
#include "thread_pool.h"

// Null where the process has no BLAS. Only the addresses are asked for; cpu/gemm.h makes the calls.
extern "C" {
__attribute__((weak)) void sgemm_();
__attribute__((weak)) void dgemm_();
}

namespace chunkattn::bench {

namespace {

struct Rate {
  double tflops;
  std::string what;
};

// The fastest of so many calls counts: other programs only slow a processor down.
double fastest(Device& device, const Work& work) {
  constexpr int kRepeats = 30;
  device.run(work);
  return quantile(device.time(work, kRepeats), 0);
}

// TFLOP/s of work that every thread does once.
template <class Share>
double rate_on_all_threads(Device& device, double flops_per_thread, const Share& share) {
  const Work work = [&](void*) -> const char* {
    parallel_blocks(thread_count(), share);
    return nullptr;
  };
  return flops_per_thread * thread_count() / fastest(device, work) / 1e9;
}

// The BLAS of the CPU kernels; every thread multiplies matrices of its own.
template <class Element, class Accum>
Rate measure_blas(Device& device, DataType dtype) {
  constexpr int kSize = 1024;
  const HostTensor a = random_tensor(kSize, kSize, dtype, 1);
  const HostTensor b = random_tensor(kSize, kSize, dtype, 2);
  std::vector<Accum> products(static_cast<size_t>(thread_count()) * kSize * kSize);
  const double tflops = rate_on_all_threads(device, 2.0 * kSize * kSize * kSize, [&](int64_t thread) {
    cpu::gemm(cpu::Transpose::kNo, cpu::Transpose::kNo, kSize, kSize, kSize,
              reinterpret_cast<const Element*>(a.data.data()), kSize, reinterpret_cast<const Element*>(b.data.data()),
              kSize, false, products.data() + thread * kSize * kSize, kSize);
  });
  return {tflops, std::string("1024^3 ") + torch_name(dtype) + " on every thread, BLAS"};
}

// Twelve chains of dependent multiply-adds keep two units of four or five cycles' latency busy. Returns the FLOPs done.
template <class S, class Element>
CHUNKATTN_INLINE double multiply_add(int iterations, volatile Element* sink) {
  constexpr int kChains = 12;
  typename S::Vector chains[kChains];
  typename S::Vector factor, addend;
  for (int lane = 0; lane < S::kLanes; ++lane) {
    factor[lane] = Element(0.999) + *sink;
    addend[lane] = Element(0.001) + *sink;
  }
  for (int c = 0; c < kChains; ++c) chains[c] = addend * Element(c);
  for (int i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) chains[c] = chains[c] * factor + addend;
  }
  for (int c = 0; c < kChains; ++c) *sink = chains[c][0];
  return 2.0 * iterations * kChains * S::kLanes;
}

template <class Element>
Rate measure_multiply_adds(Device& device, DataType dtype) {
  constexpr int kIterations = 1 << 21;
  double flops = 0;
  cpu::vectorized(CHUNKATTN_LOOPS(bytes) {
    volatile Element sink = 0;
    flops = multiply_add<cpu::Simd<Element, bytes>>(kIterations, &sink);
  });
  const double tflops = rate_on_all_threads(device, flops, [](int64_t) {
    cpu::vectorized(CHUNKATTN_LOOPS(bytes) {
      volatile Element sink = 0;
      multiply_add<cpu::Simd<Element, bytes>>(kIterations, &sink);
    });
  });
  return {tflops, std::string(torch_name(dtype)) + " multiply-adds in registers, no BLAS"};
}

// 16-bit types are multiplied in float32 where the BLAS has nothing faster.
Rate measure_products(Device& device, DataType dtype) {
  if (dtype == DataType::kFloat64) {
    return dgemm_ != nullptr ? measure_blas<double, double>(device, dtype)
                             : measure_multiply_adds<double>(device, dtype);
  }
  if (dtype == DataType::kBFloat16 && cpu::has_fast_bfloat16_gemm()) {
    return measure_blas<cpu::BFloat16, float>(device, dtype);
  }
  return sgemm_ != nullptr ? measure_blas<float, float>(device, DataType::kFloat32)
                           : measure_multiply_adds<float>(device, DataType::kFloat32);
}

double measure_copy(Device& device, size_t bytes) {
  const Memory source = device.allocate(bytes);
  const Memory target = device.allocate(bytes);
  device.fill(source.get(), 1, bytes);
  const Work work = [&](void*) -> const char* {
    const size_t parts = static_cast<size_t>(thread_count());
    parallel_blocks(thread_count(), [&](int64_t part) {
      const size_t begin = bytes / parts * static_cast<size_t>(part);
      const size_t end = part + 1 == thread_count() ? bytes : begin + bytes / parts;
      std::memcpy(static_cast<char*>(target.get()) + begin, static_cast<const char*>(source.get()) + begin,
                  end - begin);
    });
    return nullptr;
  };
  return 2.0 * static_cast<double>(bytes) / fastest(device, work) / 1e6;
}

}  // namespace

Ceilings measure_cpu_ceilings(Device& device, DataType dtype) {
  const Rate products = measure_products(device, dtype);
  return {products.tflops, products.what, measure_copy(device, size_t{256} << 20), "256 MiB, memcpy on every thread"};
}

}  // namespace chunkattn::bench
