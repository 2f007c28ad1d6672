#include "device.h"

#include <fstream>

namespace chunkattn::bench {

Devices find_devices() {
  Devices devices;
  devices.cpu = make_cpu_device();
  if constexpr (kBuiltWithCuda) {
    devices.cuda = make_cuda_device(devices.no_cuda);
  } else {
    devices.no_cuda = "this build has no CUDA kernels";
  }
  return devices;
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "";
}

std::string driver_version() {
  std::ifstream file("/sys/module/nvidia/version");
  std::string version;
  std::getline(file, version);
  return version;
}

}  // namespace chunkattn::bench
