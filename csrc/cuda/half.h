// Numbers in float16, and several that are read or written together; with CUDA's types on a GPU, the compiler's elsewhere.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "block_steps.h"

namespace forde_fast {

#if defined(__CUDACC__)
using Half = __half;
FORDE_INLINE Half to_half(float x) { return __float2half_rn(x); }
#else
using Half = _Float16;
inline Half to_half(float x) { return Half(x); }
#endif

using Arrival = uint64_t;  // in shared memory: of bytes that are on their way to it

struct alignas(16) Four {
  float of[4];
};
struct alignas(8) Two {
  float of[2];
};
struct alignas(4) TwoHalves {
  Half of[2];
};

// Rows of float16 in shared memory for the matrix units, in tiles of 8 by 8 numbers of 128 bytes each: its rows one after
// another, or transposed its columns; bytes from a tile to the next one along rows, and along columns.
struct Operand {
  const Half* at;
  int along_rows, along_columns;
  int offset = 0;  // bytes beyond `at`: apart, as it is known when compiled

  FORDE_INLINE Operand from(int row, int column) const {
    return {at, along_rows, along_columns, offset + row / 8 * along_rows + column / 8 * along_columns};
  }
};

FORDE_INLINE Four load_four(const float* from) { return *reinterpret_cast<const Four*>(from); }
FORDE_INLINE Two load_two(const float* from) { return *reinterpret_cast<const Two*>(from); }
FORDE_INLINE void store_four(float* to, const Four& x) { *reinterpret_cast<Four*>(to) = x; }

}  // namespace forde_fast
