// What a span adds to the cache, and the block table of what its queries attend to. Rows are bits but where they are
// added up, so that one kernel serves both element types.
#include "cuda/common/launch_step.cuh"
#include "cuda/decode/cache_rows.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/select_merge_decode/launchers.h"

namespace chunkattn::cuda {

namespace {

constexpr int kThreads = 128;

struct SpanAppend {
  const SpanStep& step;

  // The tokens of the `index`-th region that a span reaches into, and that region.
  struct RegionPart {
    int region;
    int from;
    int to;
  };
  __device__ __forceinline__ RegionPart region_part(const TokenSpan& span, int index) const {
    const int size = step.params.geometry.region_size;
    const int64_t region = span.begin / size + int64_t{index};
    const int64_t first = region * size, end = first + size;
    if (span.count() == 0 || first >= span.end) return {0, 0, 0};
    return {static_cast<int>(region), first < span.begin ? span.begin : static_cast<int>(first),
            end < span.end ? static_cast<int>(end) : span.end};
  }

  __device__ __forceinline__ float value_of(uint16_t bits) const {
    if (step.params.dtype == DataType::kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    return to_float(Float16{bits});
  }

  static __device__ __forceinline__ const uint16_t* row(const void* tensor, const Strides& strides, int batch,
                                                        int token, int head) {
    return static_cast<const uint16_t*>(tensor) + batch * strides.batch + token * strides.seq + head * strides.head;
  }

  // New keys and values of a region and a KV head, and the sum of its keys.
  __device__ __forceinline__ void append_keys(int batch, int head, int index) const {
    const SelectMergeDecodeParams& params = step.params;
    const RegionPart part = region_part(step.span(batch), index);
    if (part.from == part.to) return;
    const int first = part.from - step.workspace.begins[batch], count = part.to - part.from;
    const uint16_t* k = row(params.k, params.k_strides, batch, first, head);
    const uint16_t* v = row(params.v, params.v_strides, batch, first, head);
    const uint16_t* select_k = row(params.select_k, params.select_k_strides, batch, first, head);
    // A region lies in one page.
    const CacheRow place = cache_row(params.cache, batch, part.from);
    uint16_t* cached_k = static_cast<uint16_t*>(params.cache.k) + cache_offset(params.cache.k_strides, place, head);
    uint16_t* cached_v = static_cast<uint16_t*>(params.cache.v) + cache_offset(params.cache.v_strides, place, head);
    const int64_t plane = static_cast<int64_t>(batch) * params.kv_heads + head;
    float* sums = static_cast<float*>(params.region_sums) + (plane * params.regions + part.region) * params.head_dim;
    for (int d = threadIdx.x; d < params.head_dim; d += kThreads) {
      float sum = part.from % params.geometry.region_size == 0 ? 0.f : sums[d];
#pragma unroll 4
      for (int n = 0; n < count; ++n) {
        sum += value_of(select_k[n * params.select_k_strides.seq + d]);
        const uint16_t key = k[n * params.k_strides.seq + d], value = v[n * params.v_strides.seq + d];
        if (place.page < 0) continue;
        cached_k[n * params.cache.k_strides.seq + d] = key;
        cached_v[n * params.cache.v_strides.seq + d] = value;
      }
      sums[d] = sum;
    }
  }

  // The sum of the queries of a region and the heads that share a list.
  __device__ __forceinline__ void add_queries(int plane, int index) const {
    const SelectMergeDecodeParams& params = step.params;
    const int batch = step.sequence(plane);
    const TokenSpan span = step.span(batch);
    const RegionPart part = region_part(span, index);
    if (part.from == part.to) return;
    const int heads = step.plan.heads_per_plane;
    const uint16_t* rows = row(params.select_q, params.select_q_strides, batch,
                               part.from - step.workspace.begins[batch], plane % params.index_heads * heads);
    const int voter = part.region - params.geometry.first_region(params.geometry.group(span.begin));
    float* sums = static_cast<float*>(params.query_sums) +
                  (static_cast<int64_t>(plane) * params.voters + voter) * params.head_dim;
    for (int d = threadIdx.x; d < params.head_dim; d += kThreads) {
      float sum = part.from % params.geometry.region_size == 0 ? 0.f : sums[d];
      for (int head = 0; head < heads; ++head) {
#pragma unroll 4
        for (int n = 0; n < part.to - part.from; ++n) {
          sum += value_of(rows[head * params.select_q_strides.head + n * params.select_q_strides.seq + d]);
        }
      }
      sums[d] = sum;
    }
  }

  // Where a region of a head lies, as the decode kernels count pages; -1 where its page does not exist.
  __device__ __forceinline__ int page_of(int batch, int kv_head, int region) const {
    const KeyValueCache& cache = step.params.cache;
    const PageSteps& steps = step.plan.page_steps;
    int page = batch;
    if (cache.block_table != nullptr) {
      const int index = region / steps.regions_per_page;
      region -= index * steps.regions_per_page;
      page = __ldg(cache.block_table + batch * cache.block_table_stride + index);
      if (page < 0 || page >= cache.num_pages) return -1;
    }
    return static_cast<int>(page * steps.page + region * steps.region + kv_head * steps.head);
  }

  // The list of a plane without the ids that are ignored, then the group itself.
  __device__ __forceinline__ void write_table(int plane) const {
    __shared__ int kept_by_warp[kThreads / 32];
    const SelectMergeDecodeParams& params = step.params;
    const int batch = step.sequence(plane), kv_head = step.kv_head(plane);
    const TokenSpan span = step.span(batch);
    const int group = params.geometry.group(span.begin);
    const int* ids = params.indices + static_cast<int64_t>(plane) * params.top_k;
    int* table = step.workspace.table + static_cast<int64_t>(plane) * step.plan.table_width;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int count = 0;
    for (int begin = 0; begin < params.top_k && span.count() > 0 && group > 0; begin += kThreads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      const int id = i < params.top_k ? ids[i] : -1;
      const bool keep = params.geometry.may_attend(group, id);
      const unsigned keeping = __ballot_sync(0xffffffffu, keep);
      if (lane == 0) kept_by_warp[warp] = __popc(keeping);
      __syncthreads();
      int place = count + __popc(keeping & ((1u << lane) - 1));
#pragma unroll
      for (int other = 0; other < kThreads / 32; ++other) {
        place += other < warp ? kept_by_warp[other] : 0;
        count += kept_by_warp[other];
      }
      if (keep) table[place] = page_of(batch, kv_head, id);
      __syncthreads();  // the counts are read
    }
    const int size = params.geometry.region_size, first = params.geometry.first_region(group);
    const int own = span.count() == 0 ? 0 : (span.end - 1) / size - first + 1;
    for (int i = threadIdx.x; i < own; i += kThreads) table[count + i] = page_of(batch, kv_head, first + i);
    if (threadIdx.x == 0) {
      step.workspace.lengths[plane] = span.count() == 0 ? 0 : count * size + span.end - first * size;
    }
  }
};

// Blocks append keys, add queries, write tables, and the last one counts.
__global__ void __launch_bounds__(kThreads)
    append_span_kernel(const __grid_constant__ SpanStep step, int regions, int64_t key_blocks, int64_t query_blocks,
                       int64_t table_blocks) {
  const SelectMergeDecodeParams& params = step.params;
  const SpanAppend append{step};
  int64_t block = blockIdx.x;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  if (block < table_blocks) return append.write_table(static_cast<int>(block));
  block -= table_blocks;
  if (block < key_blocks) {
    const int64_t region = block / params.kv_heads;
    append.append_keys(static_cast<int>(region / regions), static_cast<int>(block % params.kv_heads),
                       static_cast<int>(region % regions));
    return;
  }
  block -= key_blocks;
  if (block < query_blocks) {
    append.add_queries(static_cast<int>(block / regions), static_cast<int>(block % regions));
    return;
  }
  for (int batch = threadIdx.x; batch < params.batch; batch += kThreads) {
    params.seqlens[batch] = step.workspace.ends[batch];
  }
}

// The rows of heads of a plane between the caller's tensors and dense ones, in which they end where the span ends.
struct SpanRows {
  const SpanStep& step;
  int plane;
  int head;  // of the plane
  int row;   // of the dense tensor
  int batch;
  int token;  // of the caller's tensors; negative: the row belongs to nobody

