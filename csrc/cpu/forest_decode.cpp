// One new token per row against a forest of cached keys and values; compiled once per instruction set.
//
// The bits are those of attention.cpp for the same sequence: the scores of a query lie side by side from its first
// position, one maximum, exponentials and a sum lane by lane, then the values added in the order of positions, in one
// chain of multiply-adds per number. A chain that leaves the prompt's blocks for the row's own is stored in between,
// which rounds nothing. How many queries share a tile changes no chain, so a prompt's block is read for all of them.
#include "forest_decode.h"

#include <algorithm>
#include <optional>
#include <type_traits>

#include "cpu/heads.h"
#include "cpu/scratch.h"
#include "cpu/tiles.h"

namespace fastalign::LEVEL {
namespace {

constexpr int64_t kQueries = 48;                   // of a task and key head, or those of one row where they are more
constexpr int64_t kScores = 65536;                 // of a task likewise: what the second-level cache holds
constexpr int64_t kTasks = 4;                      // of a thread at least, where it takes fewer heads at a time
constexpr int64_t kParts = kForestBlock / kLanes;  // vectors of a block's positions
constexpr int64_t kWork = 1 << 18;                 // multiply-adds for which a thread is worth waking

// Sums [rows][vectors] of a[i, p] * b(run, j)[p], run after run; `per_run` terms each, `depth` in all. They begin at 0 or
// go on from what is in `out`.
template <int rows, int vectors, class From>
FORCE_INLINE void sum_tile(const float* a, int64_t a_row, int64_t depth, int64_t per_run, int64_t step, From from,
                           float* out, int64_t out_row, int64_t out_step, bool go_on) {
  vec sums[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = go_on ? load(out + i * out_row + j * out_step) : set(0);
  for (int64_t run = 0; depth > 0; ++run, depth -= per_run) {
    decltype(from(0, 0)) b[vectors];
    for (int j = 0; j < vectors; ++j) b[j] = from(run, j);
    for (int64_t p = 0, n = std::min(depth, per_run); p < n; ++p, ++a) {
      vec columns[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) columns[j] = load(b[j] + p * step);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        vec x = set(a[i * a_row]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sums[i][j] = fma(x, columns[j], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(out + i * out_row + j * out_step, sums[i][j]);
}

// f(first, number as a type) over `count` in pieces of `most`, then of half of what was too large, down to 1.
template <int most, class F>
FORCE_INLINE void in_pieces(int64_t first, int64_t count, F f) {
  for (; count - first >= most; first += most) f(first, std::integral_constant<int, most>());
  if constexpr (most > 1) in_pieces<(most > 4 ? 4 : most / 2)>(first, count, f);
}

struct Task {
  const ForestGroup* group;
  int64_t first, last, first_head, last_head;  // of its rows and key heads
};

// What one thread works in: `queries` rows of `columns` scores, and of `width` numbers of q and of sums.
struct Room {
  int64_t columns, width;
  Scratch<float> scores, q, sums, totals;

  Room(const ForestDecode& op, int64_t queries, int64_t longest)
      : columns((longest + kForestBlock - 1) / kForestBlock * kForestBlock),
        width((op.size + kLanes - 1) / kLanes * kLanes),
        scores(scratch<float>("forest_decode", queries * columns)),
        q(scratch<float>("forest_decode", queries * width)), sums(scratch<float>("forest_decode", queries * width)),
        totals(scratch<float>("forest_decode", queries)) {}
};

// The new token's key becomes a column of its block, its value a row.
template <class T>
void append(const ForestDecode& op, int64_t row, int64_t head, T*) {
  int64_t place = op.lengths[row] - 1, at = place % kForestBlock;
  int64_t block = (op.chains[row * op.width + place / kForestBlock] * op.key_heads + head) * op.size * kForestBlock;
  T* value = static_cast<T*>(op.values) + block + at * op.size;
  T* column = static_cast<T*>(op.keys) + block + at;
  with_type(op.v.dtype, [&](auto* type) { scaled(row_of(op.v, row, head, type), value, op.size, 1); });
  with_type(op.k.dtype, [&](auto* type) {
    auto* key = row_of(op.k, row, head, type);
    for (int64_t j = 0; j < op.size; j += kLanes) {
      T lanes[kLanes];
      int64_t n = std::min<int64_t>(kLanes, op.size - j);
      store(lanes, n == kLanes ? load(key + j) : load(key + j, n));
      for (int64_t i = 0; i < n; ++i) column[(j + i) * kForestBlock] = lanes[i];
    }
  });
}

// Blocks of one key head along a chain.
template <class T>
struct Blocks {
  const T* data;
  const int32_t* chain;
  int64_t stride;  // from block to block

  FORCE_INLINE const T* operator[](int64_t i) const { return data + chain[i] * stride; }
};

// scores [rows, ...] of `rows` queries against positions first to last (exclusive, up to the end of its vector).
template <class T>
void score(const Room& room, int64_t row, int64_t rows, int64_t size, Blocks<T> keys, int64_t first, int64_t last) {
  in_pieces<kTileVectors>(first / kLanes, (last + kLanes - 1) / kLanes, [&](int64_t at, auto vectors) {
    auto from = [&](int64_t, int64_t j) { return keys[(at + j) / kParts] + (at + j) % kParts * kLanes; };
    in_pieces<int(kTileRows)>(0, rows, [&](int64_t i, auto count) {
      sum_tile<count(), vectors()>(&room.q[(row + i) * room.width], room.width, size, size, kForestBlock, from,
                                   &room.scores[(row + i) * room.columns + at * kLanes], room.columns, kLanes, false);
    });
  });
}

// sums [rows, width] of weights times values of positions first to last (exclusive); first begins a block.
template <class T>
void add_values(const Room& room, int64_t row, int64_t rows, int64_t size, Blocks<T> values, int64_t first,
                int64_t last) {
  if (last <= first) return;
  values.chain += first / kForestBlock;
  in_pieces<kTileVectors>(0, room.width / kLanes, [&](int64_t at, auto vectors) {
    auto from = [&](int64_t run, int64_t j) { return values[run] + (at + j) * kLanes; };
    in_pieces<int(kTileRows)>(0, rows, [&](int64_t i, auto count) {
      sum_tile<count(), vectors()>(&room.scores[(row + i) * room.columns + first], room.columns, last - first,
                                   kForestBlock, size, from, &room.sums[(row + i) * room.width + at * kLanes],
                                   room.width, kLanes, first > 0);
    });
  });
}

// One task with its keys and values as T. The queries of a key head are neighbours, row by row.
template <class T>
struct Decode {
  const ForestDecode& op;
  const Room& room;
  const Task& task;
  int64_t group = op.heads / op.key_heads, rows = task.last - task.first;
  int64_t shared = task.group->shared * kForestBlock, block = op.size * kForestBlock;

  int64_t row(int64_t i) const { return op.order[task.first + i]; }
  int64_t length(int64_t i) const { return op.lengths[row(i)]; }
  int64_t query(int64_t i, int64_t head) const { return ((head - task.first_head) * rows + i) * group; }

  Blocks<T> blocks(const void* data, int64_t i, int64_t head) const {
    return {static_cast<const T*>(data) + head * block, op.chains + row(i) * op.width, op.key_heads * block};
  }

  void read_queries(int64_t i, int64_t head) const {
    with_type(op.q.dtype, [&](auto* type) {
      for (int64_t h = 0; h < group; ++h)
        scaled(row_of(op.q, row(i), head * group + h, type), &room.q[(query(i, head) + h) * room.width], op.size,
               op.scale);
    });
  }

  // The weights of a row's queries, but for the factor 1 / total, from the scores of what it shares and of its own.
  void make_weights(int64_t i, int64_t head) const {
    append(op, row(i), head, static_cast<T*>(nullptr));
    score(room, query(i, head), group, op.size, blocks(op.keys, i, head), shared, length(i));
    for (int64_t h = query(i, head); h < query(i + 1, head); ++h) {
      float* x = &room.scores[h * room.columns];
      if (op.softcap > 0) cap(x, length(i), op.softcap);
      room.totals[h] = exponentials(x, length(i), length(i), max_of(x, length(i)));
    }
  }

  void write_result(int64_t i, int64_t head) const {
    add_values(room, query(i, head), group, op.size, blocks(op.values, i, head), shared, length(i));
    with_type(op.out.dtype, [&](auto* type) {
      for (int64_t h = 0, at = query(i, head); h < group; ++h, ++at)
        scaled(&room.sums[at * room.width], row_of(op.out, row(i), head * group + h, type), op.size,
               1 / room.totals[at]);
    });
  }

  template <class F>
  void for_heads(F f) const {
    for (int64_t head = task.first_head; head < task.last_head; ++head) f(head);
  }

  // What rows share for one head after the other, what is their own row by row: a block's heads are neighbours.
  void run() const {
    for_heads([&](int64_t head) {
      for (int64_t i = 0; i < rows; ++i) read_queries(i, head);
      score(room, query(0, head), rows * group, op.size, blocks(op.keys, 0, head), 0, shared);
    });
    for (int64_t i = 0; i < rows; ++i) for_heads([&](int64_t head) { make_weights(i, head); });
    for_heads([&](int64_t head) {
      add_values(room, query(0, head), rows * group, op.size, blocks(op.values, 0, head), 0, shared);
    });
    for (int64_t i = 0; i < rows; ++i) for_heads([&](int64_t head) { write_result(i, head); });
  }
};

// Up to `rows` rows of a group and `heads` key heads. Returns how many, and writes them where there is room.
int64_t list_tasks(const ForestDecode& op, int64_t rows, int64_t heads, Task* tasks) {
  int64_t count = 0;
  for (const ForestGroup* group = op.groups; group < op.groups + op.num_groups; ++group)
    for (int64_t first = group->first; first < group->last; first += rows)
      for (int64_t head = 0; head < op.key_heads; head += heads, ++count)
        if (tasks)
          tasks[count] = {group, first, std::min(group->last, first + rows), head,
                          std::min(op.key_heads, head + heads)};
  return count;
}

}  // namespace

void forest_decode(const ForestDecode& op, int threads) {
  int64_t group = op.heads / op.key_heads, longest = 0, positions = 0, most = 0, num_rows = 0;
  for (const ForestGroup* g = op.groups; g < op.groups + op.num_groups; ++g) {
    most = std::max(most, g->last - g->first);
    num_rows = std::max(num_rows, g->last);
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    longest = std::max(longest, op.lengths[i]);
    positions += op.lengths[i];
  }
  threads = int(std::min<int64_t>(threads, 1 + 2 * positions * op.heads * op.size / kWork));
  int64_t rows = std::max<int64_t>(1, std::min({kQueries / group, kScores / longest / group, most}));
  int64_t fit = kScores / longest / group / rows, wanted = threads > 1 ? kTasks * threads : 1;
  int64_t enough = list_tasks(op, rows, op.key_heads, nullptr) * op.key_heads / wanted;
  int64_t heads = std::max<int64_t>(1, std::min({fit, enough, op.key_heads}));
  int64_t count = list_tasks(op, rows, heads, nullptr);
  Scratch<Task> tasks = scratch<Task>("forest_decode", count);
  list_tasks(op, rows, heads, tasks.get());
  threads = int(std::min<int64_t>(threads, count));
  OutOfMemory missing{};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::optional<Room> room;
    keep_failure(missing, [&] { room.emplace(op, rows * heads * group, longest); });
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i)
      if (room) with_type(op.dtype, [&](auto* type) { Decode<std::decay_t<decltype(*type)>>{op, *room, tasks[i]}.run(); });
  }
  throw_failure(missing);
}

}  // namespace fastalign::LEVEL
