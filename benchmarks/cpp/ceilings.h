// What a device does at best: the rate of a large matrix product and of a large copy.
#pragma once

#include "device.h"

namespace chunkattn::bench {

Ceilings measure_cpu_ceilings(Device& device, DataType dtype);
Ceilings measure_cuda_ceilings(Device& device, DataType dtype);  // only in builds with CUDA

}  // namespace chunkattn::bench
