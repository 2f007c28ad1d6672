#include <algorithm>
#include <vector>

#include "cpu/decode_results.h"
#include "cpu/group_selection.h"
#include "kernels.h"

namespace chunkattn::cpu {
namespace {

// What a call appends to a sequence, positions, and the sequence as a plain forward, whose keys are those of the cache.
struct StepSequence {
  int begin;
  int end;
  ForwardParams forward;
};

ForwardParams forward_of_sequence(const SelectMergeDecodeParams& params, int begin) {
  ForwardParams forward{};
  forward.q = params.q;
  forward.out = params.out;
  forward.softmax_lse = params.softmax_lse;
  forward.q_strides = params.q_strides;
  forward.out_strides = params.out_strides;
  forward.shape = {params.batch, params.seqlen, begin + params.seqlen, params.heads, params.kv_heads, params.head_dim};
  forward.dtype = params.dtype;
  // A group is a chunk; one longer than the sequence is as long as it, so that its size fits 32 bits.
  const int64_t group_tokens = params.geometry.group_tokens();
  forward.geometry.chunk_size = static_cast<int>(std::min<int64_t>(group_tokens, forward.shape.seqlen_k));
  forward.scale = params.scale;
  forward.q_rotated = true;
  forward.k_rotated = true;
  return forward;
}

template <class Storage>
class SelectMergeStep {
 public:
  using Accum = Accumulator<Storage>;

  SelectMergeStep(const SelectMergeDecodeParams& params, ParallelFor parallel_for)
      : params_(params),
        parallel_for_(parallel_for),
        keys_(params.cache, params.cache.k, params.cache.k_strides),
        values_(params.cache, params.cache.v, params.cache.v_strides) {
    for (int batch = 0; batch < params.batch; ++batch) {
      const int begin = params.stored(batch);
      sequences_.push_back({begin, params.end_of(begin, batch), forward_of_sequence(params, begin)});
    }
  }

  template <class Operand>
  void run() {
    append();
    const TokenSpans spans = params_.spans();
    int most = 0;
    for (const StepSequence& sequence : sequences_) {
      while (spans.span(sequence.begin, sequence.end, most).count() > 0) ++most;
    }
    for (int index = 0; index < most; ++index) {
      spans_.clear();
      for (const StepSequence& sequence : sequences_) {
        spans_.push_back(spans.span(sequence.begin, sequence.end, index));
      }
      choose();
      if (params_.attends) attend<Operand>();
    }
    for (int batch = 0; batch < params_.batch; ++batch) {
      const StepSequence& sequence = sequences_[batch];
      params_.seqlens[batch] = sequence.end;
      if (params_.attends) {
        write_unseeing<Storage>(sequence.forward, batch, sequence.end - sequence.begin, params_.seqlen);
      }
    }
  }

 private:
  // New keys and values, and the sums of the regions they belong to: all that does not depend on other tokens.
  void append() {
    const RegionGeometry& geometry = params_.geometry;
    const int64_t most = RegionGeometry::ceil_div(params_.seqlen, geometry.region_size) + 1;
    for_each_task(parallel_for_, params_.batch * params_.kv_heads * most, [&] {
      return [&](int64_t task) {
        const int head = static_cast<int>(task / most % params_.kv_heads);
        const int batch = static_cast<int>(task / most / params_.kv_heads);
        const StepSequence& sequence = sequences_[batch];
        const int64_t region = sequence.begin / geometry.region_size + task % most;
        const int begin = static_cast<int>(std::max<int64_t>(region * geometry.region_size, sequence.begin));
        const int end = static_cast<int>(std::min<int64_t>((region + 1) * geometry.region_size, sequence.end));
        if (begin < end) append_to_region(batch, head, static_cast<int>(region), begin, end);
      };
    });
  }

  void append_to_region(int batch, int head, int region, int begin, int end) {
    const int first = begin - sequences_[batch].begin;
    const auto copy = [&](const void* from, const Strides& strides, const CachePages<Storage>& to) {
      to.for_each_page(batch, head, begin, end, [&](int n, Rows<Storage> rows, int count) {
        convert_rows(rows_of<Storage>(from, strides, batch, first + n, head), rows, count, params_.head_dim);
      });
    };
    copy(params_.k, params_.k_strides, keys_);
    copy(params_.v, params_.v_strides, values_);
    Accum* const sum = region_sums(batch, head) + static_cast<int64_t>(region) * params_.head_dim;
    if (begin % params_.geometry.region_size == 0) std::fill_n(sum, params_.head_dim, Accum(0));
    add_rows(params_.select_k, params_.select_k_strides, batch, {head, head + 1}, first, end - begin, sum);
  }

  // Adds up some rows of some heads.
  void add_rows(const void* tensor, const Strides& strides, int batch, HeadRange heads, int first, int count,
                Accum* sum) const {
    for (int head = heads.begin; head < heads.end; ++head) {
      cpu::add_rows(rows_of<Storage>(tensor, strides, batch, first, head), count, params_.head_dim, sum);
    }
  }

  Accum* region_sums(int batch, int head) const {
    const int64_t plane = static_cast<int64_t>(batch) * params_.kv_heads + head;
    return static_cast<Accum*>(params_.region_sums) + plane * params_.regions * params_.head_dim;
  }

  HeadRange query_heads(int index_head) const {
    const int share = params_.heads / params_.index_heads;
    return {index_head * share, (index_head + 1) * share};
  }

