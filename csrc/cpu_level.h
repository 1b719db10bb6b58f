// Which instruction set the CPU kernels run with, decided once per process.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastalign {

enum class Level { scalar, avx2, avx512 };

inline const char* name(Level level) {
  return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "scalar";
}

// The best level that this build holds and this processor has (the compiler's runtime also asks the system's consent).
inline Level best_level() {
#if defined(FASTALIGN_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Level::avx512;
#endif
#if defined(FASTALIGN_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::avx2;
#endif
  return Level::scalar;
}

inline Level level_named(const std::string& wanted) {
  for (Level level : {Level::scalar, Level::avx2, Level::avx512})
    if (wanted == name(level)) {
      if (level <= best_level()) return level;
      throw std::invalid_argument("FASTALIGN_CPU=" + wanted + " is more than this processor and build have: " +
                                  name(best_level()));
    }
  throw std::invalid_argument("FASTALIGN_CPU must be avx512, avx2 or scalar, not '" + wanted + "'");
}

// The level in use; FASTALIGN_CPU in the environment may force a lower one.
inline Level& cpu_level() {
  static Level level = [] {
    const char* wanted = std::getenv("FASTALIGN_CPU");
    return wanted && *wanted ? level_named(wanted) : best_level();
  }();
  return level;
}

inline const Kernels& kernels() {
  switch (cpu_level()) {
#if defined(FASTALIGN_AVX512)
    case Level::avx512: return avx512::kernels;
#endif
#if defined(FASTALIGN_AVX2)
    case Level::avx2: return avx2::kernels;
#endif
    default: return scalar::kernels;
  }
}

}  // namespace fastalign
