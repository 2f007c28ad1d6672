#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "ceilings.h"
#include "device.h"
#include "thread_pool.h"

namespace chunkattn::bench {

namespace {

class CpuDevice : public Device {
 public:
  std::string name() const override {
    const std::string name = processor_name();
    return name.empty() ? "unknown processor" : name;
  }

  std::string description() const override { return name() + ", " + std::to_string(thread_count()) + " threads"; }

  std::string runtime_version() const override { return ""; }

  int compute_capability() const override { return 0; }

  Memory allocate(size_t bytes) override {
    constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
    void* const memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (memory == nullptr) throw std::bad_alloc();
    return {memory, std::free};
  }

  void upload(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

  void download(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

  void fill(void* to, int byte, size_t bytes) override { std::memset(to, byte, bytes); }

  void run(const Work& work) override {
    if (const char* const failure = work(nullptr)) throw std::runtime_error(failure);
  }

  std::vector<double> time(const Work& work, int repeats) override {
    using Clock = std::chrono::steady_clock;
    std::vector<double> milliseconds;
    for (int i = 0; i < repeats; ++i) {
      const auto start = Clock::now();
      run(work);
      milliseconds.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    }
    return milliseconds;
  }

  Ceilings measure_ceilings(DataType dtype) override { return measure_cpu_ceilings(*this, dtype); }
};

}  // namespace

std::unique_ptr<Device> make_cpu_device() { return std::make_unique<CpuDevice>(); }

}  // namespace chunkattn::bench
