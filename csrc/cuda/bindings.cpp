// The Python face of the CUDA kernels, `_C.cuda`: what fastalign.ops.backends.cuda calls, on arguments described by csrc/bindings.cpp.
#include "cuda.h"

#include <pybind11/pybind11.h>

#include <stdexcept>

namespace py = pybind11;
using namespace fastalign;

namespace {

void check(const char* error, const char* op) {
  if (error) throw std::runtime_error(std::string(op) + " on CUDA: " + error);
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

void bind_cuda(py::module_& parent) {
  py::module_ m = parent.def_submodule("cuda", "Enqueues on a stream of the device in use, and returns at once.");
  m.def("use_device", [](int device) { check(fastalign_use_device_cuda(device), "device"); }, py::arg("device"),
        "What follows in this thread happens on this device.");
  m.def("blocks_per_row", &fastalign_blocks_per_row_cuda, py::arg("rows"), py::arg("vocabulary"),
        "How many blocks should share a row.");
  m.def("scratch", [](const TokenLogps& op) { return fastalign_scratch_cuda(&op); }, py::arg("op"),
        "Bytes that token_logps_forward needs when blocks share rows.");
  m.def(
      "token_logps_forward",
      [](const TokenLogps& op, int blocks_per_row, uintptr_t scratch, uint64_t stream) {
        check(fastalign_token_logps_forward_cuda(&op, blocks_per_row, pointer(scratch), stream), "token_logps");
      },
      py::arg("op"), py::arg("blocks_per_row"), py::arg("scratch"), py::arg("stream"));
  m.def(
      "token_logps_backward",
      [](const TokenLogps& op, int blocks_per_row, uint64_t stream) {
        check(fastalign_token_logps_backward_cuda(&op, blocks_per_row, stream), "token_logps backward");
      },
      py::arg("op"), py::arg("blocks_per_row"), py::arg("stream"));
  m.def("policy_loss_cluster", [](const PolicyLoss& op) { return fastalign_policy_loss_cluster_cuda(&op); }, py::arg("op"),
        "How many blocks should hold a row; 0: it is read twice.");
  m.def(
      "policy_loss",
      [](const PolicyLoss& op, int cluster, uint64_t stream) {
        check(fastalign_policy_loss_cuda(&op, cluster, stream), "policy_loss");
      },
      py::arg("op"), py::arg("cluster"), py::arg("stream"));
}
