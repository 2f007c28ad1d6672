// Work shared out among the threads of the caller's pool.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace chunkattn::cpu {

// Runs worker(i) for every i in [0, count), in ascending order of their starts; put the longest first. Each thread
// makes one worker with make_worker() and takes the next i whenever it is free: causal tiles are of unequal work, which
// ranges fixed beforehand would not balance.
template <class MakeWorker>
void for_each_task(ParallelFor parallel_for, int64_t count, const MakeWorker& make_worker) {
  struct Queue {
    const MakeWorker& make_worker;
    int64_t count;
    std::atomic<int64_t> next{0};
  } queue{make_worker, count};
  const auto drain = [](int64_t, int64_t, void* context) {
    auto& queue = *static_cast<Queue*>(context);
    int64_t index = queue.next.fetch_add(1);
    if (index >= queue.count) return;
    auto worker = queue.make_worker();
    for (; index < queue.count; index = queue.next.fetch_add(1)) worker(index);
  };
  parallel_for(count, drain, &queue);
}

// How many threads the pool puts on a long range.
inline int count_threads(ParallelFor parallel_for) {
  std::atomic<int> parts{0};
  const auto count_part = [](int64_t, int64_t, void* context) { ++*static_cast<std::atomic<int>*>(context); };
  parallel_for(int64_t{1} << 16, count_part, &parts);
  return parts;
}

}  // namespace chunkattn::cpu
