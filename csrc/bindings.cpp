// The Python face of the native kernels: addresses and sizes in, nothing about torch. fastalign.ops.backends.cpp checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu_level.h"
#include "out_of_memory.h"
#include "product.h"
#include "scan.h"
#include "short_waits.h"

namespace py = pybind11;
using namespace fastalign;

#if defined(FASTALIGN_CUDA)
void bind_cuda(py::module_& m);  // in cuda/bindings.cpp
#endif

namespace {

// Of what is bound below: raised with every change to it, and with it ABI in fastalign/ops/backends/cpp/__init__.py.
constexpr int kAbi = 5;

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

void advise_fresh_gradient(const TokenLogps& op) {
  bool in_place = op.grad.data == op.logits.data, contiguous = op.grad.row_stride == op.vocabulary;
  if (op.grad.data && !in_place && contiguous)
    advise_huge_pages(op.grad.data, op.rows * op.vocabulary * size_of(op.grad_dtype));
}

// A dtype that is computed in fp32; any other would be read as one of them.
Dtype computed_in_fp32(int dtype) {
  if (dtype != static_cast<int>(Dtype::float32) && dtype != static_cast<int>(Dtype::bfloat16) &&
      dtype != static_cast<int>(Dtype::float16))
    throw std::invalid_argument("expected fp32, bf16 or fp16 (dtype 0, 1 or 2), got dtype " + std::to_string(dtype));
  return static_cast<Dtype>(dtype);
}

// Logits that the CPU's kernels read: what is described may also be for CUDA, which has fp64.
void check(const TokenLogps& op) {
  computed_in_fp32(static_cast<int>(op.dtype));
  computed_in_fp32(static_cast<int>(op.grad_dtype));
  if (op.grad_dtype != op.dtype && op.dtype != Dtype::float32)
    throw std::invalid_argument("expected a gradient in the dtype of the logits, or of fp32 logits in bf16 or fp16");
}

void run_token_logps(const TokenLogps& op, bool backward, int threads) {
  check(op);
  if (backward) advise_fresh_gradient(op);
  kernels().token_logps(op, backward, threads);
}

void run_policy_loss(const PolicyLoss& op, int threads) {
  check(op.rows);
  advise_fresh_gradient(op.rows);
  kernels().policy_loss(op, threads);
}

void run_divergence(const Divergence& op, Walk walk, int threads) {
  check(op.policy);
  check(op.reference);
  if (walk == Walk::backward) advise_fresh_gradient(op.policy);
  kernels().divergence(op, walk, threads);
}

using Address = uintptr_t;  // 0: not given
using MatrixArgument = std::tuple<Address, int64_t, int64_t>;  // address, row stride, column stride

template <class T = void>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

Matrix matrix(const MatrixArgument& m) { return {pointer(std::get<0>(m)), std::get<1>(m), std::get<2>(m)}; }

TokenLogps describe(const MatrixArgument& logits, int dtype, int64_t rows, int64_t vocabulary, Address labels,
                    bool labels_are_int64, Address temperatures, double temperature, double softcap,
                    double logit_scale, Address logps, Address entropy, Address max, Address logsum, Address total,
                    Address top1, Address g, Address alpha, Address beta, Address delta, const MatrixArgument& grad,
                    int grad_dtype) {
  return {matrix(logits),    static_cast<Dtype>(dtype), rows,  vocabulary,  pointer(labels), labels_are_int64,
          pointer<double>(temperatures), temperature,   logit_scale, softcap, pointer(logps), pointer(entropy),
          pointer(max),      pointer(logsum), pointer(total), pointer(top1), pointer(g), pointer(alpha), pointer(beta),
          pointer(delta), matrix(grad), static_cast<Dtype>(grad_dtype < 0 ? dtype : grad_dtype)};
}

PolicyLoss describe_policy(const TokenLogps& rows, int surrogate, bool k2, Address table, Address weights,
                           Address advantages, Address old_logps, Address ref_logps, double ratio_low,
                           double ratio_high, double ratio_cap, double tau_pos, double tau_neg, double kl_coef,
                           double entropy_coef) {
  return {rows,      static_cast<Surrogate>(surrogate), k2, pointer(table), pointer(weights), pointer(advantages),
          pointer(old_logps), pointer(ref_logps), ratio_low, ratio_high, ratio_cap, tau_pos, tau_neg, kl_coef,
          entropy_coef};
}

Divergence describe_divergence(const TokenLogps& policy, const TokenLogps& reference, int kind, double mix,
                               Address value, Address stats, Address grad_value, bool apart) {
  return {policy, reference, static_cast<Kind>(kind), mix, pointer(value), pointer(stats), pointer(grad_value), apart};
}

void run_sample(const TokenLogps& rows, Address noise, Address tokens, Address kept, int64_t top_k, double top_p,
                double min_p, int threads) {
  check(rows);
  kernels().sample({rows, pointer<double>(noise), pointer<int64_t>(tokens), pointer<double>(kept), top_k, top_p, min_p},
                   threads);
}

using RowsArgument = std::tuple<Address, int, int64_t>;  // address, dtype, row stride
using Shape = std::tuple<int64_t, int64_t, int64_t>;

Product describe_product(const RowsArgument& out, const MatrixArgument& a, const MatrixArgument& b, int dtype,
                         const Shape& shape, bool accumulate, Address packed) {
  for (int each : {dtype, std::get<1>(out)})
    if (each != int(Dtype::float32) && each != int(Dtype::bfloat16)) throw std::invalid_argument("expected fp32 or bf16");
  Matrix left = matrix(a), right = matrix(b);
  return {pointer(std::get<0>(out)), left.data, right.data, pointer(packed), Dtype(std::get<1>(out)), Dtype(dtype),
          std::get<0>(shape), std::get<1>(shape), std::get<2>(shape), std::get<2>(out), left.row_stride,
          left.col_stride, right.row_stride, right.col_stride, accumulate};
}

void run_product(const RowsArgument& out, const MatrixArgument& a, const MatrixArgument& b, int dtype,
                 const Shape& shape, bool accumulate, Address packed, int threads) {
  product(describe_product(out, a, b, dtype, shape, accumulate, packed), threads);
}

int64_t packed_bytes_of(int64_t n, int64_t k, int dtype) { return packed_bytes(n, k, computed_in_fp32(dtype)); }

void run_pack_product(const MatrixArgument& b, int dtype, const Shape& shape, Address out, int threads) {
  pack_product(describe_product({0, dtype, 0}, {}, b, dtype, shape, false, 0), pointer(out), threads);
}

using HeadsArgument = std::tuple<Address, int, int64_t, int64_t>;  // address, dtype, row stride, head stride

Heads heads(const HeadsArgument& x) {
  return {pointer(std::get<0>(x)), computed_in_fp32(std::get<1>(x)), std::get<2>(x), std::get<3>(x)};
}

void run_attention(const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& out,
                   Address lse, const HeadsArgument& grad_out, const HeadsArgument& grad_q, Address grad_k,
                   Address grad_v, const std::tuple<int64_t, int64_t, int64_t>& shape, double scale, double softcap,
                   Address calls, int64_t num_calls, Address spans, Address trees, int64_t num_trees, int threads) {
  Attention op{heads(q), heads(k), heads(v), heads(out), pointer<float>(lse), heads(grad_out), heads(grad_q),
               pointer<float>(grad_k), pointer<float>(grad_v), std::get<0>(shape), std::get<1>(shape),
               std::get<2>(shape), static_cast<float>(scale), static_cast<float>(softcap),
               pointer<AttentionCall>(calls), num_calls, pointer<Span>(spans), pointer<int64_t>(trees), num_trees};
  kernels().attention(op, grad_k != 0, threads);
}

void run_forest_decode(const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v,
                       const HeadsArgument& out, Address keys, Address values, int dtype,
                       const std::tuple<int64_t, int64_t, int64_t>& shape, double scale, double softcap,
                       Address chains, int64_t width, Address lengths, Address order, Address groups,
                       int64_t num_groups, int threads) {
  kernels().forest_decode({heads(q), heads(k), heads(v), heads(out), pointer(keys), pointer(values),
                           computed_in_fp32(dtype), std::get<0>(shape), std::get<1>(shape), std::get<2>(shape),
                           static_cast<float>(scale), static_cast<float>(softcap), pointer<int32_t>(chains), width,
                           pointer<int64_t>(lengths), pointer<int64_t>(order), pointer<ForestGroup>(groups),
                           num_groups}, threads);
}

Rows rows_of(const RowsArgument& x) {
  return {pointer(std::get<0>(x)), computed_in_fp32(std::get<1>(x)), std::get<2>(x)};
}

void run_rms_norm(const RowsArgument& x, const RowsArgument& y, const RowsArgument& weight, Address inverse,
                  const RowsArgument& grad_y, const RowsArgument& grad_x, Address grad_weight, int64_t rows,
                  int64_t columns, double eps, int threads) {
  kernels().rms_norm({rows_of(x), rows_of(y), rows_of(weight), pointer<float>(inverse), rows_of(grad_y),
                      rows_of(grad_x), pointer<float>(grad_weight), rows, columns, eps}, grad_weight != 0, threads);
}

void run_silu_mul(const RowsArgument& gate, const RowsArgument& up, const RowsArgument& y, const RowsArgument& grad_y,
                  const RowsArgument& grad_gate, const RowsArgument& grad_up, int64_t rows, int64_t columns,
                  int threads) {
  kernels().silu_mul({rows_of(gate), rows_of(up), rows_of(y), rows_of(grad_y), rows_of(grad_gate), rows_of(grad_up),
                      rows, columns}, std::get<0>(grad_y) != 0, threads);
}

void run_rotate(const HeadsArgument& x, const HeadsArgument& y, const RowsArgument& cos, const RowsArgument& sin,
                const std::tuple<int64_t, int64_t, int64_t>& shape, bool adjoint, int threads) {
  kernels().rotate({heads(x), heads(y), rows_of(cos), rows_of(sin), std::get<0>(shape), std::get<1>(shape),
                    std::get<2>(shape)}, adjoint, threads);
}

using LinearArgument = std::tuple<Address, RowsArgument, int64_t, int64_t>;  // packed, bias, n, k
using NormArgument = std::tuple<RowsArgument, double>;                       // weight, eps

Linear linear(const LinearArgument& x) {
  return {pointer(std::get<0>(x)), rows_of(std::get<1>(x)), std::get<2>(x), std::get<3>(x)};
}

Norm norm(const NormArgument& x) { return {rows_of(std::get<0>(x)), std::get<1>(x)}; }

DecodeLayer describe_layer(const std::array<NormArgument, 4>& norms, const std::array<LinearArgument, 5>& linears,
                           const std::array<int, 3>& dtypes) {
  return {norm(norms[0]), norm(norms[1]), norm(norms[2]), norm(norms[3]), linear(linears[0]), linear(linears[1]),
          linear(linears[2]), linear(linears[3]), linear(linears[4]), computed_in_fp32(dtypes[0]),
          computed_in_fp32(dtypes[1]), computed_in_fp32(dtypes[2]), nullptr, nullptr};
}

void run_decode_layers(std::vector<DecodeLayer> layers, const RowsArgument& x, const RowsArgument& cos,
                       const RowsArgument& sin, int64_t rows, int64_t columns, const std::vector<Address>& keys,
                       const std::vector<Address>& values, int dtype, const Shape& shape, double scale, Address chains,
                       int64_t width, Address lengths, Address order, Address groups, int64_t num_groups, int threads) {
  for (size_t i = 0; i < layers.size(); ++i)
    layers[i].keys = pointer(keys.at(i)), layers[i].values = pointer(values.at(i));
  ForestDecode attend{{}, {}, {}, {}, nullptr, nullptr, computed_in_fp32(dtype), std::get<0>(shape), std::get<1>(shape),
                      std::get<2>(shape), static_cast<float>(scale), 0.0f, pointer<int32_t>(chains), width,
                      pointer<int64_t>(lengths), pointer<int64_t>(order), pointer<ForestGroup>(groups), num_groups};
  kernels().decode_layers({rows_of(x), rows_of(cos), rows_of(sin), rows, columns, attend}, layers.data(),
                          int64_t(layers.size()), threads);
}

void translate(std::exception_ptr raised) {
  try {
    std::rethrow_exception(raised);
  } catch (const OutOfMemory& missing) {
    PyErr_Format(PyExc_MemoryError, "%s: no memory for %lld bytes to work in", missing.op,
                 static_cast<long long>(missing.bytes));
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastalign over addresses; fastalign.ops.backends.cpp is their checked face.";
  m.attr("abi") = kAbi;
  py::register_exception_translator(&translate);
  m.def("cpu_level", [] { return name(cpu_level()); }, "The instruction set in use: avx512, avx2 or scalar.");
  m.def("set_cpu_level", [](const std::string& level) { cpu_level() = level_named(level); },
        "Use a lower instruction set from now on; not while a kernel runs.");

  py::class_<TokenLogps>(m, "TokenLogps", "The arguments of token_logps; dtype 0..3: float32, bfloat16, float16, float64.")
      .def(py::init(&describe), py::arg("logits"), py::arg("dtype"), py::arg("rows"), py::arg("vocabulary"),
           py::arg("labels"), py::arg("labels_are_int64"), py::arg("temperatures") = 0, py::arg("temperature") = 1.0,
           py::arg("softcap") = 0.0, py::arg("logit_scale") = 1.0, py::arg("logps") = 0, py::arg("entropy") = 0,
           py::arg("max") = 0, py::arg("logsum") = 0, py::arg("total") = 0, py::arg("top1") = 0, py::arg("g") = 0,
           py::arg("alpha") = 0, py::arg("beta") = 0, py::arg("delta") = 0, py::arg("grad") = MatrixArgument{},
           py::arg("grad_dtype") = -1)
      .def("forward", [](const TokenLogps& op, int threads) { run_token_logps(op, false, threads); },
           py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("backward", [](const TokenLogps& op, int threads) { run_token_logps(op, true, threads); },
           py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("address", [](const TokenLogps& op) { return reinterpret_cast<Address>(&op); });
  m.def(
      "segment_scan",
      [](Address x, Address decays, double decay, Address out, bool float64, bool reverse, Address offsets,
         int64_t segments, int threads) {
        segment_scan({pointer(x), pointer(decays), decay, pointer(out), float64, reverse,
                      {pointer<int64_t>(offsets), segments}}, threads);
      },
      py::kw_only(), py::arg("x"), py::arg("decays"), py::arg("decay"), py::arg("out"), py::arg("float64"),
      py::arg("reverse"), py::arg("offsets"), py::arg("segments"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>(), "Discounted sums over the rest of each segment, or their adjoint.");
  m.def("sample", &run_sample, py::kw_only(), py::arg("rows"), py::arg("noise"), py::arg("tokens"), py::arg("kept"),
        py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "Draws of tokens by inverse CDF.");
  m.def("has_product", [] { return cpu_level() == Level::avx512 && has_product(); },
        "Whether product serves this processor at the instruction set in use.");
  m.def("product", &run_product, py::kw_only(), py::arg("out"), py::arg("a"), py::arg("b"), py::arg("dtype"),
        py::arg("shape"), py::arg("accumulate"), py::arg("packed") = 0, py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "A product of fp32 or bf16 matrices into, or added to, another.");
  m.def("packed_bytes", &packed_bytes_of, py::arg("n"), py::arg("k"), py::arg("dtype"), "What pack_product fills.");
  m.def("pack_product", &run_pack_product, py::kw_only(), py::arg("b"), py::arg("dtype"), py::arg("shape"),
        py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "The right side of products, in the order in which they read it.");
  const HeadsArgument no_heads{};
  m.def("attention", &run_attention, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out") = no_heads,
        py::arg("lse"), py::arg("grad_out") = no_heads, py::arg("grad_q") = no_heads, py::arg("grad_k") = 0,
        py::arg("grad_v") = 0, py::arg("shape"), py::arg("scale"), py::arg("softcap") = 0.0, py::arg("calls"),
        py::arg("num_calls"), py::arg("spans"), py::arg("trees"), py::arg("num_trees"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Causal attention over a packed row, or, with grad_k, its gradients.");
  m.def("forest_decode", &run_forest_decode, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
        py::arg("keys"), py::arg("values"), py::arg("dtype"), py::arg("shape"), py::arg("scale"),
        py::arg("softcap") = 0.0, py::arg("chains"), py::arg("width"), py::arg("lengths"), py::arg("order"), py::arg("groups"),
        py::arg("num_groups"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "Write one new token's key and value of each row, and attend to its whole sequence.");
  const RowsArgument no_rows{};
  m.def("rms_norm", &run_rms_norm, py::kw_only(), py::arg("x"), py::arg("y") = no_rows, py::arg("weight"),
        py::arg("inverse"), py::arg("grad_y") = no_rows, py::arg("grad_x") = no_rows, py::arg("grad_weight") = 0,
        py::arg("rows"), py::arg("columns"), py::arg("eps"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "RMS norm of rows, or, with grad_weight, its gradients.");
  m.def("silu_mul", &run_silu_mul, py::kw_only(), py::arg("gate"), py::arg("up"), py::arg("y") = no_rows,
        py::arg("grad_y") = no_rows, py::arg("grad_gate") = no_rows, py::arg("grad_up") = no_rows, py::arg("rows"),
        py::arg("columns"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "silu(gate) up, or, with grad_y, its gradients.");
  m.def("rotate", &run_rotate, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("cos"), py::arg("sin"),
        py::arg("shape"), py::arg("adjoint"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "Rotary position embedding, x to y, or its adjoint, y to x.");
  py::class_<DecodeLayer>(m, "DecodeLayer", "The weights of a layer of decode_layers, packed for products.")
      .def(py::init(&describe_layer), py::kw_only(), py::arg("norms"), py::arg("linears"), py::arg("dtypes"));
  m.def("decode_layers", &run_decode_layers, py::kw_only(), py::arg("layers"), py::arg("x"), py::arg("cos"),
        py::arg("sin"), py::arg("rows"), py::arg("columns"), py::arg("keys"), py::arg("values"), py::arg("dtype"),
        py::arg("shape"), py::arg("scale"), py::arg("chains"), py::arg("width"), py::arg("lengths"), py::arg("order"),
        py::arg("groups"), py::arg("num_groups"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "All layers of a transformer for one new token of each row, in place.");
  m.def(
      "gae",
      [](Address rewards, Address values, Address last_values, double gamma, double lam, Address advantages,
         Address returns, bool float64, Address offsets, int64_t segments, int threads) {
        gae({pointer(rewards), pointer(values), pointer(last_values), gamma, lam, pointer(advantages),
             pointer(returns), float64, {pointer<int64_t>(offsets), segments}}, threads);
      },
      py::kw_only(), py::arg("rewards"), py::arg("values"), py::arg("last_values"), py::arg("gamma"), py::arg("lam"),
      py::arg("advantages"), py::arg("returns"), py::arg("float64"), py::arg("offsets"), py::arg("segments"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "Advantages and returns of each segment.");
  py::class_<PolicyLoss>(m, "PolicyLoss", "The arguments of policy_loss; surrogate 0..3: pg, ppo, cispo, sapo.")
      .def(py::init(&describe_policy), py::kw_only(), py::arg("rows"), py::arg("surrogate"), py::arg("k2"),
           py::arg("table"), py::arg("weights"), py::arg("advantages") = 0, py::arg("old_logps") = 0,
           py::arg("ref_logps") = 0, py::arg("ratio_low"), py::arg("ratio_high"), py::arg("ratio_cap"),
           py::arg("tau_pos"), py::arg("tau_neg"), py::arg("kl_coef"), py::arg("entropy_coef"))
      .def("run", &run_policy_loss, py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("address", [](const PolicyLoss& op) { return reinterpret_cast<Address>(&op); });
  py::class_<Divergence>(m, "Divergence", "The arguments of divergence; kind 0..2: forward_kl, reverse_kl, jsd.")
      .def(py::init(&describe_divergence), py::kw_only(), py::arg("policy"), py::arg("reference"), py::arg("kind"),
           py::arg("mix"), py::arg("value") = 0, py::arg("stats"), py::arg("grad_value") = 0, py::arg("apart") = false)
      .def("forward", [](const Divergence& op, int threads) { run_divergence(op, Walk::forward, threads); },
           py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("mixture", [](const Divergence& op, int threads) { run_divergence(op, Walk::mixture, threads); },
           py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("backward", [](const Divergence& op, int threads) { run_divergence(op, Walk::backward, threads); },
           py::arg("threads"), py::call_guard<py::gil_scoped_release>());
#if defined(_OPENMP)
  py::class_<ShortWaits>(m, "ShortWaits", "While one exists, threads that wait for one another soon sleep.")
      .def(py::init<int>(), py::arg("threads"));
#endif
#if defined(FASTALIGN_CUDA)
  bind_cuda(m);
#endif
  m.attr("has_cuda") = py::hasattr(m, "cuda");
}
