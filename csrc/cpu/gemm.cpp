#include "cpu/gemm.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// The Fortran BLAS interface. Weak: null where nothing in the process exports it.
extern "C" {
__attribute__((weak)) void sgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
                                  const int* k, const float* alpha, const float* a, const int* lda, const float* b,
                                  const int* ldb, const float* beta, float* c, const int* ldc);
__attribute__((weak)) void dgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
                                  const int* k, const double* alpha, const double* a, const int* lda, const double* b,
                                  const int* ldb, const double* beta, double* c, const int* ldc);
__attribute__((weak)) void gemm_bf16bf16f32_(const char* transpose_a, const char* transpose_b, const int* m,
                                             const int* n, const int* k, const float* alpha,
                                             const chunkattn::cpu::BFloat16* a, const int* lda,
                                             const chunkattn::cpu::BFloat16* b, const int* ldb, const float* beta,
                                             float* c, const int* ldc);
}

namespace chunkattn::cpu {
namespace {

template <class Element, class Accum>
using FortranGemm = void (*)(const char*, const char*, const int*, const int*, const int*, const Accum*, const Element*,
                             const int*, const Element*, const int*, const Accum*, Accum*, const int*);

// Fortran reads row-major matrices as their transposes: C^T = op(B)^T op(A)^T.
template <class Element, class Accum>
void call_blas(FortranGemm<Element, Accum> blas, Transpose transpose_a, Transpose transpose_b, int m, int n, int k,
               const Element* a, int lda, const Element* b, int ldb, bool accumulate, Accum* c, int ldc) {
  const char flag_a = transpose_a == Transpose::kYes ? 'T' : 'N';
  const char flag_b = transpose_b == Transpose::kYes ? 'T' : 'N';
  const Accum alpha = 1;
  const Accum beta = accumulate ? 1 : 0;
  blas(&flag_b, &flag_a, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}

// A matrix that may be read transposed.
template <class Element>
struct MatrixView {
  const Element* data;
  int64_t row_stride;
  int64_t column_stride;

  MatrixView(Transpose transpose, const Element* data, int ld)
      : data(data),
        row_stride(transpose == Transpose::kYes ? 1 : ld),
        column_stride(transpose == Transpose::kYes ? ld : 1) {}

  CHUNKATTN_INLINE const Element& operator()(int row, int column) const {
    return data[row * row_stride + column * column_stride];
  }
};

// One panel of B, packed, times kRows rows of A, in registers.
constexpr int kRows = 4;
constexpr int kPanelVectors = 2;
constexpr int kPanelDepth = 256;

template <class S, class Element, int rows>
CHUNKATTN_INLINE void multiply_panel(const MatrixView<Element>& a, int row, int depth_begin, int depth,
                                     const Element* panel, bool accumulate, Element* c, int ldc, int width) {
  constexpr int panel_width = kPanelVectors * S::kLanes;
  typename S::Vector sums[rows][kPanelVectors] = {};
  for (int p = 0; p < depth; ++p) {
    for (int i = 0; i < rows; ++i) {
      const Element value = a(row + i, depth_begin + p);
      for (int v = 0; v < kPanelVectors; ++v) sums[i][v] += load<S>(panel + p * panel_width + v * S::kLanes) * value;
    }
  }
  Element tile[panel_width];
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kPanelVectors; ++v) store<S>(tile + v * S::kLanes, sums[i][v]);
    Element* to = c + static_cast<int64_t>(row + i) * ldc;
    for (int j = 0; j < width; ++j) to[j] = accumulate ? to[j] + tile[j] : tile[j];
  }
}

template <class S, class Element>
CHUNKATTN_INLINE void multiply_loops(const MatrixView<Element> a, const MatrixView<Element> b, int m, int n, int k,
                                     bool accumulate, Element* c, int ldc) {
  constexpr int panel_width = kPanelVectors * S::kLanes;
  Element panel[kPanelDepth * panel_width];
  for (int depth_begin = 0; depth_begin < k; depth_begin += kPanelDepth) {
    const int depth = std::min(kPanelDepth, k - depth_begin);
    const bool add = accumulate || depth_begin > 0;
    for (int column = 0; column < n; column += panel_width) {
      const int width = std::min(panel_width, n - column);
      for (int p = 0; p < depth; ++p) {
        for (int j = 0; j < panel_width; ++j) {
          panel[p * panel_width + j] = j < width ? b(depth_begin + p, column + j) : Element(0);
        }
      }
      int row = 0;
      for (; row + kRows <= m; row += kRows) {
        multiply_panel<S, Element, kRows>(a, row, depth_begin, depth, panel, add, c + column, ldc, width);
      }
      for (; row < m; ++row) {
        multiply_panel<S, Element, 1>(a, row, depth_begin, depth, panel, add, c + column, ldc, width);
      }
    }
  }
}

template <class Element>
void multiply(Transpose transpose_a, Transpose transpose_b, int m, int n, int k, const Element* a, int lda,
              const Element* b, int ldb, bool accumulate, Element* c, int ldc) {
  const MatrixView<Element> view_a(transpose_a, a, lda);
  const MatrixView<Element> view_b(transpose_b, b, ldb);
  vectorized(
      CHUNKATTN_LOOPS(bytes) { multiply_loops<Simd<Element, bytes>>(view_a, view_b, m, n, k, accumulate, c, ldc); });
}

}  // namespace

void gemm(Transpose transpose_a, Transpose transpose_b, int m, int n, int k, const float* a, int lda, const float* b,
          int ldb, bool accumulate, float* c, int ldc) {
  if (sgemm_ != nullptr) {
    call_blas<float, float>(sgemm_, transpose_a, transpose_b, m, n, k, a, lda, b, ldb, accumulate, c, ldc);
  } else {
    multiply(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, accumulate, c, ldc);
  }
}

void gemm(Transpose transpose_a, Transpose transpose_b, int m, int n, int k, const double* a, int lda, const double* b,
          int ldb, bool accumulate, double* c, int ldc) {
  if (dgemm_ != nullptr) {
    call_blas<double, double>(dgemm_, transpose_a, transpose_b, m, n, k, a, lda, b, ldb, accumulate, c, ldc);
  } else {
    multiply(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, accumulate, c, ldc);
  }
}

void gemm(Transpose transpose_a, Transpose transpose_b, int m, int n, int k, const BFloat16* a, int lda,
          const BFloat16* b, int ldb, bool accumulate, float* c, int ldc) {
  call_blas<BFloat16, float>(gemm_bf16bf16f32_, transpose_a, transpose_b, m, n, k, a, lda, b, ldb, accumulate, c, ldc);
}

bool has_fast_bfloat16_gemm() {
#if defined(__x86_64__)
  constexpr unsigned amx_bf16 = 1u << 22;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & amx_bf16) != 0;
  return has_amx && gemm_bf16bf16f32_ != nullptr;
#else
  return false;
#endif
}

}  // namespace chunkattn::cpu
