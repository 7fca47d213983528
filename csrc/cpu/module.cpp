// The Python module, in a file of its own, as pybind11's headers take long to compile: importing it registers the
// operations.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "capability.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ implementations of forde_fast's operations; importing it registers them";
  m.def("cpu_capability", [] { return forde_fast::name_of(forde_fast::capability()); }, "The instruction set that the kernels use.");
  m.def("use_cpu_capability", [](const std::string& name) {
    using forde_fast::Capability;
    for (Capability which : {Capability::kPortable, Capability::kAvx2, Capability::kAvx512})
      if (name == forde_fast::name_of(which) && forde_fast::runs_here(which)) {
        forde_fast::capability() = which;
        return;
      }
    throw std::invalid_argument("name: expected portable, avx2 or avx512, as this machine can run, got " + name);
  }, "For tests: the one that they use from now on, in place of the widest.");
}