  __device__ __forceinline__ SpanRows(const SpanStep& step, int64_t index) : step(step) {
    const StepPlan& plan = step.plan;
    head = static_cast<int>(index % plan.heads_per_plane);
    row = static_cast<int>(index / plan.heads_per_plane % plan.span_tokens);
    plane = static_cast<int>(index / plan.heads_per_plane / plan.span_tokens);
    batch = step.sequence(plane);
    const TokenSpan span = step.span(batch);
    const int place = row - (plan.span_tokens - span.count());
    token = place < 0 ? -1 : span.begin - step.workspace.begins[batch] + place;
  }

  __device__ __forceinline__ int query_head() const {
    return plane % step.params.index_heads * step.plan.heads_per_plane + head;
  }
  __device__ __forceinline__ int64_t dense() const {
    const int64_t rows = static_cast<int64_t>(plane) * step.plan.span_tokens + row;
    return (rows * step.plan.heads_per_plane + head) * step.params.head_dim;
  }
};

// A warp for each row of a head.
__global__ void __launch_bounds__(kThreads) gather_queries_kernel(const __grid_constant__ SpanStep step, int64_t rows) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (index >= rows) return;
  const SpanRows place(step, index);
  const SelectMergeDecodeParams& params = step.params;
  uint16_t* to = static_cast<uint16_t*>(step.workspace.queries) + place.dense();
  const uint16_t* from = static_cast<const uint16_t*>(params.q);
  if (place.token >= 0) {
    from += place.batch * params.q_strides.batch + place.token * params.q_strides.seq +
            place.query_head() * params.q_strides.head;
  }
  for (int d = threadIdx.x % 32; d < params.head_dim; d += 32) to[d] = place.token < 0 ? uint16_t{0} : from[d];
}

__global__ void __launch_bounds__(kThreads)
    scatter_results_kernel(const __grid_constant__ SpanStep step, int64_t rows) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (index >= rows) return;
  const SpanRows place(step, index);
  if (place.token < 0) return;
  const SelectMergeDecodeParams& params = step.params;
  const int head = place.query_head();
  uint16_t* to = static_cast<uint16_t*>(params.out) + place.batch * params.out_strides.batch +
                 place.token * params.out_strides.seq + head * params.out_strides.head;
  const uint16_t* from = static_cast<const uint16_t*>(step.workspace.out) + place.dense();
  for (int d = threadIdx.x % 32; d < params.head_dim; d += 32) to[d] = from[d];
  if (threadIdx.x % 32 == 0) {
    const int64_t plane_head = static_cast<int64_t>(place.plane) * step.plan.heads_per_plane + place.head;
    params.softmax_lse[(static_cast<int64_t>(place.batch) * params.heads + head) * params.seqlen + place.token] =
        step.workspace.softmax_lse[plane_head * step.plan.span_tokens + place.row];
  }
}

// Tokens that were not appended see nothing. A warp for each row of a head.
__global__ void __launch_bounds__(kThreads) clear_missing_kernel(const __grid_constant__ SpanStep step, int64_t rows) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (index >= rows) return;
  const SelectMergeDecodeParams& params = step.params;
  const int head = static_cast<int>(index % params.heads),
            token = static_cast<int>(index / params.heads % params.seqlen);
  const int batch = static_cast<int>(index / params.heads / params.seqlen);
  if (token < step.workspace.ends[batch] - step.workspace.begins[batch]) return;
  uint16_t* to = static_cast<uint16_t*>(params.out) + batch * params.out_strides.batch +
                 token * params.out_strides.seq + head * params.out_strides.head;
  for (int d = threadIdx.x % 32; d < params.head_dim; d += 32) to[d] = 0;
  if (threadIdx.x % 32 == 0) {
    params.softmax_lse[(static_cast<int64_t>(batch) * params.heads + head) * params.seqlen + token] = -INFINITY;
  }
}

