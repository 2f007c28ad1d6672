// Thread blocks that run together, a cluster, and reach into each other's shared memory (sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mma_sync.cuh"

namespace chunkattn::ptx {

__device__ __forceinline__ int cluster_block_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster. What they wrote before can be read behind it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// Where the same address lies in the shared memory of a block of the cluster.
__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// Arrives at a block's barrier. Says only that what the warp, or the copy engine for it, has read may be overwritten:
// what the thread wrote is not made visible to the other block (release.cluster), which would take longer than a
// product.
__device__ __forceinline__ void mbarrier_arrive_in_block(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(address_in_block(shared_address(barrier), rank))
               : "memory");
}

// Stores 16 bytes in a block's shared memory and counts them on its barrier: addresses from address_in_block().
__device__ __forceinline__ void store_in_block(uint32_t address, const uint4& chunk, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(
          address),
      "r"(chunk.x), "r"(chunk.y), "r"(chunk.z), "r"(chunk.w), "r"(barrier)
      : "memory");
}

// tma_load_4d to all blocks of a mask: to the same address of each, counted on the same barrier of each.
__device__ __forceinline__ void tma_load_4d_multicast(uint32_t shared, const CUtensorMap* map, uint64_t* barrier,
                                                      int c0, int c1, int c2, int c3, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(shared),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks)
      : "memory");
}

}  // namespace chunkattn::ptx
