// Causal attention over a packed row, forward and backward, all calls in one; compiled once per instruction set.
//
// Queries come in blocks, whose scores against all keys that they see are kept at once: a row's maximum, sum and
// weights need no second look at the keys. Backward makes the scores again from the saved log-sum-exp. Everything is
// computed in fp32. The bits of a row depend on its own call alone, and not on the number of threads: a call's queries
// are cut where the call begins, and the gradients of one tree's keys are added by one thread, call after call.
#include "attention.h"

#include <optional>

#include "cpu/heads.h"
#include "cpu/scratch.h"
#include "cpu/tiles.h"

namespace fastalign::LEVEL {
namespace {

constexpr int64_t kBlock = 48, kLeastBlock = 24;  // queries at a time: multiples of kTileRows
constexpr int64_t kScores = 65536;                // scores of a block: what the second-level cache holds
constexpr int64_t kQueries = 192;                 // of one forward task, a multiple of kBlock

using Floats = Scratch<float>;

Floats floats(int64_t count) {
  count = (count + kLanes - 1) / kLanes * kLanes;
  Floats data = scratch<float>("attention", count);
  std::memset(data.get(), 0, count * sizeof(float));  // columns beyond the size of a head stay zero
  return data;
}

// out [rows, width] = factor * x[start : start + rows, head]
void read_rows(const Heads& x, int64_t start, int64_t rows, int64_t head, int64_t size, int64_t width, float factor,
               float* out) {
  with_type(x.dtype, [&](auto* type) {
    for (int64_t i = 0; i < rows; ++i, out += width) scaled(row_of(x, start + i, head, type), out, size, factor);
  });
}

// x[start + i, head] = factor(i) * from[i]
template <class Factor>
void write_rows(const Heads& x, int64_t start, int64_t rows, int64_t head, int64_t size, int64_t width, Factor factor,
                const float* from) {
  with_type(x.dtype, [&](auto* type) {
    for (int64_t i = 0; i < rows; ++i, from += width) scaled(from, row_of(x, start + i, head, type), size, factor(i));
  });
}

// The rows of `from` become columns of strips: [strip][size][kStrip].
void transpose(const float* from, int64_t rows, int64_t size, int64_t width, float* out) {
  for (int64_t i = 0; i < rows; ++i, from += width) {
    float* column = out + i / kStrip * kStrip * size + i % kStrip;
    for (int64_t j = 0; j < size; ++j) column[j * kStrip] = from[j];
  }
}

struct Task {
  int64_t index, head, first, last;  // of calls, or of trees; the head of its keys; queries of the call
  double cost;
};

// What one thread works in.
struct Room {
  const Attention& op;
  int64_t width, keys, columns;
  Floats k, v, k_columns, v_columns, q, scores, out, grad_out, grad_scores, grad_k, grad_v, slopes;

  Room(const Attention& op, int64_t longest, bool backward)
      : op(op), width(to_strips(op.size)), keys(longest), columns(to_strips(longest)),
        k(floats(keys * width)), v(floats(keys * width)), k_columns(floats(columns * op.size)),
        v_columns(floats(backward ? columns * op.size : 0)), q(floats(kBlock * width)),
        scores(floats(kBlock * columns)), out(floats(kBlock * width)), grad_out(floats(backward ? kBlock * width : 0)),
        grad_scores(floats(backward ? kBlock * columns : 0)), grad_k(floats(backward ? keys * width : 0)),
        grad_v(floats(backward ? keys * width : 0)), slopes(floats(op.softcap > 0 ? columns : 0)) {}

  void read_keys(const AttentionCall& call, int64_t head, bool backward) {
    int64_t n = 0;
    for (int64_t s = call.first; s < call.last; ++s) {
      int64_t start = op.spans[s].start, rows = op.spans[s].stop - start;
      read_rows(op.k, start, rows, head, op.size, width, 1, &k[n * width]);
      read_rows(op.v, start, rows, head, op.size, width, 1, &v[n * width]);
      n += rows;
    }
    transpose(k.get(), n, op.size, width, k_columns.get());
    if (backward) transpose(v.get(), n, op.size, width, v_columns.get());
  }

