// Memory that a kernel works in, and what happens where there is none. An exception that leaves a parallel region ends
// the process: there it is kept until the region has ended.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "out_of_memory.h"

namespace fastalign::LEVEL {

struct Free {
  void operator()(void* data) const { std::free(data); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

// For `count` of T, which hold anything; throws OutOfMemory.
template <class T>
Scratch<T> scratch(const char* op, int64_t count) {
  static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_destructible_v<T>);
  int64_t bytes = std::max<int64_t>(64, (count * int64_t(sizeof(T)) + 63) / 64 * 64);
  void* data = std::aligned_alloc(64, size_t(bytes));
  if (!data) throw OutOfMemory{op, bytes};
  return Scratch<T>(static_cast<T*>(data));
}

// Calls f inside a parallel region; what it throws is left in `missing`, which is shared.
template <class F>
void keep_failure(OutOfMemory& missing, F f) {
  try {
    f();
  } catch (const OutOfMemory& error) {
#pragma omp critical(fastalign_out_of_memory)
    missing = error;
  }
}

// After the region.
inline void throw_failure(const OutOfMemory& missing) {
  if (missing.op) throw missing;
}

}  // namespace fastalign::LEVEL
