// What the kernels of a whole operation have in common: sums over a block's threads, and the rule of one sample.
// Block: of a GPU in *.cu, of the host in tests/.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FORDE_INLINE __device__ __forceinline__
#define FORDE_UNROLL _Pragma("unroll")
#define FORDE_ROLLED _Pragma("unroll 1")  // what is unrolled inside fills the registers
#else
#define FORDE_INLINE inline
#define FORDE_UNROLL
#define FORDE_ROLLED
#endif

namespace forde_fast {

FORDE_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FORDE_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// To 2 or 3 units in the last place, in a tenth of the instructions.
FORDE_INLINE float inverse(float x) {
#if defined(__CUDACC__)
  return __fdividef(1, x);
#else
  return 1 / x;
#endif
}
template <class T>
FORDE_INLINE T inverse_root(T x) {
#if defined(__CUDACC__)
  return rsqrt(x);
#else
  return 1 / std::sqrt(x);
#endif
}

// y[0] of lane n becomes the sum over lanes of their y[n].
template <int kHalf, int kCount, class T, class Block>
FORDE_INLINE void halve(const Block& block, T (&y)[kCount], int lane) {
  const bool upper = lane & kHalf;
  FORDE_UNROLL for (int n = 0; n < kHalf; ++n) {
    const T sent = upper ? y[n] : y[n + kHalf], kept = upper ? y[n + kHalf] : y[n];
    y[n] = kept + block.shuffle(sent, kHalf);
  }
  if constexpr (kHalf > 1) halve<kHalf / 2>(block, y, lane);
}

// Lane n has the sums over its warp of x[n] and x[n + 32]. 32 sums are halved together, or 16 where there are no more, so
// that each costs one shuffle; every sum is over the same tree, and equal rows have equal sums.
template <int kCount, class T, class Block>
FORDE_INLINE void add_over_warp(const Block& block, const T (&x)[kCount], T (&out)[(kCount + 31) / 32]) {
  constexpr int kSums = kCount <= 16 ? 16 : 32;
  FORDE_UNROLL for (int part = 0; part < (kCount + 31) / 32; ++part) {
    T y[kSums];
    FORDE_UNROLL for (int n = 0; n < kSums; ++n) y[n] = part * 32 + n < kCount ? x[part * 32 + n < kCount ? part * 32 + n : 0] : T(0);
    halve<kSums / 2>(block, y, block.thread() % 32);
    out[part] = kSums == 16 ? y[0] + block.shuffle(y[0], 16) : y[0];
  }
}

// out[n] += the sum over the block's threads of x[n]; partial: [warps, 32 or 64] in shared memory.
template <int kThreads, int kCount, class T, class Block>
FORDE_INLINE void add_over_threads(const Block& block, const T (&x)[kCount], T* partial, double* out) {
  constexpr int kParts = (kCount + 31) / 32, kAll = kParts * 32;
  static_assert(kAll <= 64, "");
  const int lane = block.thread() % 32, warp = block.thread() / 32;
  T own[kParts];
  add_over_warp(block, x, own);
  FORDE_UNROLL for (int part = 0; part < kParts; ++part) partial[warp * kAll + part * 32 + lane] = own[part];
  block.sync();
  FORDE_ROLLED for (int n = block.thread(); n < kCount; n += kThreads) {
    double total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += partial[w * kAll + n];
    out[n] += total;
  }
  block.sync();
}

// If row i of a column is one of the middle two of M, by its rank: these; NaN if there is one. The column has `count`
// numbers, those beyond M infinite.
template <class T>
FORDE_INLINE void find_median(const T* column, int stride, int count, int M, int i, T& lower, T& upper) {
  const T own = column[i * stride];
  int rank = 0;
  bool nan = false;
  FORDE_UNROLL for (int k = 0; k < count; ++k) {
    const T other = column[k * stride];
    nan |= other != other;
    rank += k < i ? other <= own : other < own;
  }
  if (nan ? i == 0 : rank == (M - 1) / 2) lower = nan ? T(NAN) : own;
  if (nan ? i == 0 : rank == M / 2) upper = nan ? T(NAN) : own;
}

// Of each column of d [M, M]. Between barriers.
template <int kThreads, class T, class Block>
FORDE_INLINE void find_medians(const Block& block, const T* d, int M, T* lower, T* upper) {
  FORDE_ROLLED for (int e = block.thread(); e < M * M; e += kThreads) find_median(d + e % M, M, M, M, e / M, lower[e % M], upper[e % M]);
  block.sync();
}

FORDE_INLINE double bandwidth(double lower, double upper, double log_count) { return (lower + upper) / 2 / log_count + 1e-12; }

// From a block's sums of kernel values rows[M] to those over all blocks, by `workspace` [M, blocks], and to
// scale[i] = -2 / G / rows[i], in two steps with a barrier over the grid between them.
template <class Block>
FORDE_INLINE void write_rows(const Block& block, double* workspace, int M, const double* rows) {
  if (block.thread() < M) workspace[block.thread() * block.blocks() + block.index()] = rows[block.thread()];
}

// 16 lanes for each row, all of whose loads are on their way at once.
template <int kThreads, class T, class Block>
FORDE_INLINE void add_over_blocks(const Block& block, const double* workspace, int M, int64_t groups, double* rows, T* scale) {
  constexpr int kLanes = 16, kAtOnce = 9;
  const int blocks = block.blocks(), lane = block.thread() % kLanes;
  FORDE_ROLLED for (int row = block.thread() / kLanes, all = 0; all < M; row += kThreads / kLanes, all += kThreads / kLanes) {
    const double* from = workspace + (row < M ? row : 0) * blocks + lane;
    double total = 0;
    FORDE_ROLLED for (int first = lane; first < blocks; first += kLanes * kAtOnce, from += kLanes * kAtOnce) {
      double own[kAtOnce];
      FORDE_UNROLL for (int n = 0; n < kAtOnce; ++n) own[n] = first + n * kLanes < blocks ? from[n * kLanes] : 0;
      FORDE_UNROLL for (int n = 0; n < kAtOnce; ++n) total += own[n];
    }
    FORDE_UNROLL for (int half = kLanes / 2; half > 0; half /= 2) total += block.shuffle(total, half);
    if (lane == 0 && row < M) {
      rows[row] = total;
      scale[row] = -2 / T(groups * total);
    }
  }
  block.sync();
}

// By one warp, a row for each lane.
template <class T, class Block>
FORDE_INLINE void write_value(const Block& block, int M, int64_t groups, const double* rows, T* value) {
  const int lane = block.thread() % 32;
  double total = lane < M ? log(rows[lane] / groups) / groups : 0;
  for (int half = 16; half > 0; half /= 2) total += block.shuffle(total, half);
  if (lane == 0) *value = T(total);
}

}  // namespace forde_fast