  Left rows_of(const Floats& x, int64_t row) const { return {x.get(), row, 1}; }
  Left columns_of(const Floats& x) const { return {x.get(), 1, columns}; }
  Right strips_of(const Floats& x) const { return {x.get(), kStrip, kStrip * op.size}; }
  Right wide(const Floats& x) const { return {x.get(), width, kStrip}; }
};

int64_t num_keys(const Attention& op, const AttentionCall& call) {
  int64_t n = 0;
  for (int64_t s = call.first; s < call.last; ++s) n += op.spans[s].stop - op.spans[s].start;
  return n;
}

int64_t block_rows(int64_t keys) {
  return std::max(kLeastBlock, std::min(kBlock, kScores / to_strips(keys) / kTileRows * kTileRows));
}

// Scores of the block's queries, each against the keys that the last of them sees.
void make_scores(Room& room, int64_t start, int64_t rows, int64_t head, int64_t seen) {
  const Attention& op = room.op;
  read_rows(op.q, start, rows, head, op.size, room.width, op.scale, room.q.get());
  product(rows, to_strips(seen), op.size, room.rows_of(room.q, room.width), room.strips_of(room.k_columns),
          room.scores.get(), room.columns, false);
}

void forward_task(Room& room, const Task& task) {
  const Attention& op = room.op;
  const AttentionCall& call = op.calls[task.index];
  int64_t keys = num_keys(op, call), before = keys - (call.stop - call.start), group = op.heads / op.key_heads;
  int64_t block = block_rows(keys);
  room.read_keys(call, task.head, false);
  for (int64_t head = task.head * group; head < (task.head + 1) * group; ++head)
    for (int64_t at = task.first; at < task.last; at += block) {
      int64_t rows = std::min(block, task.last - at), seen = before + at + rows;
      make_scores(room, call.start + at, rows, head, seen);
      float sums[kBlock];
      for (int64_t i = 0; i < rows; ++i) {
        float* row = &room.scores[i * room.columns];
        int64_t own = before + at + i + 1;
        if (op.softcap > 0) cap(row, own, op.softcap);
        float max = max_of(row, own);
        sums[i] = exponentials(row, own, to_strips(seen), max);
        op.lse[(call.start + at + i) * op.heads + head] = max + std::log(sums[i]);
      }
      product(rows, room.width, seen, room.rows_of(room.scores, room.columns), room.wide(room.v), room.out.get(),
              room.width, false);
      write_rows(op.out, call.start + at, rows, head, op.size, room.width, [&](int64_t i) { return 1 / sums[i]; },
                 room.out.get());
    }
}

// Weights p and the gradient dp of a row become ds = p (dp - sum p dp), times the scores' slopes where they are capped.
void differentiate_row(const float* p, float* dp, int64_t end, const float* slopes) {
  vec sum = set(0);
  for (int64_t j = 0; j < end; j += kLanes) sum = fma(load(p + j), load(dp + j), sum);
  vec delta = set(sum_lanes(sum));
  for (int64_t j = 0; j < end; j += kLanes) store(dp + j, load(p + j) * (load(dp + j) - delta));
  for (int64_t j = 0; slopes && j < end; j += kLanes) store(dp + j, load(dp + j) * load(slopes + j));
}

void backward_block(Room& room, int64_t head, int64_t start, int64_t rows, int64_t seen) {
  const Attention& op = room.op;
  int64_t end = to_strips(seen), width = room.width;
  make_scores(room, start, rows, head, seen);
  read_rows(op.grad_out, start, rows, head, op.size, width, 1, room.grad_out.get());
  product(rows, end, op.size, room.rows_of(room.grad_out, width), room.strips_of(room.v_columns),
          room.grad_scores.get(), room.columns, false);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = &room.scores[i * room.columns];
    int64_t own = seen - rows + i + 1;
    if (op.softcap > 0) cap(row, own, op.softcap, room.slopes.get());
    exponentials(row, own, end, op.lse[(start + i) * op.heads + head]);
    differentiate_row(row, &room.grad_scores[i * room.columns], end, op.softcap > 0 ? room.slopes.get() : nullptr);
  }
  product(seen, width, rows, room.columns_of(room.scores), room.wide(room.grad_out), room.grad_v.get(), width, true);
  product(seen, width, rows, room.columns_of(room.grad_scores), room.wide(room.q), room.grad_k.get(), width, true);
  product(rows, width, seen, room.rows_of(room.grad_scores, room.columns), room.wide(room.k), room.out.get(), width,
          false);
  write_rows(op.grad_q, start, rows, head, op.size, width, [&](int64_t) { return op.scale; }, room.out.get());
}

void add_rows(const Attention& op, const AttentionCall& call, int64_t head, const float* from, int64_t width,
              float* out) {
  for (int64_t s = call.first; s < call.last; ++s)
    for (int64_t row = op.spans[s].start; row < op.spans[s].stop; ++row, from += width) {
      float* to = out + (row * op.key_heads + head) * op.size;
      for (int64_t j = 0; j < op.size; ++j) to[j] += from[j];
    }
}

void backward_task(Room& room, const Task& task) {
  const Attention& op = room.op;
  int64_t group = op.heads / op.key_heads;
  for (int64_t c = op.trees[task.index]; c < op.trees[task.index + 1]; ++c) {
    const AttentionCall& call = op.calls[c];
    int64_t keys = num_keys(op, call), queries = call.stop - call.start, block = block_rows(keys);
    room.read_keys(call, task.head, true);
    std::memset(room.grad_k.get(), 0, keys * room.width * sizeof(float));
    std::memset(room.grad_v.get(), 0, keys * room.width * sizeof(float));
    for (int64_t head = task.head * group; head < (task.head + 1) * group; ++head)
      for (int64_t at = 0; at < queries; at += block) {
        int64_t rows = std::min(block, queries - at);
        backward_block(room, head, call.start + at, rows, keys - queries + at + rows);
      }
    add_rows(op, call, task.head, room.grad_k.get(), room.width, op.grad_k);
    add_rows(op, call, task.head, room.grad_v.get(), room.width, op.grad_v);
  }
}

double cost(const Attention& op, const AttentionCall& call, int64_t first, int64_t last) {
  double queries = double(last - first), before = double(num_keys(op, call) - (call.stop - call.start));
  return queries * (before + double(first + last) / 2);
}

// Of each call up to kQueries queries of one key head. Returns how many, and writes them where there is room.
int64_t forward_tasks(const Attention& op, Task* tasks) {
  int64_t count = 0;
  for (int64_t c = 0; c < op.num_calls; ++c) {
    int64_t queries = op.calls[c].stop - op.calls[c].start;
    for (int64_t first = 0; first < queries; first += kQueries)
      for (int64_t head = 0; head < op.key_heads; ++head, ++count) {
        int64_t last = std::min(queries, first + kQueries);
        if (tasks) tasks[count] = {c, head, first, last, cost(op, op.calls[c], first, last)};
      }
  }
  return count;
}

// Of each tree one key head.
int64_t backward_tasks(const Attention& op, Task* tasks) {
  for (int64_t t = 0; tasks && t < op.num_trees; ++t)
    for (int64_t head = 0; head < op.key_heads; ++head) {
      double sum = 0;
      for (int64_t c = op.trees[t]; c < op.trees[t + 1]; ++c)
        sum += cost(op, op.calls[c], 0, op.calls[c].stop - op.calls[c].start);
      *tasks++ = {t, head, 0, 0, sum};
    }
  return op.num_trees * op.key_heads;
}

}  // namespace

void attention(const Attention& op, bool backward, int threads) {
  auto* list_tasks = backward ? backward_tasks : forward_tasks;
  int64_t longest = 0, count = list_tasks(op, nullptr);
  Scratch<Task> tasks = scratch<Task>("attention", count);
  list_tasks(op, tasks.get());
  std::stable_sort(&tasks[0], &tasks[count], [](const Task& a, const Task& b) { return a.cost > b.cost; });
  for (int64_t c = 0; c < op.num_calls; ++c) longest = std::max(longest, num_keys(op, op.calls[c]));
  threads = int(std::min<int64_t>(threads, count));
  OutOfMemory missing{};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::optional<Room> room;
    keep_failure(missing, [&] { room.emplace(op, longest, backward); });
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i)
      if (room) (backward ? backward_task : forward_task)(*room, tasks[i]);
  }
  throw_failure(missing);
}

}  // namespace fastalign::LEVEL
