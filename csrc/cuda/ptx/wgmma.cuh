// Warpgroup matrix products (sm_90a): d[64 x N] += a[64 x 16] b[16 x N] with float32 accumulators.
// b lies in shared memory, a in shared memory or registers. Of the accumulators each thread holds [N / 8][4], laid out
// as common/softmax.cuh says; a in registers has the layout of mma.m16n8k16's a.
#pragma once

#include <cstdint>

#include "cuda/common/element_types.h"

namespace chunkattn::ptx {

// Orders register accesses and shared-memory stores of this thread before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most `kPending` of the newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps what the compiler does with these registers on its side of the surrounding waits: it does not know that a wait
// is what makes accumulators valid.
template <int kBlocks>
__device__ __forceinline__ void pin(float (&d)[kBlocks][4]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    asm volatile("" : "+f"(d[block][0]), "+f"(d[block][1]), "+f"(d[block][2]), "+f"(d[block][3])::"memory");
  }
}

// Matrix descriptors of tiles whose rows are 128 bytes, swizzled by 128 bytes and aligned to 1024.
// In units of 16 bytes: start at bit 0, leading offset at 16, stride offset at 32; swizzle mode 1 at bit 62.
constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;

// Rows run along the outer dimension (M or N), their 64 elements along K. Eight rows are 1024 bytes apart from the
// next.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) {
  return kSwizzle128 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
}

// Rows run along K, their 64 elements along N; the next 64 elements of N lie `block_bytes` further.
__device__ __forceinline__ uint64_t descriptor_n_major(uint32_t address, uint32_t block_bytes) {
  return kSwizzle128 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(block_bytes >> 4) << 16 |
         (address & 0x3FFFF) >> 4;
}

// Without swizzle: cores of eight rows along K of 16 bytes, row after row. The next eight of K lie `along_k` bytes
// further, the next eight rows `along_rows`.
__device__ __forceinline__ uint64_t descriptor_of_cores(uint32_t address, uint32_t along_k, uint32_t along_rows) {
  return static_cast<uint64_t>(along_rows >> 4) << 32 | static_cast<uint64_t>(along_k >> 4) << 16 |
         (address & 0x3FFFF) >> 4;
}

template <typename T, int kColumns>
struct Wgmma;

#define CHUNKATTN_ACC(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CHUNKATTN_ACC4(d, i) \
  CHUNKATTN_ACC(d, i), CHUNKATTN_ACC(d, i + 1), CHUNKATTN_ACC(d, i + 2), CHUNKATTN_ACC(d, i + 3)
#define CHUNKATTN_ACC8(d, i) CHUNKATTN_ACC4(d, i), CHUNKATTN_ACC4(d, i + 4)
#define CHUNKATTN_ACCUMULATORS_64(d) CHUNKATTN_ACC8(d, 0)
#define CHUNKATTN_ACCUMULATORS_80(d) CHUNKATTN_ACC8(d, 0), CHUNKATTN_ACC(d, 8), CHUNKATTN_ACC(d, 9)
#define CHUNKATTN_ACCUMULATORS_128(d) CHUNKATTN_ACC8(d, 0), CHUNKATTN_ACC8(d, 8)
#define CHUNKATTN_ACCUMULATORS_256(d) \
  CHUNKATTN_ACC8(d, 0), CHUNKATTN_ACC8(d, 8), CHUNKATTN_ACC8(d, 16), CHUNKATTN_ACC8(d, 24)
#define CHUNKATTN_REGISTERS_64                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define CHUNKATTN_REGISTERS_80                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39}"
#define CHUNKATTN_REGISTERS_128                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define CHUNKATTN_REGISTERS_256                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// ss: a and b in shared memory, rows of both along the outer dimension, or kRowsAlongK; `accumulate` false starts from
// zero.
// rs: a in registers, b with rows along K (a value tile as it lies in memory).
// rs_rows: a in registers, b with rows along the outer dimension; `accumulate` false starts from zero.
#define CHUNKATTN_WGMMA(TYPE, PTX_TYPE, N, P0, P1, P2, P3, P4, P5)                                                     \
  template <>                                                                                                          \
  struct Wgmma<TYPE, N> {                                                                                              \
    template <bool kRowsAlongK = false>                                                                                \
    static __device__ __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P2                                                             \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " " CHUNKATTN_REGISTERS_##N \
                   ", %" P0 ", %" P1 ", p, 1, 1, %" P3 ", %" P3 ";\n}\n"                                               \
                   : CHUNKATTN_ACCUMULATORS_##N(d)                                                                     \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kRowsAlongK ? 1 : 0));                     \
    }                                                                                                                  \
    static __device__ __forceinline__ void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {              \
      asm volatile(                                                                                                    \
          "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                                   \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " " CHUNKATTN_REGISTERS_##N          \
          ", {%" P0 ", %" P1 ", %" P2 ", %" P3 "}, %" P4 ", p, 1, 1, 1;\n}\n"                                          \
          : CHUNKATTN_ACCUMULATORS_##N(d)                                                                              \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                       \
    }                                                                                                                  \
    static __device__ __forceinline__ void rs_rows(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,           \
                                                   bool accumulate) {                                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P5                                                             \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " " CHUNKATTN_REGISTERS_##N \
                   ", {%" P0 ", %" P1 ", %" P2 ", %" P3 "}, %" P4 ", p, 1, 1, 0;\n}\n"                                 \
                   : CHUNKATTN_ACCUMULATORS_##N(d)                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));           \
    }                                                                                                                  \
  };

CHUNKATTN_WGMMA(cuda::BFloat16, "bf16", 64, "32", "33", "34", "35", "36", "37")
CHUNKATTN_WGMMA(cuda::BFloat16, "bf16", 80, "40", "41", "42", "43", "44", "45")
CHUNKATTN_WGMMA(cuda::BFloat16, "bf16", 128, "64", "65", "66", "67", "68", "69")
CHUNKATTN_WGMMA(cuda::BFloat16, "bf16", 256, "128", "129", "130", "131", "132", "133")
CHUNKATTN_WGMMA(cuda::Float16, "f16", 64, "32", "33", "34", "35", "36", "37")
CHUNKATTN_WGMMA(cuda::Float16, "f16", 80, "40", "41", "42", "43", "44", "45")
CHUNKATTN_WGMMA(cuda::Float16, "f16", 128, "64", "65", "66", "67", "68", "69")
CHUNKATTN_WGMMA(cuda::Float16, "f16", 256, "128", "129", "130", "131", "132", "133")

#undef CHUNKATTN_WGMMA
#undef CHUNKATTN_REGISTERS_64
#undef CHUNKATTN_ACCUMULATORS_64
#undef CHUNKATTN_REGISTERS_80
#undef CHUNKATTN_ACCUMULATORS_80
#undef CHUNKATTN_REGISTERS_128
#undef CHUNKATTN_ACCUMULATORS_128
#undef CHUNKATTN_REGISTERS_256
#undef CHUNKATTN_ACCUMULATORS_256
#undef CHUNKATTN_ACC8
#undef CHUNKATTN_ACC4
#undef CHUNKATTN_ACC

}  // namespace chunkattn::ptx