  // The lists of the spans that begin a group, or of all if each token chooses for itself; the spans' queries go on to
  // choose for the group behind.
  void choose() {
    if (params_.each_token_chooses && !params_.attends) return;
    for_each_task(parallel_for_, static_cast<int64_t>(params_.batch) * params_.index_heads, [&] {
      return [&, selection = GroupSelection<Accum>(params_.head_dim, params_.top_k)](int64_t task) mutable {
        const int index_head = static_cast<int>(task % params_.index_heads);
        const int batch = static_cast<int>(task / params_.index_heads);
        const TokenSpan span = spans_[batch];
        if (span.count() == 0) return;
        if (params_.each_token_chooses) return choose_by_token(batch, index_head, span.begin, selection);
        if (span.begin % params_.geometry.group_tokens() == 0) choose_by_group(batch, index_head, span, selection);
        add_queries(batch, index_head, span);
      };
    });
  }

  const Accum* selected_keys(int batch, int index_head) const {
    return region_sums(batch, index_head / (params_.index_heads / params_.kv_heads));
  }

  int64_t plane(int batch, int index_head) const {
    return static_cast<int64_t>(batch) * params_.index_heads + index_head;
  }

  Accum* query_sums(int batch, int index_head) const {
    return static_cast<Accum*>(params_.query_sums) + plane(batch, index_head) * params_.voters * params_.head_dim;
  }

  int* indices(int batch, int index_head) const { return params_.indices + plane(batch, index_head) * params_.top_k; }

  void choose_by_token(int batch, int index_head, int token, GroupSelection<Accum>& selection) const {
    const RegionGeometry& geometry = params_.geometry;
    const int group = geometry.group(token);
    const int row = token / geometry.region_size - geometry.first_region(group);
    selection.run(
        1, selected_keys(batch, index_head),
        [&](int) { return geometry.eligible_end(params_.eligibility, group, row); },
        [&](int, int, Accum* to) {
          std::fill_n(to, params_.head_dim, Accum(0));
          add_rows(params_.select_q, params_.select_q_strides, batch, query_heads(index_head),
                   token - sequences_[batch].begin, 1, to);
        },
        indices(batch, index_head));
  }

  void choose_by_group(int batch, int index_head, TokenSpan span, GroupSelection<Accum>& selection) const {
    const int group = params_.geometry.group(span.begin);
    const int rows = group == 0 ? 1 : params_.voters;  // the first group has nothing to choose from
    const Accum* const voters = query_sums(batch, index_head);
    selection.run(
        rows, selected_keys(batch, index_head),
        [&](int row) { return params_.geometry.eligible_end(params_.eligibility, group, row); },
        [&](int row, int count, Accum* to) {
          std::copy_n(voters + static_cast<int64_t>(row) * params_.head_dim,
                      static_cast<int64_t>(count) * params_.head_dim, to);
        },
        indices(batch, index_head));
  }

  void add_queries(int batch, int index_head, TokenSpan span) const {
    const int region_size = params_.geometry.region_size;
    const int first_region = params_.geometry.first_region(params_.geometry.group(span.begin));
    for (int begin = span.begin; begin < span.end;) {
      const int region = begin / region_size;
      const int end = static_cast<int>(std::min<int64_t>((int64_t{region} + 1) * region_size, span.end));
      Accum* const sum = query_sums(batch, index_head) + static_cast<int64_t>(region - first_region) * params_.head_dim;
      if (begin % region_size == 0) std::fill_n(sum, params_.head_dim, Accum(0));
      add_rows(params_.select_q, params_.select_q_strides, batch, query_heads(index_head),
               begin - sequences_[batch].begin, end - begin, sum);
      begin = end;
    }
  }

  RegionLists lists_of_group(int group) const {
    return {params_.indices, params_.index_heads, params_.top_k, params_.geometry, group, 1};
  }

  // Heads that share a list and their keys run together.
  template <class Operand>
  void attend() {
    if (params_.heads == 0) return;
    using Tile = ForwardTile<Storage, Operand>;
    struct Work {
      int batch;
      HeadRange heads;
      QueryTile tile;
    };
    const int share = params_.heads / std::max(params_.index_heads, params_.kv_heads);
    const int size = std::max(1, Tile::kRows / share);
    std::vector<Work> works;
    for (int batch = 0; batch < params_.batch; ++batch) {
      const TokenSpan span = spans_[batch];
      for (int begin = span.begin; begin < span.end; begin += size) {
        for (int head = 0; head < params_.heads; head += share) {
          works.push_back({batch, {head, head + share}, {begin, std::min(begin + size, span.end)}});
        }
      }
    }
    const int64_t queries = static_cast<int64_t>(share) * std::min<int64_t>(size, params_.seqlen);
    const CachedKeysAndValues<Storage, Operand> keys_and_values = {{keys_, nullptr, params_.head_dim, queries},
                                                                   {values_, nullptr, params_.head_dim, queries}};
    for_each_task(parallel_for_, static_cast<int64_t>(works.size()), [&] {
      return [&, result = Tile(params_.head_dim, std::min(size, params_.seqlen) * share)](int64_t index) mutable {
        const Work& work = works[index];
        const ForwardParams& forward = sequences_[work.batch].forward;
        const RegionLists lists = lists_of_group(params_.geometry.group(work.tile.begin));
        result.run(forward, &lists, keys_and_values, {work.batch, work.heads, work.tile, {0, work.tile.end}});
        store_tile(forward, work.batch, work.heads, work.tile, result);
      };
    });
  }

  const SelectMergeDecodeParams& params_;
  const ParallelFor parallel_for_;
  const CachePages<Storage> keys_;
  const CachePages<Storage> values_;
  std::vector<StepSequence> sequences_;
  std::vector<TokenSpan> spans_;  // of each sequence, in work
};

}  // namespace

void select_merge_decode(const SelectMergeDecodeParams& params, ParallelFor parallel_for) {
  with_element_types(params.dtype, [&]<class Storage, class Operand> {
    SelectMergeStep<Storage>(params, parallel_for).template run<Operand>();
  });
}

}  // namespace chunkattn::cpu
