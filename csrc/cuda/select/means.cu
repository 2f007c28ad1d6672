// Semantic tokens: the means of the rows of each region, as the tensor cores take them.
//
// Scores are to be right to float32, and tensor cores multiply 16-bit elements. A mean is therefore scaled by a power
// of two and split into the nearest float16 and the float16 nearest to what is left: 22 bits. Rows of Q have a scale
// each, since scores are only compared within a row; all means of a KV head must have one, which is known when all are.
#include "cuda/common/numeric.cuh"
#include "cuda/common/rotary.cuh"
#include "cuda/select/launchers.h"
#include "cuda/select/split_mean.cuh"

namespace chunkattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct RegionSource {
  const void* data;
  Strides strides;
  int heads;         // of a batch row
  int summed_heads;  // whose means are added up
  int first_plane;   // counted in sums
  int planes;
  int seqlen;
  int region_size;
  int regions;
  int head_dim;
  bool vectorized;
};

// Adds kBatch rows, so many that the latency of their loads hides, from token `first` on and kStep apart, of the
// lane's eight dimensions from `begin` on.
template <int kBatch, int kStep, typename T>
__device__ __forceinline__ void add_rows(float (&sum)[kChunk], const T* rows, const RegionSource& source, int first,
                                         int tokens, int begin) {
  uint4 chunks[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int token = first + i * kStep;
    const bool inside = token < tokens && begin < source.head_dim;
    chunks[i] = inside ? load_chunk(rows + token * source.strides.seq, begin) : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    float x[kChunk];
    unpack8<T>(chunks[i], x);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum[j] += x[j];
  }
}

// The same for rows of any alignment.
template <int kBatch, int kStep, typename T>
__device__ __forceinline__ void add_rows_by_element(float (&sum)[kChunk], const T* rows, const RegionSource& source,
                                                    int first, int tokens, int begin) {
  for (int token = first; token < tokens && token < first + kBatch * kStep; token += kStep) {
    const T* row = rows + token * source.strides.seq;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum[j] += begin + j < source.head_dim ? to_float(row[begin + j]) : 0.f;
  }
}

// The mean of a region, eight dimensions for each lane of a team of kHeadDim / 8; every team of the warp gets it.
template <typename T, int kHeadDim>
__device__ __forceinline__ void region_mean(float (&mean)[kChunk], const RegionSource& source, int plane, int region) {
  constexpr int kTeam = kHeadDim / kChunk;
  constexpr int kStep = 32 / kTeam;
  constexpr int kBatch = 8;
  const int lane = threadIdx.x % 32;
  const int per_batch = source.heads / source.summed_heads;
  const int all = source.first_plane + plane;
  const int64_t first_token = static_cast<int64_t>(region) * source.region_size;
  const int64_t left = source.seqlen - first_token;
  const int tokens = left < source.region_size ? static_cast<int>(left) : source.region_size;
  const T* rows = static_cast<const T*>(source.data) + all / per_batch * source.strides.batch +
                  all % per_batch * source.summed_heads * source.strides.head + first_token * source.strides.seq;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) mean[i] = 0.f;
  for (int head = 0; head < source.summed_heads; ++head) {
    for (int token = lane / kTeam; token < tokens; token += kBatch * kStep) {
      if (source.vectorized) {
        add_rows<kBatch, kStep>(mean, rows, source, token, tokens, lane % kTeam * kChunk);
      } else {
        add_rows_by_element<kBatch, kStep>(mean, rows, source, token, tokens, lane % kTeam * kChunk);
      }
    }
    rows += source.strides.head;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
#pragma unroll
    for (int distance = kTeam; distance < 32; distance *= 2) {
      mean[i] += __shfl_xor_sync(0xffffffffu, mean[i], distance);
    }
    mean[i] /= static_cast<float>(tokens);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void store_split(Float16* row, const float (&mean)[kChunk], float scale, int chunk) {
  split_mean(reinterpret_cast<uint4*>(row + chunk * kChunk), reinterpret_cast<uint4*>(row + kHeadDim + chunk * kChunk),
             mean, scale);
}

// A warp for each region, neighbouring heads of one region side by side.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    query_means_kernel(const __grid_constant__ RegionSource source, Float16* means) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int region = static_cast<int>(index / source.planes), plane = static_cast<int>(index % source.planes);
  if (region >= source.regions) return;
  float mean[kChunk];
  region_mean<T, kHeadDim>(mean, source, plane, region);
  const float scale = scale_for(largest_magnitude<kHeadDim>(mean));
  const int lane = threadIdx.x % 32;
  Float16* row = means + (static_cast<int64_t>(plane) * source.regions + region) * 2 * kHeadDim;
  if (lane < kHeadDim / kChunk) store_split<kHeadDim>(row, mean, scale, lane);
}

