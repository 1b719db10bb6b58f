// Token losses and their gradient in one read of the logits: while a row is swept its exponentials are kept, so that the
// gradient is one multiplication away once the row's coefficient is known. Compiled once per instruction set.
#include "policy_loss.h"

#include "cpu/functors.h"
#include "cpu/rows.h"
#include "cpu/typed.h"

namespace fastalign::LEVEL {
namespace {

constexpr int64_t kWidth = kGroup * kLanes;  // columns folded together
static_assert(kChunk % kWidth == 0 && kSlab % kChunk == 0);

// The exponentials of a slab, each relative to the running maximum at its time: a run of groups shares one base. Before
// the first finite logit there is nothing but zeros, whose base may be anything.
struct Kept {
  float base[kSlab / kWidth + 1];
  int first_group[kSlab / kWidth + 1];
  int runs, group;
  float exponentials[kSlab];

  void start() {
    base[0] = -kInfinity;
    first_group[0] = group = 0;
    runs = 1;
  }
  FORCE_INLINE void rebase(float max) {
    base[runs] = max;
    first_group[runs++] = group;
  }
  FORCE_INLINE void put(int j, vec e) { store(exponentials + group * kWidth + j * kLanes, e); }
  FORCE_INLINE void next() { ++group; }
};

struct Slab {
  Partial partial;
  Kept kept;
};

template <class T, Form form, bool entropy>
struct Row {
  const PolicyLoss& op;
  const TokenLogps& rows;
  int64_t row, slabs;

  Row(const PolicyLoss& op, int64_t row) : op(op), rows(op.rows), row(row), slabs(num_slabs(op.rows.vocabulary)) {}

  bool differentiable() const { return rows.grad.data; }
  // An entropy gradient and a softcap need the logits again: they come from the cache.
  bool keeps() const {
    return form != Form::capped && op.entropy_coef == 0 && differentiable();
  }
  int64_t width(int64_t slab) const { return std::min(kSlab, rows.vocabulary - slab * kSlab); }

  void read(int64_t slab, Slab& to) const {
    if (rows.label(row) == kIgnored) return;
    const T* x = at<const T>(rows.logits, row, slab * kSlab);
    Transform<form> transform(rows, row);
    int64_t stride = rows.logits.col_stride, n = width(slab);
    if (keeps()) {
      to.kept.start();
      to.partial = sweep<T, form, entropy, false>(x, stride, n, transform, to.kept);
    } else {
      Dropped exponentials;
      to.partial = sweep<T, form, entropy, false>(x, stride, n, transform, exponentials);
    }
  }

  void decide(const Slab* read) const {
    Scratch<Partial> partials = scratch<Partial>("policy_loss", slabs);
    for (int64_t k = 0; k < slabs; ++k) partials[k] = read[k].partial;
    finish_row<T, form>(rows, row, partials.get());
    Policy{op}.finish(row);
  }

  void write(int64_t slab, const Slab& read) const {
    int64_t begin = slab * kSlab, n = width(slab), label = rows.label(row);
    const RowGradient<form, false, false> gradient(rows, row);
    if (label == kIgnored || gradient.zero() || label < 0 || label >= rows.vocabulary || !keeps())
      return differentiator<T, T, form>(rows)(rows, row, begin, n);
    T* out = at<T>(rows.grad, row, begin);
    bool labelled = label >= begin && label < begin + n;
    vec at_label = labelled ? load(at<const T>(rows.logits, row, label), 1) : set(0.0f);  // before it is overwritten
    for (int run = 0; run < read.kept.runs; ++run) {
      int64_t from = read.kept.first_group[run] * kWidth;
      int64_t to = run + 1 < read.kept.runs ? read.kept.first_group[run + 1] * kWidth : n;
      double share = ::exp((double(read.kept.base[run]) - gradient.max) - gradient.logsum);
      scale_run(read.kept.exponentials, from, to, set(float(share)) * gradient.factor, out);
    }
    if (labelled) store(out + (label - begin) * rows.grad.col_stride, set(gradient.at_label(at_label)), 1);
  }

  void scale_run(const float* x, int64_t from, int64_t to, vec factor, T* out) const {
    int64_t stride = rows.grad.col_stride;
    if (stride == 1) return scale_columns(x + from, factor, out + from, to - from);
    T chunk[kChunk];
    for (int64_t v = from; v < to; v += kChunk) {
      int64_t n = std::min(kChunk, to - v);
      scale_columns(x + v, factor, chunk, n);
      for (int64_t i = 0; i < n; ++i) out[(v + i) * stride] = chunk[i];
    }
  }

  static FORCE_INLINE void scale_columns(const float* x, vec factor, T* out, int64_t n) {
    int64_t v = 0;
    for (; v + kWidth <= n; v += kWidth) {
      const char* ahead = reinterpret_cast<const char*>(out + v) + kAhead;
      for (size_t line = 0; line < kWidth * sizeof(T); line += 64) __builtin_prefetch(ahead + line, 1);
#pragma GCC unroll 8
      for (int j = 0; j < kGroup; ++j) store(out + v + j * kLanes, load(x + v + j * kLanes) * factor);
    }
    for (; v + kLanes <= n; v += kLanes) store(out + v, load(x + v) * factor);
    if (v < n) store(out + v, load(x + v, n - v) * factor, n - v);
  }
};

// A row from its logits to their gradient in one go; where there are fewer rows than threads, threads share rows.
template <class T, Form form, bool entropy>
void run_rows(const PolicyLoss& op, int threads) {
  using PolicyRow = Row<T, form, entropy>;
  int64_t slabs = num_slabs(op.rows.vocabulary), rows = op.rows.rows, elements = rows * op.rows.vocabulary;
  if (rows >= threads) {
    return parallel_for(rows, elements, threads, [&](int64_t i) {
      PolicyRow row(op, i);
      Scratch<Slab> read = scratch<Slab>("policy_loss", slabs);
      for (int64_t k = 0; k < slabs; ++k) row.read(k, read[k]);
      row.decide(read.get());
      for (int64_t k = 0; k < slabs && row.differentiable(); ++k) row.write(k, read[k]);
    });
  }
  Scratch<Slab> read = scratch<Slab>("policy_loss", rows * slabs);
  parallel_for(rows * slabs, elements, threads, [&](int64_t i) { PolicyRow(op, i / slabs).read(i % slabs, read[i]); });
  for (int64_t i = 0; i < rows; ++i) PolicyRow(op, i).decide(&read[i * slabs]);
  if (op.rows.grad.data)
    parallel_for(rows * slabs, elements, threads,
                 [&](int64_t i) { PolicyRow(op, i / slabs).write(i % slabs, read[i]); });
}

template <class T, Form form>
void run_form(const PolicyLoss& op, int threads) {
  (op.rows.entropy ? run_rows<T, form, true> : run_rows<T, form, false>)(op, threads);
}

template <class T>
void run_dtype(const PolicyLoss& op, int threads, T*) {
  if (op.rows.softcap != 0) return run_form<T, Form::capped>(op, threads);
  bool plain = !op.rows.temperatures && op.rows.temperature == 1 && op.rows.logit_scale == 1;
  (plain ? run_form<T, Form::plain> : run_form<T, Form::scaled>)(op, threads);
}

}  // namespace

void policy_loss(const PolicyLoss& op, int threads) {
  with_type(op.rows.dtype, [&](auto* type) { run_dtype(op, threads, type); });
}

}  // namespace fastalign::LEVEL
