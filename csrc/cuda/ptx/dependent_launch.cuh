// Programmatic dependent launch (sm_90 and later): a kernel that starts while the one before it still runs.
//
// A kernel waits for the one before it only, not for those before that. So whoever is launched this way waits in every
// thread block, before it touches global memory and whether it has work or not: then it does not end before its
// predecessor has, nor that one before its own, and who waits for a kernel has waited for all of them. A kernel that is
// launched as usual starts when its predecessor has ended, and needs no more than that either.
#pragma once

namespace chunkattn::ptx {

// Lets the next kernel of the stream start, if it was launched so, once every thread block has said it or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Waits until the kernel before has ended and what it wrote can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace chunkattn::ptx
