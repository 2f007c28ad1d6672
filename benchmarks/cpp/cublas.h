// Matrix products by cuBLAS, which is loaded when it is asked for: the executable starts where it is not installed.
#pragma once

#include "params.h"

namespace chunkattn::bench {

class Cublas {
 public:
  // Throws std::runtime_error with why there is none.
  Cublas();
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  // Enqueues the product of two square matrices of bfloat16 or float16, summed in float32. Null, or what failed.
  const char* multiply(int size, DataType dtype, const void* a, const void* b, void* product, void* stream) const;

 private:
  void* library_ = nullptr;
  void* handle_ = nullptr;
};

}  // namespace chunkattn::bench
