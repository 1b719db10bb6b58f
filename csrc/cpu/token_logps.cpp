// Row statistics and their gradient, rows and slabs of columns over threads. Compiled once per instruction set.
#include "token_logps.h"

#include <type_traits>

#include "cpu/rows.h"
#include "cpu/typed.h"

namespace fastalign::LEVEL {
namespace {

template <class T, Form form, bool entropy, bool total>
void forward_rows(const TokenLogps& op, int threads) {
  int64_t slabs = num_slabs(op.vocabulary), items = op.rows * slabs;
  Scratch<Partial> partials = scratch<Partial>("token_logps", items);
  parallel_for(items, op.rows * op.vocabulary, threads, [&](int64_t item) {
    int64_t row = item / slabs, begin = item % slabs * kSlab;
    if (op.label(row) == kIgnored) return;
    Dropped exponentials;
    partials[item] = sweep<T, form, entropy, total>(at<const T>(op.logits, row, begin), op.logits.col_stride,
                                                    std::min(kSlab, op.vocabulary - begin), Transform<form>(op, row),
                                                    exponentials);
  });
  parallel_for(op.rows, items, threads, [&](int64_t row) { finish_row<T, form>(op, row, &partials[row * slabs]); });
}

// The kernel for the gradient's dtype, which is the logits' unless those are fp32.
template <class T, Form form>
Differentiate differentiator_of(const TokenLogps& op) {
  if constexpr (std::is_same_v<T, float>) {
    if (op.grad_dtype == Dtype::bfloat16) return differentiator<T, bfloat16, form>(op);
    if (op.grad_dtype == Dtype::float16) return differentiator<T, float16, form>(op);
  }
  return differentiator<T, T, form>(op);
}

template <class T, Form form>
void backward_rows(const TokenLogps& op, int threads) {
  int64_t slabs = num_slabs(op.vocabulary);
  Differentiate differentiate = differentiator_of<T, form>(op);
  parallel_for(op.rows * slabs, op.rows * op.vocabulary, threads, [&](int64_t item) {
    int64_t begin = item % slabs * kSlab;
    differentiate(op, item / slabs, begin, std::min(kSlab, op.vocabulary - begin));
  });
}

template <class T, Form form>
void run_form(const TokenLogps& op, bool backward, int threads) {
  if (backward) return backward_rows<T, form>(op, threads);
  if (op.entropy) return (op.total ? forward_rows<T, form, true, true> : forward_rows<T, form, true, false>)(op, threads);
  (op.total ? forward_rows<T, form, false, true> : forward_rows<T, form, false, false>)(op, threads);
}

template <class T>
void run_dtype(const TokenLogps& op, bool backward, int threads, T*) {
  if (op.softcap != 0) return run_form<T, Form::capped>(op, backward, threads);
  bool plain = !op.temperatures && op.temperature == 1 && op.logit_scale == 1;
  (plain ? run_form<T, Form::plain> : run_form<T, Form::scaled>)(op, backward, threads);
}

}  // namespace

void token_logps(const TokenLogps& op, bool backward, int threads) {
  with_type(op.dtype, [&](auto* type) { run_dtype(op, backward, threads, type); });
}

}  // namespace fastalign::LEVEL
