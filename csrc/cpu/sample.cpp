// Draws from rows of logits: the largest logit, exponentials by blocks, then the block and the column where the running
// sum passes the target. A row is one thread's. Compiled once per instruction set, whose exponentials differ by an ulp:
// then so may tokens whose noise falls on the boundary of two columns.
#include "sample.h"

#include <atomic>
#include <functional>

#include "cpu/rows.h"
#include "cpu/typed.h"

namespace fastalign::LEVEL {
namespace {

constexpr int64_t kBlock = 512;  // columns that are added in fp32
constexpr int64_t kStrip = 16;   // columns of which top-k knows the largest before it looks at each
constexpr float kSlack = 1 - 1e-5f;  // for bounds that must not lose a column to rounding

// What a thread works in: running sums by block; with truncation the exponentials, those that are kept, and candidates.
struct Room {
  Scratch<int64_t> running;
  Scratch<float> mass, kept;
  Scratch<uint64_t> candidates;

  explicit Room(const Sample& op) {
    int64_t vocabulary = op.rows.vocabulary, whole = op.truncates() ? vocabulary : 0;
    running = scratch<int64_t>("sample", (vocabulary + kBlock - 1) / kBlock);
    mass = scratch<float>("sample", std::max(whole, kBlock));
    kept = scratch<float>("sample", whole);
    candidates = scratch<uint64_t>("sample", whole);
  }
};

// Exponentials as integers.
struct FixedPoint {
  double unit;

