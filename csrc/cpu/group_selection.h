// Which regions a group keeps. Scores are computed for a block of voting rows and a block of key regions at a time, and
// each row keeps its best so far: the score matrix is never stored.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/gemm.h"

namespace chunkattn::cpu {

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
template <class Accum>
class GroupSelection {
 public:
  GroupSelection(int head_dim, int top_k)
      : head_dim_(head_dim), top_k_(top_k), voters_(kRows * head_dim_), scores_(kRows * kColumns) {}

  // Writes top_k ids. `rows` rows vote, of which row n may list the key regions before eligible_end(n), no fewer than
  // the row before it. load_voters(n, count, to) writes the semantic tokens of rows n .. n + count - 1, [count,
  // head_dim]; those of the key regions are `keys`, [regions, head_dim]. All of either may be multiples by one factor.
  template <class EligibleEnd, class LoadVoters>
  void run(int rows, const Accum* keys, const EligibleEnd& eligible_end, const LoadVoters& load_voters, int* ids) {
    const int eligible = eligible_end(rows - 1);
    if (eligible <= top_k_) {
      // The last row lists all of them, and all are kept.
      std::iota(ids, ids + eligible, 0);
      std::fill(ids + eligible, ids + top_k_, -1);
      return;
    }
    walk_.assign(eligible, kNeverSeen);
    const int64_t capacity = BestRegions<Accum>::capacity(top_k_);
    const int block = static_cast<int>(std::clamp<int64_t>(kCandidates / capacity, 1, kRows));
    if (candidates_.data() == nullptr) candidates_ = Buffer<Candidate<Accum>>(block * capacity);
    for (int row = 0; row < rows; row += block) {
      const int count = std::min(block, rows - row);
      load_voters(row, count, voters_.data());
      list_rows(row, count, rows, keys, eligible_end, capacity);
    }
    merge_lists(ids);
  }

 private:
  static constexpr int kRows = 128;
  static constexpr int kColumns = 512;
  static constexpr int64_t kCandidates = 1 << 20;  // held at once; rows are cut to it
  static constexpr int64_t kNeverSeen = std::numeric_limits<int64_t>::max();

  // Scores `count` of the voting rows, and enters the regions they list into the walk.
  template <class EligibleEnd>
  void list_rows(int first_row, int count, int rows, const Accum* keys, const EligibleEnd& eligible_end,
                 int64_t capacity) {
    lists_.clear();
    for (int n = 0; n < count; ++n) lists_.emplace_back(top_k_, candidates_.data() + n * capacity);
    const int end = eligible_end(first_row + count - 1);
    for (int column = 0; column < end; column += kColumns) {
      const int columns = std::min(kColumns, end - column);
      gemm(Transpose::kNo, Transpose::kYes, count, columns, head_dim_, voters_.data(), head_dim_,
           keys + static_cast<int64_t>(column) * head_dim_, head_dim_, false, scores_.data(), kColumns);
      for (int n = 0; n < count; ++n) {
        const int eligible = std::min(columns, eligible_end(first_row + n) - column);
        lists_[n].offer(scores_.data() + n * kColumns, column, eligible);
      }
    }
    for (int n = 0; n < count; ++n) {
      int64_t place = first_row + n;
      for (const Candidate<Accum>& candidate : lists_[n].sorted()) {
        walk_[candidate.region] = std::min(walk_[candidate.region], place);
        place += rows;
      }
    }
  }

  // Keeps the regions that come first in the walk.
  void merge_lists(int* ids) {
    kept_.clear();
    for (int region = 0; region < static_cast<int>(walk_.size()); ++region) {
      if (walk_[region] != kNeverSeen) kept_.push_back(region);
    }
    if (static_cast<int>(kept_.size()) > top_k_) {
      std::nth_element(kept_.begin(), kept_.begin() + top_k_, kept_.end(),
                       [&](int a, int b) { return walk_[a] < walk_[b]; });
      kept_.resize(top_k_);
      std::sort(kept_.begin(), kept_.end());
    }
    std::fill(std::copy(kept_.begin(), kept_.end(), ids), ids + top_k_, -1);
  }

  const int head_dim_;
  const int top_k_;
  const Buffer<Accum> voters_;           // [kRows, head_dim]
  const Buffer<Accum> scores_;           // [kRows, kColumns]
  Buffer<Candidate<Accum>> candidates_;  // [rows of a block, capacity]
  std::vector<BestRegions<Accum>> lists_;
  std::vector<int64_t> walk_;  // of each region, when it is first seen: rank * rows + row
  std::vector<int> kept_;
};

}  // namespace chunkattn::cpu
