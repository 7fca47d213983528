// SGD's update on CPU tensors in one pass over memory; its schema is defined in forde_fast/operators.py.
#include "descent.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "capability.h"

namespace forde_fast {
namespace {

using at::Tensor;

void descend_(const Tensor& parameters, const Tensor& velocity, const Tensor& g, double rate, double momentum,
              double weight_decay, bool nesterov) {
  const auto type = parameters.scalar_type();
  for (const Tensor* t : {&parameters, &velocity, &g})
    TORCH_CHECK(t->scalar_type() == type && (type == at::kFloat || type == at::kDouble) && t->is_contiguous() &&
                    t->sizes() == parameters.sizes(),
                "parameters, velocity, g: expected contiguous float32 or float64 of one shape, got ", t->scalar_type(), " ",
                t->sizes());
  const bool wide = type == at::kDouble;
  auto* pass = portable_descent;
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) pass = avx512_descent;
  if (capability() == Capability::kAvx2) pass = avx2_descent;
#endif
  char *p = static_cast<char*>(parameters.mutable_data_ptr()), *v = static_cast<char*>(velocity.mutable_data_ptr());
  const char* from = static_cast<const char*>(g.const_data_ptr());
  at::parallel_for(0, parameters.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    const int64_t bytes = begin * parameters.element_size();
    pass({rate, momentum, weight_decay, nesterov, end - begin, p + bytes, v + bytes, from + bytes}, wide);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(forde_fast, CPU, m) { m.impl("descend_", descend_); }

}  // namespace forde_fast
