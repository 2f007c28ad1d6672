#include "cublas.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <library_types.h>

#include <stdexcept>
#include <string>

namespace chunkattn::bench {

namespace {

// From cublas_api.h, versions 12 and 13 alike.
constexpr int kSuccess = 0;            // CUBLAS_STATUS_SUCCESS
constexpr int kNotTransposed = 0;      // CUBLAS_OP_N
constexpr int kComputeInFloat = 68;    // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;  // CUBLAS_GEMM_DEFAULT

using Create = int (*)(void** handle);
using Destroy = int (*)(void* handle);
using SetStream = int (*)(void* handle, cudaStream_t stream);
using GemmEx = int (*)(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                       const void* a, cudaDataType_t a_type, int lda, const void* b, cudaDataType_t b_type, int ldb,
                       const void* beta, void* c, cudaDataType_t c_type, int ldc, int compute_type, int algorithm);

void* open_library() {
  for (const char* const name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
    if (void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  }
  return nullptr;
}

}  // namespace

Cublas::Cublas() : library_(open_library()) {
  if (library_ == nullptr) throw std::runtime_error("libcublas was not found; LD_LIBRARY_PATH can name its folder");
  const auto create = reinterpret_cast<Create>(dlsym(library_, "cublasCreate_v2"));
  if (create == nullptr || create(&handle_) != kSuccess) {
    dlclose(library_);
    throw std::runtime_error("libcublas does not start");
  }
}

Cublas::~Cublas() {
  const auto destroy = reinterpret_cast<Destroy>(dlsym(library_, "cublasDestroy_v2"));
  if (destroy != nullptr) destroy(handle_);
  dlclose(library_);
}

const char* Cublas::multiply(int size, DataType dtype, const void* a, const void* b, void* product,
                             void* stream) const {
  const auto set_stream = reinterpret_cast<SetStream>(dlsym(library_, "cublasSetStream_v2"));
  const auto gemm = reinterpret_cast<GemmEx>(dlsym(library_, "cublasGemmEx"));
  if (set_stream == nullptr || gemm == nullptr) return "libcublas has no cublasGemmEx";
  if (set_stream(handle_, static_cast<cudaStream_t>(stream)) != kSuccess) return "cublasSetStream failed";
  const cudaDataType_t type = dtype == DataType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  const float one = 1, zero = 0;
  const int status = gemm(handle_, kNotTransposed, kNotTransposed, size, size, size, &one, a, type, size, b, type, size,
                          &zero, product, type, size, kComputeInFloat, kDefaultAlgorithm);
  return status == kSuccess ? nullptr : "cublasGemmEx failed";
}

}  // namespace chunkattn::bench
