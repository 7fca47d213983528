// Passes of a batch normalisation with ReLU and residual, forward, backward and twice backward, over a part of a dense
// tensor [outer, channels, inner]. The formulas stand in forde_fast/second_order/reference.py.
#pragma once

#include <cstdint>

namespace forde_fast::second_order {

// Tensors of one floating type, at the first element of the part; null where absent. A mask is where the
// normalisation's result, before the ReLU, is positive: found again from x, or from the output z where it has a residual.
struct Part {
  int64_t outer, channels, inner, stride;  // stride: from a row of coefficients to the next
  bool relu;
  const void *x, *residual, *z, *g, *u, *u_residual;
  void *out, *second;
  const void* coefficients;  // [rows, stride]: mean, inverse deviation, weight, bias; then those of the pass
};

constexpr int64_t kCommon = 4;  // rows of coefficients that every pass has

struct Passes {
  // out: sums [2, channels] of x - mean and its square
  void (*moments)(const Part&, double* sums);
  // out = relu(weight xhat + bias + residual)
  void (*forward)(const Part&);
  // sums [2, channels] of g and g xhat; g masked, here and below
  void (*backward_sums)(const Part&, double* sums);
  // out = k0 + k1 xhat + k2 g;  second = g
  void (*backward)(const Part&);
  // sums [3, channels] of u, u xhat and u g
  void (*double_sums)(const Part&, double* sums);
  // out = mask (k0 + k1 xhat + k2 u + u_residual);  second = k3 + k4 xhat + k5 g + k6 u
  void (*double_backward)(const Part&);
};

// The same passes, compiled for several instruction sets; in float or double.
const Passes& portable_passes(bool wide);
#if defined(__x86_64__)
const Passes& avx2_passes(bool wide);
const Passes& avx512_passes(bool wide);
#endif

}  // namespace forde_fast::second_order
