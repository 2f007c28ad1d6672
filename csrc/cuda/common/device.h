// What the launchers ask before they pick a kernel.
#pragma once

#include "cuda/common/kernel_plan.h"

namespace chunkattn::cuda {

// Writes the compute capability of the current device, major * 10 + minor. Returns null, or why it has no kernels.
const char* compute_capability(int* capability);

// Writes how many multiprocessors the current device has. Returns null, or what failed.
const char* multiprocessors(int* count);

// What kernels.h's force_kernel asked for.
KernelChoice forced_kernel();

}  // namespace chunkattn::cuda
