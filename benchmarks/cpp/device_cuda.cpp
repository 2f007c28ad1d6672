#include <cuda_runtime_api.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "ceilings.h"
#include "device.h"
#include "read_memory.h"

namespace chunkattn::bench {

namespace {

void require(cudaError_t status, const std::string& call) {
  if (status != cudaSuccess) throw std::runtime_error(call + " failed: " + cudaGetErrorString(status));
}

class Event {
 public:
  Event() { require(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Times calls by events, each with a cold L2 cache: memory of four times its size is read before. While it is, the host
// gets ahead, so that the latency of a launch is hidden as it is in a model.
class CudaDevice : public Device {
 public:
  explicit CudaDevice(const cudaDeviceProp& properties) : properties_(properties) {
    require(cudaStreamCreate(&stream_), "cudaStreamCreate");
    constexpr size_t kUnknownCacheBytes = size_t{64} << 20;
    constexpr size_t kGranularity = 16;
    const size_t cache = properties.l2CacheSize > 0 ? properties.l2CacheSize : kUnknownCacheBytes;
    flush_bytes_ = 4 * cache / kGranularity * kGranularity;
    flush_ = allocate(flush_bytes_);
    sink_ = allocate(sizeof(unsigned));
    fill(flush_.get(), 0, flush_bytes_);
  }

  ~CudaDevice() override { cudaStreamDestroy(stream_); }

  std::string name() const override { return properties_.name; }

  std::string description() const override {
    std::ostringstream text;
    text << name() << ", compute capability " << properties_.major << "." << properties_.minor << ", "
         << properties_.multiProcessorCount << " multiprocessors, " << (properties_.totalGlobalMem >> 30)
         << " GiB, L2 cache " << (properties_.l2CacheSize >> 20) << " MiB, CUDA " << runtime_version();
    return text.str();
  }

  std::string runtime_version() const override {
    return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  }

  int compute_capability() const override { return properties_.major * 10 + properties_.minor; }

  Memory allocate(size_t bytes) override {
    void* memory = nullptr;
    require(cudaMalloc(&memory, bytes), "cudaMalloc of " + std::to_string(bytes) + " bytes");
    return {memory, [](void* pointer) { cudaFree(pointer); }};
  }

  void upload(void* to, const void* from, size_t bytes) override {
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync to the GPU");
    synchronize();
  }

  void download(void* to, const void* from, size_t bytes) override {
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync from the GPU");
    synchronize();
  }

  void fill(void* to, int byte, size_t bytes) override {
    require(cudaMemsetAsync(to, byte, bytes, stream_), "cudaMemsetAsync");
    synchronize();
  }

  void run(const Work& work) override {
    enqueue(work);
    synchronize();
  }

  std::vector<double> time(const Work& work, int repeats) override {
    const std::vector<Event> starts(repeats), ends(repeats);
    for (int i = 0; i < repeats; ++i) {
      require(read_memory(flush_.get(), flush_bytes_, static_cast<unsigned*>(sink_.get()), stream_),
              "the launch of read_memory");
      require(cudaEventRecord(starts[i].get(), stream_), "cudaEventRecord");
      enqueue(work);
      require(cudaEventRecord(ends[i].get(), stream_), "cudaEventRecord");
    }
    synchronize();
    std::vector<double> milliseconds;
    for (int i = 0; i < repeats; ++i) {
      float elapsed = 0;
      require(cudaEventElapsedTime(&elapsed, starts[i].get(), ends[i].get()), "cudaEventElapsedTime");
      milliseconds.push_back(elapsed);
    }
    return milliseconds;
  }

  Ceilings measure_ceilings(DataType dtype) override { return measure_cuda_ceilings(*this, dtype); }

 private:
  void enqueue(const Work& work) {
    if (const char* const failure = work(stream_)) throw std::runtime_error(failure);
  }

  void synchronize() { require(cudaStreamSynchronize(stream_), "work on the GPU"); }

  cudaDeviceProp properties_;
  cudaStream_t stream_ = nullptr;
  size_t flush_bytes_ = 0;
  Memory flush_;
  Memory sink_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(std::string& reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    reason = "CUDA finds no GPU";
    if (status != cudaSuccess) reason += std::string(" (") + cudaGetErrorString(status) + ")";
    return nullptr;
  }
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  if (properties.major < 8) {
    reason = std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." +
             std::to_string(properties.minor) + ", the kernels need 8.0 or later";
    return nullptr;
  }
  require(cudaSetDevice(0), "cudaSetDevice");
  return std::make_unique<CudaDevice>(properties);
}

}  // namespace chunkattn::bench
