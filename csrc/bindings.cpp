// The Python face of the native kernels: raw pointers and sizes in, nothing about torch.
#include <pybind11/pybind11.h>

#include "cpu_level.h"

namespace py = pybind11;
using namespace fastalign;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastalign; the checked faces are in fastalign.ops.";
  m.def("cpu_level", [] { return name(cpu_level()); }, "The instruction set in use: avx512, avx2 or scalar.");
  m.def("set_cpu_level", [](const std::string& level) { cpu_level() = level_named(level); },
        "Use a lower instruction set from now on; not while a kernel runs.");
}
