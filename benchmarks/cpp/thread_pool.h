// The threads the CPU kernels, the reference and the CPU ceilings run on.
#pragma once

#include "kernels.h"

namespace chunkattn::bench {

void set_threads(int threads);
int thread_count();

// A cpu::ParallelFor. What a body throws is thrown again here.
void parallel_for(int64_t count, cpu::ParallelBody body, void* context);

// Runs block(i) for i in [0, count).
template <class Block>
void parallel_blocks(int64_t count, const Block& block) {
  const auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Block*>(context))(i);
  };
  parallel_for(count, run, const_cast<Block*>(&block));
}

}  // namespace chunkattn::bench
