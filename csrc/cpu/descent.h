// One pass of SGD over parameters, velocity and gradient: see descent.cpp.
#pragma once

#include <cstdint>

namespace forde_fast {

struct Descent {
  double rate, momentum, weight_decay;
  bool nesterov;
  int64_t count;
  void *parameters, *velocity;
  const void* gradient;
};

// Compiled for several instruction sets; in float or double.
void portable_descent(const Descent&, bool wide);
#if defined(__x86_64__)
void avx2_descent(const Descent&, bool wide);
void avx512_descent(const Descent&, bool wide);
#endif

}  // namespace forde_fast