  explicit FixedPoint(int64_t vocabulary) {
    int bits = 9;
    while ((int64_t(1) << bits) < vocabulary) ++bits;
    unit = ::ldexp(1.0, 62 - bits);
  }
  int64_t operator()(float x) const { return x >= 0 ? ::llrint(double(x) * unit) : 0; }
};

float largest(const float* x, int64_t n) {
  float top = x[0];
  for (int64_t i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// In one order for each length.
float added(const float* x, int64_t n) {
  vec sum[kAccumulators];
  for (vec& s : sum) s = set(0.0f);
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= n; i += kAccumulators * kLanes)
    for (int k = 0; k < kAccumulators; ++k) sum[k] = sum[k] + load(x + i + k * kLanes);
  for (int k = 0; i < n; i += kLanes, ++k) sum[k] = sum[k] + load(x + i, std::min<int64_t>(kLanes, n - i));
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One row of logits.
template <class T, Form form>
struct Row {
  const T* x;
  int64_t stride, vocabulary;
  Transform<form> transform;
  vec top;  // z of the largest logit

  Row(const TokenLogps& op, int64_t row)
      : x(at<const T>(op.logits, row)), stride(op.logits.col_stride), vocabulary(op.vocabulary), transform(op, row) {
    top = transform(set(largest_logit()));
  }
  // Columns v to v + n, n at most 512, side by side.
  FORCE_INLINE const T* columns(int64_t v, int64_t n, T* chunk) const {
    return stride == 1 ? x + v : gather(x + v * stride, stride, n, chunk);
  }
  float logit(int64_t v) const { return first(load(x + v * stride, 1)); }

  float largest_logit() const {
    vec most[kAccumulators];
    for (vec& m : most) m = set(-kInfinity);
    T chunk[kBlock];
    for (int64_t v = 0; v < vocabulary; v += kBlock) {
      int64_t n = std::min(kBlock, vocabulary - v), i = 0;
      const T* from = columns(v, n, chunk);
      for (; i + kAccumulators * kLanes <= n; i += kAccumulators * kLanes)
        for (int k = 0; k < kAccumulators; ++k) most[k] = max_(load(from + i + k * kLanes), most[k]);
      for (; i < n; i += kLanes) {
        int64_t left = std::min<int64_t>(kLanes, n - i);
        most[0] = max_(keep(load(from + i, left), left, -kInfinity), most[0]);
      }
    }
    return max_lane(max_(max_(most[0], most[1]), max_(most[2], most[3])));
  }
  void exponentials(int64_t v, int64_t n, float* out) const {
    T chunk[kBlock];
    const T* from = columns(v, n, chunk);
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kLanes <= n; i += kLanes) store(out + i, exponential(load(from + i)));
    if (i < n) store(out + i, exponential(load(from + i, n - i)), n - i);
  }
  FORCE_INLINE vec exponential(vec a) const { return exp_in_range(clamp_low(transform(a) - top)); }
};

// `f(v, n)` gives the sums of the columns of each block; returns the whole.
template <class F>
int64_t add_up(int64_t vocabulary, FixedPoint fixed, int64_t* running, F f) {
  int64_t sum = 0;
  for (int64_t v = 0; v < vocabulary; v += kBlock)
    running[v / kBlock] = sum += fixed(f(v, std::min(kBlock, vocabulary - v)));
  return sum;
}

// --- truncation: what is kept is the beginning of the order by falling logit and rising column

// A number that is smaller for columns that come earlier in that order.
uint64_t place(float logit, int64_t column) {
  uint32_t bits = to_bits(logit + 0.0f), rising = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return uint64_t(~rising) << 32 | uint64_t(column);
}

int64_t column_of(uint64_t place) { return int64_t(place & 0xffffffffu); }

// A bound that at least `top_k` columns reach: so many strips have one.
float reached_by(const float* mass, int64_t vocabulary, int64_t top_k, float* tops) {
  int64_t strips = (vocabulary + kStrip - 1) / kStrip;
  if (top_k > strips) return 0;
  for (int64_t s = 0; s < strips; ++s) tops[s] = largest(mass + s * kStrip, std::min(kStrip, vocabulary - s * kStrip));
  std::nth_element(tops, tops + top_k - 1, tops + strips, [](float a, float b) { return a > b; });
  return tops[top_k - 1] * kSlack;
}

// The places of the columns whose exponential reaches the bound.
template <class T, Form form>
int64_t collect(const Row<T, form>& row, const float* mass, float bound, uint64_t* places) {
  int64_t count = 0;
  for (int64_t v = 0; v < row.vocabulary; ++v)
    if (mass[v] >= bound) places[count++] = place(row.logit(v), v);
  return count;
}

// How many of the places, which are put in front, have less than `share` of mass before them.
int64_t nucleus(uint64_t* places, int64_t count, const float* mass, FixedPoint fixed, double share) {
  int64_t low = 0, high = count, before = 0;
  while (low < high) {
    int64_t middle = low + (high - low) / 2, sum = before;
    std::nth_element(places + low, places + middle, places + high);
    for (int64_t i = low; i < middle; ++i) sum += fixed(mass[column_of(places[i])]);
    if (double(sum) < share) before = sum + fixed(mass[column_of(places[middle])]), low = middle + 1;
    else high = middle;
  }
  return low;
}

// Fills `kept` with the exponentials of what is kept and zeros.
template <class T, Form form>
void truncate(const Sample& op, const Row<T, form>& row, FixedPoint fixed, int64_t total, Room& room) {
  float *mass = room.mass.get(), *kept = room.kept.get();
  uint64_t* places = room.candidates.get();
  int64_t count = -1;
  if (op.top_k > 0 && op.top_k < row.vocabulary) {
    count = collect(row, mass, reached_by(mass, row.vocabulary, op.top_k, kept), places);
    std::nth_element(places, places + op.top_k - 1, places + count);
    count = op.top_k;
    total = 0;
    for (int64_t i = 0; i < count; ++i) total += fixed(mass[column_of(places[i])]);
  }
  // A column of at most (1 - p) / V of the mass is behind p of it.
  double behind = op.top_p < 1 ? (1 - op.top_p) * double(total) / fixed.unit / double(row.vocabulary) * kSlack : 0;
  float bound = std::max(float(op.min_p), float(behind));
  if (count < 0) count = collect(row, mass, bound, places);
  else count = std::partition(places, places + count, [=](uint64_t p) { return mass[column_of(p)] >= bound; }) - places;
  if (op.top_p < 1) count = nucleus(places, count, mass, fixed, op.top_p * double(total));
  std::fill(kept, kept + row.vocabulary, 0.0f);
  for (int64_t i = 0; i < count; ++i) kept[column_of(places[i])] = mass[column_of(places[i])];
}

// --- the draw

// The column of a block of `n` exponentials in which the running sum passes the rest of the target.
int64_t search(const float* mass, int64_t n, FixedPoint fixed, int64_t rest) {
  int64_t sum = 0, last = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t q = fixed(mass[i]);
    if (q > 0) last = i;
    if ((sum += q) > rest) return i;
  }
  return last;  // the columns, rounded one by one, add up to less than their block
}

template <class T, Form form>
FORCE_INLINE void draw(const Sample& op, int64_t index, Room& room) {
  Row<T, form> row(op.rows, index);
  FixedPoint fixed(row.vocabulary);
  bool truncates = op.truncates();
  float *mass = room.mass.get(), *kept = room.kept.get();
  int64_t* running = room.running.get();
  int64_t total = add_up(row.vocabulary, fixed, running, [&](int64_t v, int64_t n) {
    float* out = truncates ? mass + v : mass;
    row.exponentials(v, n, out);
    return added(out, n);
  });
  op.kept[index] = 1;
  if (truncates && total > 0) {
    int64_t whole = total;
    truncate(op, row, fixed, whole, room);
    total = add_up(row.vocabulary, fixed, running, [&](int64_t v, int64_t n) { return added(kept + v, n); });
    op.kept[index] = double(total) / double(whole);
  }
  int64_t blocks = (row.vocabulary + kBlock - 1) / kBlock;
  int64_t target = std::min(int64_t(op.noise[index] * double(total)), total - 1);
  int64_t block = std::min(std::upper_bound(running, running + blocks, target) - running, blocks - 1);
  int64_t v = block * kBlock, n = std::min(kBlock, row.vocabulary - v), rest = target - (block ? running[block - 1] : 0);
  if (!truncates) row.exponentials(v, n, mass);
  op.tokens[index] = v + search(truncates ? kept + v : mass, n, fixed, rest);
}

template <class T, Form form>
void draw_rows(const Sample& op, int threads) {
  int64_t work = op.rows.rows * op.rows.vocabulary;
  threads = static_cast<int>(std::min<int64_t>({threads, op.rows.rows, 1 + work / kSlab}));
  std::atomic<int64_t> next{0};
  OutOfMemory missing{};
#pragma omp parallel num_threads(std::max(threads, 1)) if (threads > 1)
  keep_failure(missing, [&] {
    Room room(op);
    for (int64_t row; (row = next++) < op.rows.rows;) draw<T, form>(op, row, room);
  });
  throw_failure(missing);
}

template <class T>
void draw_dtype(const Sample& op, int threads, T*) {
  if (op.rows.softcap != 0) return draw_rows<T, Form::capped>(op, threads);
  bool plain = !op.rows.temperatures && op.rows.temperature == 1 && op.rows.logit_scale == 1;
  (plain ? draw_rows<T, Form::plain> : draw_rows<T, Form::scaled>)(op, threads);
}

}  // namespace

void sample(const Sample& op, int threads) {
  with_type(op.rows.dtype, [&](auto* type) { draw_dtype(op, threads, type); });
}

}  // namespace fastalign::LEVEL
