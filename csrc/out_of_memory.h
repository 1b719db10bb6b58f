// Memory that a kernel wanted beside what it was given and did not get. In Python a MemoryError.
#pragma once

#include <cstdint>

namespace fastalign {

struct OutOfMemory {
  const char* op;  // null: nothing is missing
  int64_t bytes;
};

}  // namespace fastalign
