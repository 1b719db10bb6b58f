#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>

host::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace host {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN in every type
constexpr size_t kCanary = 128;

jmp_buf scheduler;
ucontext_t ended;
unsigned long steps;
const char* failure;
const std::function<void()>* body;

unsigned char* stack(size_t fiber) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= fiber)
    stacks.push_back(static_cast<unsigned char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  return stacks[fiber];
}

void enter() {
  (*body)();
  current->done = true;
  Block& block = *current->block;
  if (--block.running == 0) std::memset(block.shared, kPoison, block.shared_bytes);
  progress();
  yield();
}

void resume(Fiber& fiber, size_t index) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = {fiber.block->index, 0, 0};
  blockDim = {static_cast<unsigned>(fiber.cluster->threads), 1, 1};
  gridDim = {fiber.cluster->num_blocks, 1, 1};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {stack(index), 0, kStack};
  fiber.context.uc_link = &ended;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Where orders are drawn, whole blocks also pause: as if others ran far ahead of them.
struct Pauses {
  std::vector<int> rounds;

  bool any() const { return std::any_of(rounds.begin(), rounds.end(), [](int left) { return left > 0; }); }
  void end() { std::fill(rounds.begin(), rounds.end(), 0); }
  void draw(std::mt19937& random) {
    for (int& left : rounds) left = left > 0 ? left - 1 : random() % 8 == 0 ? int(random() % 100) : 0;
  }
};

const char* run_fibers(std::vector<std::unique_ptr<Fiber>>& fibers) {
  std::vector<size_t> turns(fibers.size());
  std::iota(turns.begin(), turns.end(), 0);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  std::mt19937 random(order);
  Pauses pauses{std::vector<int>(fibers[0]->cluster->blocks.size())};
  for (size_t left = fibers.size(); left;) {
    if (order > 1) {
      std::shuffle(turns.begin(), turns.end(), random);
      pauses.draw(random);
    }
    unsigned long before = steps;
    for (size_t i : turns) {
      if (fibers[i]->done || pauses.rounds[fibers[i]->block->rank]) continue;
      resume(*fibers[i], i);
      left -= fibers[i]->done;
    }
    if (left && steps == before && !pauses.any()) return "threads wait for others that never come";
    if (steps == before) pauses.end();
  }
  return nullptr;
}

}  // namespace

Fiber* current;
unsigned order;
Range readable;

void progress() { ++steps; }
void fail(const char* error) { failure = error; }

void check_readable(const void* from, size_t bytes) {
  auto low = reinterpret_cast<uintptr_t>(from);
  if (readable.high && bytes && (low < readable.low || low + bytes > readable.high)) fail("a wide load outside the row");
}

void yield() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void meet(Barrier& barrier, int count) {
  unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  progress();
  while (barrier.generation == generation) yield();
}

const char* run(unsigned first, unsigned size, unsigned num_blocks, int threads, size_t shared_bytes,
                const std::function<void()>& kernel) {
  Cluster cluster{std::vector<Block>(size), {}, {}, threads, num_blocks};
  std::vector<std::unique_ptr<Fiber>> fibers;
  body = &kernel;
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = cluster.blocks[rank];
    block.index = first + rank;
    block.rank = rank;
    block.shared_bytes = shared_bytes;
    block.running = threads;
    block.warps.resize((threads + kWarp - 1) / kWarp);
    block.shared = static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + kCanary + 127) / 128 * 128));
    std::memset(block.shared, kPoison, shared_bytes + kCanary);
    for (unsigned i = 0; i < unsigned(threads); ++i)
      fibers.emplace_back(new Fiber{&cluster, &block, {i, 0, 0}, false, false, {}, {}});
  }
  failure = nullptr;
  const char* error = run_fibers(fibers);
  if (failure) error = failure;
  if (!error && !cluster.copies.empty()) error = "a kernel ended before its copies arrived";
  for (Block& block : cluster.blocks) {
    for (size_t i = 0; i < kCanary; ++i)
      if (block.shared[shared_bytes + i] != kPoison) error = "a kernel wrote behind its shared memory";
    std::free(block.shared);
  }
  return error;
}

}  // namespace host
