// A GPU's threads as fibers of one CPU thread: each runs until it waits for others, so that a barrier that is missing, or
// that not every thread reaches, shows.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

namespace host {

constexpr int kWarp = 32;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  int turn[kWarp] = {};
  unsigned char values[2][kWarp][8];
};

// Bytes announced and not yet there end a phase when they arrive: some time later, as the hardware would have it.
struct Arrival {
  bool announced;
  unsigned phase;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  Arrival* arrival;
};

struct Block {
  unsigned index, rank;
  unsigned char* shared;
  size_t shared_bytes;
  int running;  // fibers; when the last has ended the memory is someone else's
  Barrier barriers[16];
  std::vector<Warp> warps;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  std::vector<Copy> copies;
  int threads;
  unsigned num_blocks;  // of the grid
};

struct Fiber {
  Cluster* cluster;
  Block* block;
  Dim thread;
  bool done = false;
  bool started = false;
  jmp_buf place;
  ucontext_t context;
};

extern Fiber* current;
void yield();                            // lets others run
void meet(Barrier& barrier, int count);  // returns when `count` fibers have come here
void progress();                         // something happened: whoever waits is not waiting in vain
void fail(const char* error);            // what `run` will return

// Wide loads and copies from global memory must lie in here, where it is set.
struct Range {
  uintptr_t low, high;
};
extern Range readable;
void check_readable(const void* from, size_t bytes);

// Runs a kernel for blocks [first, first + size) of a grid, as one cluster. Null, or what went wrong.
const char* run(unsigned first, unsigned size, unsigned num_blocks, int threads, size_t shared_bytes,
                const std::function<void()>& kernel);

// The order in which fibers are resumed. 0: as they are, 1: backwards, more: the seed of a new order in every round.
extern unsigned order;

}  // namespace host

extern host::Dim threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs
