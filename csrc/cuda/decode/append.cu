// What runs before the attention of many queries: new keys, rotated, and values are appended to the cache, and queries
// that see nothing get their results.
#include <cuda_runtime.h>

#include "cuda/decode/cache_rows.cuh"
#include "cuda/decode/launchers.h"
#include "cuda/decode/sequences.h"

namespace chunkattn::cuda {

namespace {

constexpr int kThreads = 256;

// One thread for every element of a key and its value.
template <typename T, bool kFloat8>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ DecodeParams params) {
  using Bits = typename CacheElement<kFloat8>::Bits;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int d = static_cast<int>(index % params.head_dim);
  const int head = static_cast<int>(index / params.head_dim % params.kv_heads);
  const int64_t token = index / params.head_dim / params.kv_heads;
  const int batch = static_cast<int>(token / params.seqlen_new);
  if (batch >= params.batch) return;
  const SequenceLengths lengths = sequence_lengths(params, __ldg(params.cache.cache_seqlens + batch));
  const int n = static_cast<int>(token % params.seqlen_new);
  const int position = lengths.stored + n;
  if (position >= lengths.total) return;
  const CacheRow place = cache_row(params.cache, batch, position);
  if (place.page < 0) return;
  static_cast<Bits*>(params.cache.k)[cache_offset(params.cache.k_strides, place, head) + d] =
      new_element<T, kFloat8, true>(params, batch, n, position, head, d);
  static_cast<Bits*>(params.cache.v)[cache_offset(params.cache.v_strides, place, head) + d] =
      new_element<T, kFloat8, false>(params, batch, n, position, head, d);
}

template <typename T>
const char* launch(const DecodeParams& params, cudaStream_t stream) {
  const int64_t elements = static_cast<int64_t>(params.batch) * params.seqlen_new * params.kv_heads * params.head_dim;
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return "k has too many elements for one launch";
  const auto kernel = params.cache.float8 ? &append_kernel<T, true> : &append_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// A thread block for each sequence; few have such queries.
template <typename T>
__global__ void __launch_bounds__(kThreads) clear_unseeing_kernel(const __grid_constant__ DecodeParams params) {
  const int batch = static_cast<int>(blockIdx.x);
  const int total = sequence_lengths(params, __ldg(params.cache.cache_seqlens + batch)).total;
  const int unseeing = params.seqlen_q - total;
  for (int64_t i = threadIdx.x; i < int64_t{unseeing} * params.heads * params.head_dim; i += kThreads) {
    const int d = static_cast<int>(i % params.head_dim);
    const int head = static_cast<int>(i / params.head_dim % params.heads);
    const int query = static_cast<int>(i / params.head_dim / params.heads);
    static_cast<T*>(params.out)[batch * params.out_strides.batch + query * params.out_strides.seq +
                                head * params.out_strides.head + d] = from_float<T>(0.f);
    if (d == 0) {
      params.softmax_lse[(static_cast<int64_t>(batch) * params.heads + head) * params.seqlen_q + query] = -INFINITY;
    }
  }
}

}  // namespace

const char* launch_clear_unseeing(const DecodeParams& params, cudaStream_t stream) {
  const auto kernel =
      params.dtype == DataType::kBFloat16 ? &clear_unseeing_kernel<BFloat16> : &clear_unseeing_kernel<Float16>;
  kernel<<<params.batch, kThreads, 0, stream>>>(params);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* launch_append(const DecodeParams& params, cudaStream_t stream) {
  return params.dtype == DataType::kBFloat16 ? launch<BFloat16>(params, stream) : launch<Float16>(params, stream);
}

}  // namespace chunkattn::cuda
