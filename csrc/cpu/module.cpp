// The Python module: importing it registers the operations. Written with Python's own interface, as pybind11's headers
// would take longer to compile than all of the module.
#include <Python.h>

#include <cstring>
#include <initializer_list>

#include "capability.h"

namespace {

using forde_fast::Capability;

PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString(forde_fast::name_of(forde_fast::capability())); }

PyObject* use_cpu_capability(PyObject*, PyObject* given) {
  const char* name = PyUnicode_AsUTF8(given);
  if (!name) return nullptr;
  for (Capability which : {Capability::kPortable, Capability::kAvx2, Capability::kAvx512})
    if (!std::strcmp(name, forde_fast::name_of(which)) && forde_fast::runs_here(which)) {
      forde_fast::capability() = which;
      Py_RETURN_NONE;
    }
  return PyErr_Format(PyExc_ValueError, "name: expected portable, avx2 or avx512, as this machine can run, got %s", name);
}

PyMethodDef functions[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "The instruction set that the kernels use."},
    {"use_cpu_capability", use_cpu_capability, METH_O, "For tests: the one that they use from now on, in place of the widest."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "C++ implementations of forde_fast's operations; importing it registers them",
                      -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
