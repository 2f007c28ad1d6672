#include "cuda/select_merge_decode/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "cuda/common/carver.h"
#include "cuda/select/sizes.h"

namespace chunkattn::cuda {

namespace {

constexpr int kMaxInt = std::numeric_limits<int>::max();

// Fewer regions are not worth a thread block of their own.
constexpr int kMinRegionsOfSplit = 512;

// Entries of all splits of a row that are sorted together: 48 KB.
constexpr int kLargestSort = 6144;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int rows_of_tile(int score_dim) {
  switch (score_dim) {
    case 128:
      return CacheScoreTile<128>::kRows;
    default:
      return CacheScoreTile<256>::kRows;
  }
}

void plan_selection(const SelectMergeDecodeParams& params, int multiprocessors, StepPlan& plan) {
  plan.chooses = params.regions > params.top_k && params.regions > params.geometry.merge &&
                 (params.attends || !params.each_token_chooses);
  plan.voters = params.each_token_chooses ? 1 : params.voters;
  if (!plan.chooses || plan.planes == 0) return;
  plan.candidates_per_row = std::max(candidates_per_row(params.top_k), kMostInRegisters);
  // Long lists, which are rare, are not worth kernels of their own for every size.
  const bool long_lists = plan.candidates_per_row > kMostInRegisters;
  plan.score_dim = params.head_dim > 128 || long_lists ? 256 : 128;
  plan.row_tiles = static_cast<int>(ceil_div(plan.voters, rows_of_tile(plan.score_dim)));
  plan.lists_in_shared = params.top_k <= kLargestTopKInShared;
  const int64_t tiles = static_cast<int64_t>(plan.planes) * plan.row_tiles;
  const int64_t most = plan.lists_in_shared ? std::min<int64_t>(kLargestSort / params.top_k,
                                                                ceil_div(params.regions, kMinRegionsOfSplit))
                                            : 1;
  plan.splits = static_cast<int>(std::clamp<int64_t>(multiprocessors / tiles, 1, most));
  plan.score_blocks = static_cast<int>(std::min<int64_t>(tiles * plan.splits, multiprocessors));
}

}  // namespace

const char* plan_step(const SelectMergeDecodeParams& params, int multiprocessors, StepPlan* plan) {
  *plan = {};
  const KeyValueCache& cache = params.cache;
  const Strides &k = cache.k_strides, &v = cache.v_strides;
  if (k.batch != v.batch || k.seq != v.seq || k.head != v.head) {
    return "k_cache and v_cache must have the same strides on CUDA";
  }
  const int64_t planes = static_cast<int64_t>(params.batch) * params.index_heads;
  const int64_t width =
      std::min<int64_t>(params.top_k, params.regions) + std::min<int64_t>(params.geometry.merge, params.regions);
  if (planes > kMaxInt || planes * width > kMaxInt) return "the lists of regions are too many for one launch";
  plan->planes = static_cast<int>(planes);
  plan->heads_per_plane = params.index_heads == 0 ? 0 : params.heads / params.index_heads;
  plan->spans = params.spans().most(params.seqlen);
  plan->span_tokens = params.spans().longest(params.seqlen);
  plan->table_width = static_cast<int>(width);
  plan->page_unit = std::gcd(std::gcd(k.batch, k.head), k.seq * params.geometry.region_size);
  if (plan->page_unit == 0) plan->page_unit = 1;
  const int64_t unit = plan->page_unit, region_size = params.geometry.region_size;
  plan->page_steps = {k.batch / unit, k.seq * region_size / unit, k.head / unit,
                      cache.block_table == nullptr ? 0 : static_cast<int>(cache.page_size / region_size)};
  const int64_t last = (cache.num_pages - int64_t{1}) * k.batch + (cache.page_size - int64_t{1}) * k.seq +
                       (params.kv_heads - int64_t{1}) * k.head;
  if (last / plan->page_unit >= kMaxInt) {
    return "k_cache is too large, or its strides too odd, for 32-bit numbers of regions";
  }
  plan_selection(params, multiprocessors, *plan);
  return nullptr;
}

bool is_direct(const SelectMergeDecodeParams& params, const StepPlan& plan) {
  if (params.seqlen != 1) return false;
  const auto one_row = [&](const Strides& strides) {
    return params.batch == 1 || strides.batch == params.heads * strides.head;
  };
  return plan.planes > 0 && one_row(params.q_strides) && one_row(params.out_strides);
}

DecodeParams decode_params(const SelectMergeDecodeParams& params, const StepPlan& plan,
                           const StepWorkspace& workspace) {
  DecodeParams decode{};
  const int64_t heads = plan.heads_per_plane, head_dim = params.head_dim;
  const Strides dense{plan.span_tokens * heads * head_dim, heads * head_dim, head_dim};
  if (is_direct(params, plan)) {
    decode.q = params.q;
    decode.out = params.out;
    decode.softmax_lse = params.softmax_lse;
    decode.q_strides = {heads * params.q_strides.head, params.q_strides.seq, params.q_strides.head};
    decode.out_strides = {heads * params.out_strides.head, params.out_strides.seq, params.out_strides.head};
  } else {
    decode.q = workspace.queries;
    decode.out = workspace.out;
    decode.softmax_lse = workspace.softmax_lse;
    decode.q_strides = dense;
    decode.out_strides = dense;
  }
  decode.batch = plan.planes;
  decode.seqlen_q = plan.span_tokens;
  decode.heads = plan.heads_per_plane;
  decode.kv_heads = 1;
  decode.head_dim = params.head_dim;
  decode.dtype = params.dtype;
  KeyValueCache& cache = decode.cache;
  cache.k = params.cache.k;
  cache.v = params.cache.v;
  cache.k_strides = {plan.page_unit, params.cache.k_strides.seq, plan.page_unit};  // of one head
  cache.v_strides = cache.k_strides;
  cache.block_table = workspace.table;
  cache.block_table_stride = plan.table_width;
  cache.num_pages = kMaxInt;
  cache.page_size = params.geometry.region_size;
  const int64_t capacity = static_cast<int64_t>(plan.table_width) * cache.page_size;
  cache.capacity = static_cast<int>(std::min<int64_t>(capacity, kMaxInt));
  cache.cache_seqlens = workspace.lengths;
  // One chunk, of rows that nothing rotates.
  decode.geometry = {cache.capacity, 0};
  decode.q_rotated = true;
  decode.scale = params.scale;
  return decode;
}

StepWorkspace lay_out_step(const SelectMergeDecodeParams& params, const StepPlan& plan, size_t decode_bytes,
                           void* memory, size_t* bytes) {
  Carver carver(memory);
  StepWorkspace workspace{};
  workspace.begins = carver.take<int>(params.batch);
  workspace.ends = carver.take<int>(params.batch);
  workspace.lengths = carver.take<int>(plan.planes);
  workspace.table = carver.take<int>(static_cast<int64_t>(plan.planes) * plan.table_width);
  if (plan.chooses) {
    workspace.counters = carver.take<int>(plan.planes);
    // A row's candidates start on a multiple of their size (row_candidates.cuh); the memory need not.
    const int64_t row_bytes = static_cast<int64_t>(plan.candidates_per_row) * sizeof(uint64_t);
    const int64_t rows = static_cast<int64_t>(plan.score_blocks) * rows_of_tile(plan.score_dim);
    unsigned char* candidates = carver.take<unsigned char>((rows + 1) * row_bytes);
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(candidates) + row_bytes - 1) / row_bytes * row_bytes;
    workspace.candidates = reinterpret_cast<uint64_t*>(aligned);
    const int64_t lists = static_cast<int64_t>(plan.planes) * plan.splits * plan.voters;
    workspace.lists = carver.take<uint64_t>(lists * params.top_k);
    if (!plan.lists_in_shared) {
      workspace.merge_memory = carver.take<int>(plan.planes * merge_ints(merge_slots(params.top_k), params.top_k));
    }
  }
  if (params.attends && !is_direct(params, plan)) {
    const int64_t rows = static_cast<int64_t>(plan.planes) * plan.span_tokens * plan.heads_per_plane;
    workspace.queries = carver.take<uint16_t>(rows * params.head_dim);
    workspace.out = carver.take<uint16_t>(rows * params.head_dim);
    workspace.softmax_lse = carver.take<float>(rows);
  }
  workspace.decode = carver.take<unsigned char>(static_cast<int64_t>(decode_bytes));
  *bytes = carver.used();
  return workspace;
}

}  // namespace chunkattn::cuda
