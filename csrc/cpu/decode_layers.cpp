// The layers of a transformer for one new token of each row: calls of the other kernels, one after the other, which few
// rows make worth less than the calls from Python would cost. Compiled once per instruction set.
#include "decode_layers.h"

#include "cpu/parallel.h"
#include "cpu/typed.h"
#include "kernels.h"

namespace fastalign::LEVEL {
namespace {

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Heads `first` and those behind it of some rows.
Heads heads_of(const Rows& x, int64_t first, int64_t size) {
  return {static_cast<char*>(x.data) + first * size * size_of(x.dtype), x.dtype, x.stride, size};
}

// out = a + b, where b may be one row for all: of stride 0.
void add(const Rows& a, const Rows& b, const Rows& out, int64_t rows, int64_t columns) {
  with_type(a.dtype, [&](auto* a_type) {
    with_type(b.dtype, [&](auto* b_type) {
      with_type(out.dtype, [&](auto* out_type) {
        for (int64_t row = 0; row < rows; ++row) {
          auto* x = static_cast<decltype(a_type)>(a.data) + row * a.stride;
          auto* y = static_cast<decltype(b_type)>(b.data) + row * b.stride;
          auto* to = static_cast<decltype(out_type)>(out.data) + row * out.stride;
          int64_t j = 0;
          for (; j + kLanes <= columns; j += kLanes) store(to + j, load(x + j) + load(y + j));
          if (int64_t n = columns - j) store(to + j, load(x + j, n) + load(y + j, n), n);
        }
      });
    });
  });
}

// One layer for all rows, in memory of its own.
struct Layer {
  const DecodeStep& step;
  int threads;
  int64_t rows, q, kv, inner;  // columns of q, of k or v, of the MLP
  Scratch<float> h_, qkv_, normed_, turned_, gate_, up_, wide_, inverse_;  // as wide as fp32

  Layer(const DecodeStep& step, const DecodeLayer& first, int threads)
      : step(step), threads(threads), rows(step.rows), q(step.attend.heads * step.attend.size),
        kv(step.attend.key_heads * step.attend.size), inner(first.gate.n), h_(room(step.columns)),
        qkv_(room(q + 2 * kv)), normed_(room(q + kv)), turned_(room(q + kv)), gate_(room(std::max(q, inner))), up_(room(inner)),
        wide_(room(std::max({q + 2 * kv, step.columns, inner}))), inverse_(room(1)) {}

  Scratch<float> room(int64_t columns) const { return scratch<float>("decode_layers", rows * columns); }

  void multiply(const Linear& by, const Rows& x, const Rows& out) const {
    Rows made = by.bias.data ? Rows{wide_.get(), Dtype::float32, by.n} : out;
    product({made.data, x.data, nullptr, by.packed, made.dtype, x.dtype, rows, by.n, by.k, made.stride, x.stride, 1, 0, 0,
             false}, threads);
    if (by.bias.data) add(made, by.bias, out, rows, by.n);
  }

  void normalise(const Norm& by, const Rows& x, const Rows& y, int64_t columns) const {
    kernels.rms_norm({x, y, by.weight, inverse_.get(), {}, {}, nullptr, rows, columns, by.eps}, false, threads);
  }

  // Heads `first` to `last` of qkv through their norm, each head's rows apart.
  void normalise_heads(const Norm& by, const Rows& qkv, const Rows& out, int64_t first, int64_t last) const {
    int64_t size = step.attend.size;
    for (int64_t head = first; head < last; ++head)
      normalise(by, {heads_of(qkv, head, size).data, qkv.dtype, qkv.stride},
                {heads_of(out, head, size).data, out.dtype, out.stride}, size);
  }

  void attend(const DecodeLayer& layer, const Rows& x, const Rows& out) const {
    ForestDecode op = step.attend;
    int64_t num_turned = op.heads + op.key_heads;
    Rows qkv{qkv_.get(), layer.dtype, q + 2 * kv}, normed{normed_.get(), layer.normed, q + kv};
    Rows turned{turned_.get(), layer.turned, q + kv};
    multiply(layer.qkv, x, qkv);
    if (layer.q_norm.weight.data) {
      normalise_heads(layer.q_norm, qkv, normed, 0, op.heads);
      normalise_heads(layer.k_norm, qkv, normed, op.heads, num_turned);
    }
    const Rows& from = layer.q_norm.weight.data ? normed : qkv;
    kernels.rotate({heads_of(from, 0, op.size), heads_of(turned, 0, op.size), step.cos, step.sin, rows, num_turned,
                    op.size}, false, threads);
    op.q = heads_of(turned, 0, op.size), op.k = heads_of(turned, op.heads, op.size);
    op.v = heads_of(qkv, num_turned, op.size), op.out = heads_of(out, 0, op.size);
    op.keys = layer.keys, op.values = layer.values;
    kernels.forest_decode(op, threads);
  }

  void run(const DecodeLayer& layer) const {
    Rows h{h_.get(), layer.dtype, step.columns}, gate{gate_.get(), layer.dtype, inner}, up{up_.get(), layer.dtype, inner};
    Rows mixed{gate_.get(), layer.dtype, q};  // the MLP's memory, which is free by then
    normalise(layer.first, step.x, h, step.columns);
    attend(layer, h, mixed);
    multiply(layer.o, mixed, h);
    add(step.x, h, step.x, rows, step.columns);
    normalise(layer.second, step.x, h, step.columns);
    multiply(layer.gate, h, gate);
    multiply(layer.up, h, up);
    kernels.silu_mul({gate, up, gate, {}, {}, {}, rows, inner}, false, threads);
    multiply(layer.down, gate, h);
    add(step.x, h, step.x, rows, step.columns);
  }
};

}  // namespace

void decode_layers(const DecodeStep& step, const DecodeLayer* layers, int64_t count, int threads) {
  if (!count) return;
  Layer layer(step, layers[0], threads);
  for (int64_t i = 0; i < count; ++i) layer.run(layers[i]);
}

}  // namespace fastalign::LEVEL
