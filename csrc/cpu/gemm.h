// Row-major matrix products by the BLAS found at run time: libtorch_cpu exports one on x86 (MKL).
// Where there is none, float and double products run in loops of our own.
#pragma once

#include "cpu/simd.h"

namespace chunkattn::cpu {

enum class Transpose { kNo, kYes };

// C [m, n] = op(A) op(B), added to what C holds if `accumulate`; op(A) is [m, k] and op(B) is [k, n]. lda, ldb and ldc
// are the elements from one row of the stored matrix to the next.
void gemm(Transpose transpose_a, Transpose transpose_b, int m, int n, int k, const float* a, int lda, const float* b,
          int ldb, bool accumulate, float* c, int ldc);
void gemm(Transpose transpose_a, Transpose transpose_b, int m, int n, int k, const double* a, int lda, const double* b,
          int ldb, bool accumulate, double* c, int ldc);

// Sums in float. Only where has_fast_bfloat16_gemm().
void gemm(Transpose transpose_a, Transpose transpose_b, int m, int n, int k, const BFloat16* a, int lda,
          const BFloat16* b, int ldb, bool accumulate, float* c, int ldc);

// True when the BLAS multiplies bfloat16 faster than float. MKL does with AMX (3 to 5 times as fast), but not with
// AVX512-BF16 alone (0.6 times), and without either it converts to float itself.
bool has_fast_bfloat16_gemm();

}  // namespace chunkattn::cpu
