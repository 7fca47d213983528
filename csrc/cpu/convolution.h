// Products of gathered rows, of which all three passes of a small convolution consist: see convolution.cpp.
#pragma once

#include <cstdint>

namespace forde_fast::second_order {

// out[target[r] + o] = sum over d of in[row[r] + column[d]] matrix[d, o], for `stored` outputs o; offsets count numbers.
// The matrix stands in panels of two vectors of outputs, [depth, 2 width] each, the last of one where that is enough.
struct Products {
  int64_t rows, depth, stored;
  const int64_t *row, *column, *target;
  const void *in, *matrix;
  const void* start;  // [outputs in whole vectors], to which the sums are added; null: 0
  bool accumulate;    // add to what is in `out`
  void* out;
};

struct Multiplier {
  int64_t width;  // numbers in a vector
  void (*multiply)(const Products&);
};

// The same, compiled for several instruction sets; in float or double.
const Multiplier& portable_multiplier(bool wide);
#if defined(__x86_64__)
const Multiplier& avx2_multiplier(bool wide);
const Multiplier& avx512_multiplier(bool wide);
#endif

}  // namespace forde_fast::second_order
