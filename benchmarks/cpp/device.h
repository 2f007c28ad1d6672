// Where kernels run: memory, one call, timed calls and what the hardware does at best.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "params.h"

namespace chunkattn::bench {

#ifdef CHUNKATTN_WITH_CUDA
inline constexpr bool kBuiltWithCuda = true;
#else
inline constexpr bool kBuiltWithCuda = false;
#endif

enum class Place { kCpu, kCuda };

// Enqueues or does one call. Returns null, or a sentence that says what failed, as the kernels do.
using Work = std::function<const char*(void* stream)>;

using Memory = std::shared_ptr<void>;

struct Ceilings {
  double matmul_tflops = 0;  // 0: not measured
  std::string matmul;        // what was multiplied, or why nothing was
  double copy_gbps = 0;      // bytes read and written
  std::string copy;          // what was copied
};

class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;             // of the hardware
  virtual std::string description() const = 0;      // with its sizes
  virtual std::string runtime_version() const = 0;  // of CUDA; empty for a CPU
  virtual int compute_capability() const = 0;       // major * 10 + minor; 0 for a CPU

  virtual Memory allocate(size_t bytes) = 0;
  virtual void upload(void* to, const void* from, size_t bytes) = 0;
  virtual void download(void* to, const void* from, size_t bytes) = 0;
  virtual void fill(void* to, int byte, size_t bytes) = 0;

  // One call, waited for. Both throw std::runtime_error with what failed.
  virtual void run(const Work& work) = 0;
  // Milliseconds of each of so many calls.
  virtual std::vector<double> time(const Work& work, int repeats) = 0;

  virtual Ceilings measure_ceilings(DataType dtype) = 0;
};

std::unique_ptr<Device> make_cpu_device();

// Only in builds with CUDA. The first GPU, or null and one sentence that says why there is none to use.
std::unique_ptr<Device> make_cuda_device(std::string& reason);

struct Devices {
  std::unique_ptr<Device> cpu;
  std::unique_ptr<Device> cuda;
  std::string no_cuda;  // why cuda is null

  Device* at(Place place) const { return place == Place::kCpu ? cpu.get() : cuda.get(); }
};

Devices find_devices();

// Names for reports; empty where the system does not tell.
std::string processor_name();
std::string driver_version();

}  // namespace chunkattn::bench
