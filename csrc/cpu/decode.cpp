#include <algorithm>
#include <numeric>
#include <vector>

#include "cache_attention.h"
#include "cpu/decode_results.h"
#include "kernels.h"

namespace chunkattn::cpu {
namespace {

// A query tile of the heads that share a KV head, attended in parts.
struct DecodeTile {
  int batch;
  HeadRange heads;
  QueryTile tile;
  int splits;
  int keys_per_split;
  int64_t first_row;  // of its partial results, where there is more than one part

  int rows() const { return (tile.end - tile.begin) * heads.count(); }

  // A part begins no later than the first query, so that every row sees a key of it.
  TileWork part(int split) const {
    const int begin = split * keys_per_split;
    return {batch, heads, tile, {begin, split + 1 == splits ? tile.end : begin + keys_per_split}};
  }
};

struct DecodeTask {
  int tile;
  int split;
};

struct DecodePlan {
  std::vector<DecodeTile> tiles;
  std::vector<DecodeTask> tasks;  // the longest first
  int64_t partial_rows;           // of all tiles that are split
  int max_rows;                   // of a tile
};

// The sequence of a batch row as a plain forward, whose keys are those of the cache.
ForwardParams forward_of_sequence(const DecodeParams& params, int batch) {
  return cache_attention(params, params.cache.cache_seqlens[batch] + params.seqlen_new);
}

void choose_splits(const DecodeParams& params, ParallelFor parallel_for, DecodePlan& plan) {
  constexpr int min_keys = 1024;
  constexpr int tasks_per_thread = 4;
  const auto tiles = static_cast<int64_t>(plan.tiles.size());
  int wanted = params.num_splits;
  if (wanted == 0 && tiles > 0) {
    const int64_t tasks = int64_t{tasks_per_thread} * count_threads(parallel_for);
    wanted = static_cast<int>((tasks + tiles - 1) / tiles);
  }
  for (DecodeTile& tile : plan.tiles) {
    const int keys = tile.tile.begin + 1;
    const int most = params.num_splits > 0 ? keys : QueryTiling::ceil_div(keys, min_keys);
    tile.keys_per_split = QueryTiling::ceil_div(keys, std::min(wanted, most));
    tile.splits = QueryTiling::ceil_div(keys, tile.keys_per_split);
    tile.first_row = plan.partial_rows;
    if (tile.splits > 1) plan.partial_rows += int64_t{tile.splits} * tile.rows();
  }
}

DecodePlan plan_decode(const DecodeParams& params, const std::vector<ForwardParams>& sequences,
                       ParallelFor parallel_for, int max_rows) {
  const int group = params.heads / params.kv_heads;
  const int size = std::max(1, max_rows / group);
  DecodePlan plan{};
  for (int batch = 0; batch < params.batch; ++batch) {
    const ForwardParams& sequence = sequences[batch];
    const QueryTiling tiling = {params.geometry, std::max(0, sequence.first_position()), sequence.shape.seqlen_k, size};
    const int tiles = tiling.count();
    for (int head = 0; head < params.kv_heads; ++head) {
      for (int i = 0; i < tiles; ++i) {
        plan.tiles.push_back({batch, {head * group, (head + 1) * group}, tiling.tile(i), 1, 0, 0});
        plan.max_rows = std::max(plan.max_rows, plan.tiles.back().rows());
      }
    }
  }
  choose_splits(params, parallel_for, plan);
  std::vector<int> order(plan.tiles.size());
  std::iota(order.begin(), order.end(), 0);
  const auto work = [&](int i) { return int64_t{plan.tiles[i].keys_per_split} * plan.tiles[i].rows(); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return work(a) > work(b); });
  for (const int tile : order) {
    for (int split = 0; split < plan.tiles[tile].splits; ++split) plan.tasks.push_back({tile, split});
  }
  return plan;
}

// Queries before a sequence's first token see nothing.
template <class Storage>
void write_unseeing_queries(const std::vector<ForwardParams>& sequences, ParallelFor parallel_for) {
  for_each_task(parallel_for, static_cast<int64_t>(sequences.size()), [&] {
    return [&](int64_t task) {
      const int batch = static_cast<int>(task);
      const ForwardParams& params = sequences[batch];
      write_unseeing<Storage>(params, batch, 0, std::min(params.shape.seqlen_q, -params.first_position()));
    };
  });
}

// Outputs [rows, head_dim] and log-sum-exps in bits [rows] of parts; those of a tile lie part after part.
template <class Accum>
struct PartialResults {
  Accum* out;
  Accum* lse_log2;
};

// Adds up the parts of a tile, weighted by their share of the one softmax, in place of the first part's results.
template <class Accum>
void combine_parts(const DecodeTile& tile, const PartialResults<Accum>& partial, int head_dim) {
  const int rows = tile.rows();
  Accum* const out = partial.out + tile.first_row * head_dim;
  Accum* const lse = partial.lse_log2 + tile.first_row;
  for (int n = 0; n < rows; ++n) {
    Accum max = lse[n];
    for (int split = 1; split < tile.splits; ++split) max = std::max(max, lse[split * rows + n]);
    Accum sum = 0;
    for (int split = 0; split < tile.splits; ++split) {
      const Accum weight = std::exp2(lse[split * rows + n] - max);
      const Accum* const from = out + (int64_t{split} * rows + n) * head_dim;
      Accum* const to = out + int64_t{n} * head_dim;
      for (int d = 0; d < head_dim; ++d) to[d] = (split == 0 ? Accum(0) : to[d]) + weight * from[d];
      sum += weight;
    }
    for (int d = 0; d < head_dim; ++d) out[int64_t{n} * head_dim + d] /= sum;
    lse[n] = max + std::log2(sum);
  }
}

template <class Storage>
void store_combined(const ForwardParams& params, const DecodeTile& tile,
                    const PartialResults<Accumulator<Storage>>& partial) {
  using Accum = Accumulator<Storage>;
  const int head_dim = params.shape.head_dim;
  combine_parts(tile, partial, head_dim);
  const int query = tile.tile.begin - params.first_position();
  const int heads = tile.heads.count();
  for (int head = 0; head < heads; ++head) {
    const int query_head = tile.heads.begin + head;
    const int queries = tile.tile.end - tile.tile.begin;
    const Accum* const first = partial.out + (tile.first_row + head) * head_dim;
    convert_rows(Rows<const Accum>{first, int64_t{heads} * head_dim},
                 rows_of<Storage>(params.out, params.out_strides, tile.batch, query, query_head), queries, head_dim);
    float* const lse = lse_of(params, tile.batch, query_head) + query;
    for (int n = 0; n < queries; ++n) {
      lse[n] = static_cast<float>(partial.lse_log2[tile.first_row + n * heads + head] * kLn2);
    }
  }
}

template <class Storage, class Operand, class Stored>
void run_decode(const DecodeParams& params, ParallelFor parallel_for) {
  using Tile = ForwardTile<Storage, Operand>;
  using Accum = Accumulator<Storage>;
  const KeyValueCache& cache = params.cache;
  const CachePages<Stored> keys(cache, cache.k, cache.k_strides);
  const CachePages<Stored> values(cache, cache.v, cache.v_strides);
  append_to_cache<Storage>(params, keys, values, parallel_for);
  if (params.heads == 0 || params.seqlen_q == 0) return;

  std::vector<ForwardParams> sequences;
  for (int batch = 0; batch < params.batch; ++batch) sequences.push_back(forward_of_sequence(params, batch));
  write_unseeing_queries<Storage>(sequences, parallel_for);

  const DecodePlan plan = plan_decode(params, sequences, parallel_for, Tile::kRows);
  const Buffer<Accum> partial_out(plan.partial_rows * params.head_dim);
  const Buffer<Accum> partial_lse(plan.partial_rows);
  const PartialResults<Accum> partial = {partial_out.data(), partial_lse.data()};
  const int64_t queries = static_cast<int64_t>(params.heads / params.kv_heads) * params.seqlen_q;
  const CachedKeysAndValues<Stored, Operand> keys_and_values = {{keys, cache.k_scale, params.head_dim, queries},
                                                                {values, cache.v_scale, params.head_dim, queries}};
  for_each_task(parallel_for, static_cast<int64_t>(plan.tasks.size()), [&] {
    return [&, result = Tile(params.head_dim, plan.max_rows)](int64_t index) mutable {
      const auto [tile_index, split] = plan.tasks[index];
      const DecodeTile& tile = plan.tiles[tile_index];
      const ForwardParams& sequence = sequences[tile.batch];
      result.run(sequence, nullptr, keys_and_values, tile.part(split));
      if (tile.splits == 1) {
        return store_tile(sequence, tile.batch, tile.heads, tile.tile, result);
      }
      const int64_t row = tile.first_row + int64_t{split} * tile.rows();
      const int heads = tile.heads.count();
      for (int head = 0; head < heads; ++head) {
        Accum* const to = partial.out + (row + head) * params.head_dim;
        result.write_out(head, Rows<Accum>{to, int64_t{heads} * params.head_dim});
      }
      for (int n = 0; n < result.rows(); ++n) partial.lse_log2[row + n] = result.lse_log2(n);
    };
  });
  for_each_task(parallel_for, static_cast<int64_t>(plan.tiles.size()), [&] {
    return [&](int64_t index) {
      const DecodeTile& tile = plan.tiles[index];
      if (tile.splits > 1) store_combined<Storage>(sequences[tile.batch], tile, partial);
    };
  });
}

}  // namespace

void dca_decode(const DecodeParams& params, ParallelFor parallel_for) {
  with_element_types(params.dtype, [&]<class Storage, class Operand> {
    if constexpr (!std::is_same_v<Storage, double>) {  // which has no float8 cache
      if (params.cache.float8) return run_decode<Storage, Operand, Float8>(params, parallel_for);
    }
    run_decode<Storage, Operand, Storage>(params, parallel_for);
  });
}

}  // namespace chunkattn::cpu