using RowsKernel = void (*)(SpanStep, int64_t);

const char* launch_rows(RowsKernel kernel, const SpanStep& step, int64_t rows, cudaStream_t stream) {
  const int64_t blocks = (rows * 32 + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return "q has too many rows for one launch";
  if (blocks == 0) return nullptr;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(step, rows);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

int64_t plane_rows(const StepPlan& plan) {
  return static_cast<int64_t>(plan.planes) * plan.span_tokens * plan.heads_per_plane;
}

}  // namespace

const char* launch_append_span(const SpanStep& step, cudaStream_t stream) {
  const SelectMergeDecodeParams& params = step.params;
  // Regions that a span reaches into, wherever it begins.
  const int size = params.geometry.region_size;
  const int regions = static_cast<int>(RegionGeometry::ceil_div(step.plan.span_tokens - 1, size)) + 1;
  const int64_t key_blocks = static_cast<int64_t>(params.batch) * params.kv_heads * regions;
  const int64_t query_blocks = params.each_token_chooses ? 0 : static_cast<int64_t>(step.plan.planes) * regions;
  const int64_t table_blocks = params.attends ? step.plan.planes : 0;
  const int64_t blocks = key_blocks + query_blocks + table_blocks + (step.last ? 1 : 0);
  return launch_step(&append_span_kernel, blocks, kThreads, 0, step.plan.dependent_launch, stream, step, regions,
                     key_blocks, query_blocks, table_blocks);
}

const char* launch_gather_queries(const SpanStep& step, cudaStream_t stream) {
  return launch_rows(&gather_queries_kernel, step, plane_rows(step.plan), stream);
}

const char* launch_scatter_results(const SpanStep& step, cudaStream_t stream) {
  const SelectMergeDecodeParams& params = step.params;
  const char* failure = launch_rows(&scatter_results_kernel, step, plane_rows(step.plan), stream);
  if (failure != nullptr || !step.last) return failure;
  const int64_t rows = static_cast<int64_t>(params.batch) * params.seqlen * params.heads;
  return launch_rows(&clear_missing_kernel, step, rows, stream);
}

}  // namespace chunkattn::cuda
