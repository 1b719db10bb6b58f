// Items over threads, and columns in slabs whose width does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/scratch.h"

namespace fastalign::LEVEL {

// Columns that one thread folds in one go: few enough to share a row of a large vocabulary among threads.
constexpr int64_t kSlab = 16384;

inline int64_t num_slabs(int64_t vocabulary) { return std::max<int64_t>(1, (vocabulary + kSlab - 1) / kSlab); }

// Calls f(item) for every item; a thread is worth waking for a slab's work, not for less.
template <class F>
void parallel_for(int64_t items, int64_t elements, int threads, F f) {
  threads = static_cast<int>(std::min<int64_t>({threads, items, 1 + elements / kSlab}));
  OutOfMemory missing{};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) keep_failure(missing, [&] { f(item); });
  throw_failure(missing);
}

}  // namespace fastalign::LEVEL
