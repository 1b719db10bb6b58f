// Layers between the products, forward and backward, each in one pass over its rows; compiled once per instruction set.
#include "layers.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/typed.h"

namespace fastalign::LEVEL {
namespace {

constexpr int64_t kRowsAtOnce = 64;  // of a sum over rows: its parts are added in order, whoever made them

// f(row) for all rows, in runs of kRowsAtOnce.
template <class F>
void for_rows(int64_t rows, int64_t columns, int threads, F f) {
  int64_t runs = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  parallel_for(runs, rows * columns, threads, [&](int64_t run) {
    int64_t last = std::min(rows, (run + 1) * kRowsAtOnce);
    for (int64_t row = run * kRowsAtOnce; row < last; ++row) f(run, row);
  });
}

// f(column, lanes) for the vectors of a row.
template <class F>
FORCE_INLINE void for_columns(int64_t columns, F f) {
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) f(j, int64_t(kLanes));
  if (j < columns) f(j, columns - j);
}

template <class T>
FORCE_INLINE vec get(const T* x, int64_t n) {
  return n == kLanes ? load(x) : load(x, n);
}

template <class T>
FORCE_INLINE void put(T* out, vec x, int64_t n) {
  if (n == kLanes) store(out, x);
  else store(out, x, n);
}

template <class T>
T* row_of(const Rows& x, int64_t row, T*) {
  return static_cast<T*>(x.data) + row * x.stride;
}

Scratch<float> widened(const Rows& x, int64_t columns) {
  Scratch<float> out = scratch<float>("rms_norm", columns);
  with_type(x.dtype, [&](auto* type) {
    for_columns(columns, [&](int64_t j, int64_t n) { put(&out[j], get(row_of(x, 0, type) + j, n), n); });
  });
  return out;
}

void norm_forward(const RmsNorm& op, int threads) {
  Scratch<float> weight = widened(op.weight, op.columns);
  with_type(op.x.dtype, [&](auto* x_type) {
    with_type(op.y.dtype, [&](auto* y_type) {
      for_rows(op.rows, op.columns, threads, [&](int64_t, int64_t row) {
        auto* x = row_of(op.x, row, x_type);
        auto* y = row_of(op.y, row, y_type);
        vec sum = set(0);
        for_columns(op.columns, [&](int64_t j, int64_t n) {
          vec value = get(x + j, n);
          sum = fma(value, value, sum);
        });
        float inverse = float(1 / std::sqrt(double(sum_lanes(sum)) / double(op.columns) + op.eps));
        op.inverse[row] = inverse;
        for_columns(op.columns, [&](int64_t j, int64_t n) {
          put(y + j, get(&weight[j], n) * (get(x + j, n) * set(inverse)), n);
        });
      });
    });
  });
}

// With n = x / rms and u = weight dy: dx = (u - n mean(u n)) / rms, d weight = sum over rows of dy n.
void norm_backward(const RmsNorm& op, int threads) {
  Scratch<float> weight = widened(op.weight, op.columns);
  int64_t runs = (op.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  Scratch<float> parts = scratch<float>("rms_norm", runs * op.columns);
  std::memset(parts.get(), 0, runs * op.columns * sizeof(float));
  with_type(op.x.dtype, [&](auto* x_type) {
    with_type(op.grad_y.dtype, [&](auto* y_type) {
      for_rows(op.rows, op.columns, threads, [&](int64_t run, int64_t row) {
        auto *x = row_of(op.x, row, x_type), *dx = row_of(op.grad_x, row, x_type);
        auto* dy = row_of(op.grad_y, row, y_type);
        float* part = &parts[run * op.columns];
        vec inverse = set(op.inverse[row]), sum = set(0);
        for_columns(op.columns, [&](int64_t j, int64_t n) {
          vec slope = get(dy + j, n), normal = get(x + j, n) * inverse;
          put(part + j, fma(slope, normal, get(part + j, n)), n);
          sum = fma(slope * get(&weight[j], n), normal, sum);
        });
        vec mean = set(sum_lanes(sum) / float(op.columns));
        for_columns(op.columns, [&](int64_t j, int64_t n) {
          vec normal = get(x + j, n) * inverse;
          put(dx + j, (get(dy + j, n) * get(&weight[j], n) - normal * mean) * inverse, n);
        });
      });
    });
  });
  std::fill(op.grad_weight, op.grad_weight + op.columns, 0.0f);
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t j = 0; j < op.columns; ++j) op.grad_weight[j] += parts[run * op.columns + j];
}

// s(x) = 1 / (1 + exp(-x))
FORCE_INLINE vec sigmoid(vec x) {
  return set(1) / (set(1) + exp_in_range(min_(set(88), clamp_low(set(0) - x))));
}

void silu_forward(const SiluMul& op, int threads) {
  with_type(op.y.dtype, [&](auto* type) {
    for_rows(op.rows, op.columns, threads, [&](int64_t, int64_t row) {
      auto *gate = row_of(op.gate, row, type), *up = row_of(op.up, row, type), *y = row_of(op.y, row, type);
      for_columns(op.columns, [&](int64_t j, int64_t n) {
        vec x = get(gate + j, n);
        put(y + j, x * sigmoid(x) * get(up + j, n), n);
      });
    });
  });
}

void silu_backward(const SiluMul& op, int threads) {
  with_type(op.grad_y.dtype, [&](auto* type) {
    for_rows(op.rows, op.columns, threads, [&](int64_t, int64_t row) {
      auto *gate = row_of(op.gate, row, type), *up = row_of(op.up, row, type), *dy = row_of(op.grad_y, row, type);
      auto *d_gate = row_of(op.grad_gate, row, type), *d_up = row_of(op.grad_up, row, type);
      auto* y = op.y.data ? row_of(op.y, row, type) : nullptr;
      for_columns(op.columns, [&](int64_t j, int64_t n) {
        vec x = get(gate + j, n), s = sigmoid(x), slope = get(dy + j, n), other = get(up + j, n);
        put(d_up + j, slope * x * s, n);
        put(d_gate + j, slope * other * s * fma(x, set(1) - s, set(1)), n);
        if (y) put(y + j, x * s * other, n);
      });
    });
  });
}

template <class X, class Y, class Angle>
FORCE_INLINE void turn(const X* x, Y* y, const Angle* cos, const Angle* sin, int64_t half, bool adjoint) {
  for_columns(half, [&](int64_t j, int64_t n) {
    vec low = get(x + j, n), high = get(x + half + j, n);
    vec low_sin = get(sin + j, n), high_sin = get(sin + half + j, n);
    vec across = adjoint ? high * high_sin : set(0) - high * low_sin;
    vec back = adjoint ? set(0) - low * low_sin : low * high_sin;
    put(y + j, fma(low, get(cos + j, n), across), n);
    put(y + half + j, fma(high, get(cos + half + j, n), back), n);
  });
}

template <class T>
T* head_of(const Heads& x, int64_t row, int64_t head, T*) {
  return static_cast<T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

}  // namespace

void rotate(const Rotation& op, bool adjoint, int threads) {
  const Heads &from = adjoint ? op.y : op.x, &to = adjoint ? op.x : op.y;
  with_type(from.dtype, [&](auto* from_type) {
    with_type(to.dtype, [&](auto* to_type) {
      with_type(op.cos.dtype, [&](auto* angle) {
        for_rows(op.rows, op.heads * op.size, threads, [&](int64_t, int64_t row) {
          auto *cos = row_of(op.cos, row, angle), *sin = row_of(op.sin, row, angle);
          for (int64_t head = 0; head < op.heads; ++head)
            turn(head_of(from, row, head, from_type), head_of(to, row, head, to_type), cos, sin, op.size / 2, adjoint);
        });
      });
    });
  });
}

void rms_norm(const RmsNorm& op, bool backward, int threads) { (backward ? norm_backward : norm_forward)(op, threads); }

void silu_mul(const SiluMul& op, bool backward, int threads) {
  (backward ? silu_backward : silu_forward)(op, threads);
}

}  // namespace fastalign::LEVEL
