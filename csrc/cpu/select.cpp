// Selection and merge. Scores are computed for a block of voting rows and a block of key regions at a time, and each
// row keeps its best so far: the score matrix is never stored.
#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/operands.h"
#include "kernels.h"

namespace chunkattn::cpu {
namespace {

// The semantic token of a region, [head_dim]: the mean of its rows. Those of several heads are added up.
template <class Storage>
void average_region(const void* tensor, const Strides& strides, const SelectParams& params, int batch, int head_begin,
                    int head_end, int region, Accumulator<Storage>* mean) {
  using Accum = Accumulator<Storage>;
  const int begin = region * params.geometry.region_size;
  const int tokens = std::min(params.geometry.region_size, params.shape.seqlen_k - begin);
  const int head_dim = params.shape.head_dim;
  std::fill_n(mean, head_dim, Accum(0));
  vectorized(CHUNKATTN_LOOPS(bytes) {
    for (int head = head_begin; head < head_end; ++head) {
      const Rows<const Storage> rows = rows_of<Storage>(tensor, strides, batch, begin, head);
      for (int n = 0; n < tokens; ++n) add_row<Simd<Accum, bytes>>(rows.data + n * rows.stride, mean, head_dim);
    }
    for (int d = 0; d < head_dim; ++d) mean[d] /= Accum(tokens);
  });
}

// Of all keys: [batch, kv_heads, regions, head_dim].
template <class Storage>
Buffer<Accumulator<Storage>> average_keys(const SelectParams& params, ParallelFor parallel_for) {
  const AttentionShape& shape = params.shape;
  const int regions = params.geometry.regions(shape.seqlen_k);
  const int64_t count = static_cast<int64_t>(shape.batch) * shape.kv_heads * regions;
  Buffer<Accumulator<Storage>> means(count * shape.head_dim);
  for_each_task(parallel_for, count, [&] {
    return [&](int64_t task) {
      const int region = static_cast<int>(task % regions);
      const int head = static_cast<int>(task / regions % shape.kv_heads);
      const int batch = static_cast<int>(task / regions / shape.kv_heads);
      average_region<Storage>(params.k, params.k_strides, params, batch, head, head + 1, region,
                              means.data() + task * shape.head_dim);
    };
  });
  return means;
}

template <class Accum>
struct Candidate {
  Accum score;
  int region;

  static bool better(const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.region < b.region;
  }
};

// The best `count` regions of a row whose scores come in ascending order of regions.
template <class Accum>
class BestRegions {
 public:
  // How many candidates are held, so that they need to be thinned out only now and then.
  static int64_t capacity(int count) { return count + std::max<int64_t>(count, 256); }

  // `memory` has room for capacity(count) candidates.
  BestRegions(int count, Candidate<Accum>* memory) : count_(count), begin_(memory), end_(memory) {}

  void offer(const Accum* scores, int first_region, int regions) {
    for (int j = 0; j < regions; ++j) {
      // NaN has no order: it counts as the highest score.
      const Accum score = scores[j] == scores[j] ? scores[j] : std::numeric_limits<Accum>::infinity();
      // Whoever ties with the last of the best comes after it.
      if (thinned_ && score <= threshold_) continue;
      *end_++ = {score, first_region + j};
      if (end_ - begin_ == capacity(count_)) keep_best();
    }
  }

  // Best first.
  std::span<const Candidate<Accum>> sorted() {
    if (end_ - begin_ > count_) keep_best();
    std::sort(begin_, end_, Candidate<Accum>::better);
    return {begin_, end_};
  }

 private:
  void keep_best() {
    std::nth_element(begin_, begin_ + count_ - 1, end_, Candidate<Accum>::better);
    end_ = begin_ + count_;
    threshold_ = end_[-1].score;
    thinned_ = true;
  }

  int count_;
  Candidate<Accum>* begin_;
  Candidate<Accum>* end_;
  bool thinned_ = false;
  Accum threshold_ = 0;  // the lowest score among the best when they were last thinned out
};

// Chooses the regions of one group after another.
template <class Storage>
class GroupSelection {
 public:
  using Accum = Accumulator<Storage>;

  GroupSelection(const SelectParams& params, const Accum* key_means)
      : params_(params),
        key_means_(key_means),
        head_dim_(params.shape.head_dim),
        regions_(params.geometry.regions(params.shape.seqlen_k)),
        voters_(kRows * head_dim_),
        scores_(kRows * kColumns) {}

  // Writes top_k ids.
  void run(int batch, int index_head, int group, int* ids) {
    batch_ = batch;
    index_head_ = index_head;
    group_ = group;
    const int first = params_.geometry.first_region(group);
    const bool own = params_.voters == Voters::kOwnGroup;
    first_voter_ = own ? first : std::max(0, first - params_.geometry.merge);
    const int rows = static_cast<int>(std::min<int64_t>(params_.geometry.merge, regions_ - first_voter_));
    const int eligible = eligible_end(rows - 1);  // the last row's are the most
    if (eligible <= params_.top_k) {
      // The last row lists all of them, and all are kept.
      std::iota(ids, ids + eligible, 0);
      std::fill(ids + eligible, ids + params_.top_k, -1);
      return;
    }
    walk_.assign(eligible, kNeverSeen);
    const int64_t capacity = BestRegions<Accum>::capacity(params_.top_k);
    const int block = static_cast<int>(std::clamp<int64_t>(kCandidates / capacity, 1, kRows));
    if (candidates_.data() == nullptr) candidates_ = Buffer<Candidate<Accum>>(block * capacity);
    for (int row = 0; row < rows; row += block) list_rows(row, std::min(block, rows - row), capacity);
    merge_lists(ids);
  }

