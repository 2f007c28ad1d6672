#include "thread_pool.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace chunkattn::bench {

namespace {

int threads_in_use = 1;

// Runs part(i) for i in [0, count), each on a thread of its own. OpenMP keeps its threads between calls, and a BLAS
// that runs on OpenMP as well sees that it is inside a parallel region and adds no threads of its own.
template <class Part>
void run_parts(int count, const Part& part) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(count) schedule(static, 1)
  for (int i = 0; i < count; ++i) part(i);
#else
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back([&part, i] { part(i); });
  part(0);
  for (std::thread& thread : others) thread.join();
#endif
}

}  // namespace

void set_threads(int threads) { threads_in_use = threads; }

int thread_count() { return threads_in_use; }

void parallel_for(int64_t count, cpu::ParallelBody body, void* context) {
  if (count <= 0) return;
  const int parts = static_cast<int>(std::min<int64_t>(count, threads_in_use));
  std::vector<std::exception_ptr> failures(parts);
  run_parts(parts, [&](int part) {
    try {
      body(count * part / parts, count * (part + 1) / parts, context);
    } catch (...) {
      failures[part] = std::current_exception();
    }
  });
  for (const std::exception_ptr& failure : failures) {
    if (failure != nullptr) std::rethrow_exception(failure);
  }
}

}  // namespace chunkattn::bench