// Where the two float16 will be, the float32 they are made of comes first.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    key_means_kernel(const __grid_constant__ RegionSource source, float* means, unsigned* largest_of_plane) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int region = static_cast<int>(index / source.planes), plane = static_cast<int>(index % source.planes);
  if (region >= source.regions) return;
  float mean[kChunk];
  region_mean<T, kHeadDim>(mean, source, plane, region);
  const unsigned largest = __float_as_uint(largest_magnitude<kHeadDim>(mean));
  const int lane = threadIdx.x % 32;
  float* row = means + (static_cast<int64_t>(plane) * source.regions + region) * kHeadDim;
  if (lane < kHeadDim / kChunk) {
    float4* target = reinterpret_cast<float4*>(row + lane * kChunk);
    target[0] = {mean[0], mean[1], mean[2], mean[3]};
    target[1] = {mean[4], mean[5], mean[6], mean[7]};
  }
  // Magnitudes are ordered as their bits are. Most regions find a larger one there already.
  if (lane == 0 && *static_cast<volatile unsigned*>(largest_of_plane + plane) < largest) {
    atomicMax(largest_of_plane + plane, largest);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    split_keys_kernel(void* means, const unsigned* largest_of_plane, int planes, int regions) {
  constexpr int kTeam = kHeadDim / kChunk;
  const int64_t row_index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kTeam;
  const bool inside = row_index < static_cast<int64_t>(planes) * regions;
  float* row = static_cast<float*>(means) + row_index * kHeadDim;
  const int chunk = threadIdx.x % kTeam;
  float mean[kChunk] = {};
  if (inside) load_floats(row + chunk * kChunk, mean);
  __syncwarp();  // the row is overwritten
  if (!inside) return;
  const float scale = scale_for(__uint_as_float(largest_of_plane[row_index / regions]));
  store_split<kHeadDim>(reinterpret_cast<Float16*>(row), mean, scale, chunk);
}

template <typename T, int kHeadDim>
const char* launch(const SelectPass& pass, cudaStream_t stream) {
  const SelectParams& params = pass.params;
  const AttentionShape& shape = params.shape;
  const int region_size = params.geometry.region_size, regions = pass.rule.regions;
  const RegionSource queries{params.q,
                             params.q_strides,
                             shape.heads,
                             shape.heads / params.index_heads,
                             pass.first_plane,
                             pass.planes,
                             shape.seqlen_q,
                             region_size,
                             regions,
                             shape.head_dim,
                             rows_aligned(params.q, params.q_strides, shape.head_dim)};
  const RegionSource keys{params.k,
                          params.k_strides,
                          shape.kv_heads,
                          1,
                          pass.first_kv_plane,
                          pass.kv_planes,
                          shape.seqlen_k,
                          region_size,
                          regions,
                          shape.head_dim,
                          rows_aligned(params.k, params.k_strides, shape.head_dim)};
  const auto blocks = [&](int64_t warps) { return static_cast<unsigned>((warps + kWarps - 1) / kWarps); };
  const int64_t query_rows = static_cast<int64_t>(regions) * pass.planes;
  const int64_t key_rows = static_cast<int64_t>(regions) * pass.kv_planes;
  if (query_rows / kWarps >= INT32_MAX) return "q has too many regions for one launch";
  const SelectWorkspace& workspace = pass.workspace;
  query_means_kernel<T, kHeadDim>
      <<<blocks(query_rows), kThreads, 0, stream>>>(queries, static_cast<Float16*>(workspace.q_means));
  const cudaError_t cleared = cudaMemsetAsync(workspace.k_largest, 0, pass.kv_planes * sizeof(unsigned), stream);
  if (cleared != cudaSuccess) return cudaGetErrorString(cleared);
  key_means_kernel<T, kHeadDim>
      <<<blocks(key_rows), kThreads, 0, stream>>>(keys, static_cast<float*>(workspace.k_means), workspace.k_largest);
  constexpr int kRowsPerWarp = 32 / (kHeadDim / kChunk);
  split_keys_kernel<kHeadDim><<<blocks((key_rows + kRowsPerWarp - 1) / kRowsPerWarp), kThreads, 0, stream>>>(
      workspace.k_means, workspace.k_largest, pass.kv_planes, regions);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <typename T>
const char* launch(const SelectPass& pass, cudaStream_t stream) {
  switch (pass.workspace.padded_dim) {
    case 64:
      return launch<T, 64>(pass, stream);
    case 128:
      return launch<T, 128>(pass, stream);
    default:
      return launch<T, 256>(pass, stream);
  }
}

}  // namespace

const char* launch_region_means(const SelectPass& pass, cudaStream_t stream) {
  return pass.params.dtype == DataType::kBFloat16 ? launch<BFloat16>(pass, stream) : launch<Float16>(pass, stream);
}

}  // namespace chunkattn::cuda