 private:
  static constexpr int kRows = 128;
  static constexpr int kColumns = 512;
  static constexpr int64_t kCandidates = 1 << 20;  // held at once; rows are cut to it
  static constexpr int64_t kNeverSeen = std::numeric_limits<int64_t>::max();

  int eligible_end(int row) const { return params_.geometry.eligible_end(params_.eligibility, group_, row); }

  // Scores some voting rows, and enters the regions they list into the walk.
  void list_rows(int first_row, int rows, int64_t capacity) {
    const AttentionShape& shape = params_.shape;
    const int share = shape.heads / params_.index_heads;
    lists_.clear();
    for (int n = 0; n < rows; ++n) {
      average_region<Storage>(params_.q, params_.q_strides, params_, batch_, index_head_ * share,
                              (index_head_ + 1) * share, first_voter_ + first_row + n, voters_.data() + n * head_dim_);
      lists_.emplace_back(params_.top_k, candidates_.data() + n * capacity);
    }
    const int kv_head = index_head_ / (params_.index_heads / shape.kv_heads);
    const Accum* const keys =
        key_means_ + (static_cast<int64_t>(batch_) * shape.kv_heads + kv_head) * regions_ * head_dim_;
    const int end = eligible_end(first_row + rows - 1);
    for (int column = 0; column < end; column += kColumns) {
      const int columns = std::min(kColumns, end - column);
      gemm(Transpose::kNo, Transpose::kYes, rows, columns, head_dim_, voters_.data(), head_dim_,
           keys + static_cast<int64_t>(column) * head_dim_, head_dim_, false, scores_.data(), kColumns);
      for (int n = 0; n < rows; ++n) {
        const int eligible = std::min(columns, eligible_end(first_row + n) - column);
        lists_[n].offer(scores_.data() + n * kColumns, column, eligible);
      }
    }
    for (int n = 0; n < rows; ++n) {
      int64_t place = first_row + n;
      for (const Candidate<Accum>& candidate : lists_[n].sorted()) {
        walk_[candidate.region] = std::min(walk_[candidate.region], place);
        place += params_.geometry.merge;
      }
    }
  }

  // Keeps the regions that come first in the walk.
  void merge_lists(int* ids) {
    kept_.clear();
    for (int region = 0; region < static_cast<int>(walk_.size()); ++region) {
      if (walk_[region] != kNeverSeen) kept_.push_back(region);
    }
    if (static_cast<int>(kept_.size()) > params_.top_k) {
      std::nth_element(kept_.begin(), kept_.begin() + params_.top_k, kept_.end(),
                       [&](int a, int b) { return walk_[a] < walk_[b]; });
      kept_.resize(params_.top_k);
      std::sort(kept_.begin(), kept_.end());
    }
    std::fill(std::copy(kept_.begin(), kept_.end(), ids), ids + params_.top_k, -1);
  }

  const SelectParams& params_;
  const Accum* key_means_;
  const int head_dim_;
  const int regions_;
  const Buffer<Accum> voters_;           // [kRows, head_dim]
  const Buffer<Accum> scores_;           // [kRows, kColumns]
  Buffer<Candidate<Accum>> candidates_;  // [rows of a block, capacity]
  std::vector<BestRegions<Accum>> lists_;
  std::vector<int64_t> walk_;  // of each region, when it is first seen: rank * merge + row
  std::vector<int> kept_;
  int batch_ = 0;
  int index_head_ = 0;
  int group_ = 0;
  int first_voter_ = 0;
};

template <class Storage>
void run_select(const SelectParams& params, ParallelFor parallel_for) {
  const auto key_means = average_keys<Storage>(params, parallel_for);
  const int groups = params.geometry.groups(params.shape.seqlen_k);
  const int64_t batch_heads = static_cast<int64_t>(params.shape.batch) * params.index_heads;
  for_each_task(parallel_for, batch_heads * groups, [&] {
    return [&, selection = GroupSelection<Storage>(params, key_means.data())](int64_t task) mutable {
      const int group = groups - 1 - static_cast<int>(task / batch_heads);
      const int64_t list = task % batch_heads;
      selection.run(static_cast<int>(list / params.index_heads), static_cast<int>(list % params.index_heads), group,
                    params.indices + (list * groups + group) * params.top_k);
    };
  });
}

}  // namespace

void select(const SelectParams& params, ParallelFor parallel_for) {
  with_element_types(params.dtype, [&]<class Storage, class Operand> { run_select<Storage>(params, parallel_for); });
}

}  // namespace chunkattn::cpu
