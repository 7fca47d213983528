// What the kernels of a whole operation have in common: sums over a block's threads, and the rule of one sample.
// Block: of a GPU in *.cu, of the host in tests/.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FORDE_INLINE __device__ __forceinline__
#define FORDE_UNROLL _Pragma("unroll")
#define FORDE_ROLLED _Pragma("unroll 1")  // what is unrolled inside fills the registers
#define FORDE_FOUR_TIMES _Pragma("unroll 4")
#else
#define FORDE_INLINE inline
#define FORDE_UNROLL
#define FORDE_ROLLED
#define FORDE_FOUR_TIMES
#endif

namespace forde_fast {

FORDE_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FORDE_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// y[0] of lane n becomes the sum over lanes of their y[n].
template <int kHalf, class T, class Block>
FORDE_INLINE void halve(const Block& block, T (&y)[32], int lane) {
  const bool upper = lane & kHalf;
  FORDE_UNROLL for (int n = 0; n < kHalf; ++n) {
    const T sent = upper ? y[n] : y[n + kHalf], kept = upper ? y[n + kHalf] : y[n];
    y[n] = kept + block.shuffle(sent, kHalf);
  }
  if constexpr (kHalf > 1) halve<kHalf / 2>(block, y, lane);
}

// Lane n has the sums over its warp of x[n] and x[n + 32]. 32 sums are halved together, so that each costs one
// shuffle; every sum is over the same tree, and equal rows have equal sums.
template <int kCount, class T, class Block>
FORDE_INLINE void add_over_warp(const Block& block, const T (&x)[kCount], T (&out)[(kCount + 31) / 32]) {
  FORDE_UNROLL for (int part = 0; part < (kCount + 31) / 32; ++part) {
    T y[32];
    FORDE_UNROLL for (int n = 0; n < 32; ++n) y[n] = part * 32 + n < kCount ? x[part * 32 + n < kCount ? part * 32 + n : 0] : T(0);
    halve<16>(block, y, block.thread() % 32);
    out[part] = y[0];
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

// The middle two of each column of d [M, M] by their ranks; NaN if there is one in it. Between barriers.
template <int kThreads, class T, class Block>
FORDE_INLINE void find_medians(const Block& block, const T* d, int M, T* lower, T* upper) {
  FORDE_ROLLED for (int e = block.thread(); e < M * M; e += kThreads) {
    const int i = e / M, j = e % M;
    const T own = d[e];
    int rank = 0;
    bool nan = false;
    for (int k = 0; k < M; ++k) {
      const T other = d[k * M + j];
      nan |= other != other;
      rank += other < own || (other == own && k < i);
    }
    if (nan ? i == 0 : rank == (M - 1) / 2) lower[j] = nan ? T(NAN) : own;
    if (nan ? i == 0 : rank == M / 2) upper[j] = nan ? T(NAN) : own;
  }
  block.sync();
}

FORDE_INLINE double bandwidth(double lower, double upper, double log_count) { return (lower + upper) / 2 / log_count + 1e-12; }

// From a block's sums of kernel values rows[M] to those over all blocks, by `workspace` [blocks, kStride], and to
// scale[i] = -2 / G / rows[i], in two steps with a barrier over the grid between them.
template <int kStride, class Block>
FORDE_INLINE void write_rows(const Block& block, double* workspace, int M, const double* rows) {
  if (block.thread() < M) workspace[block.index() * kStride + block.thread()] = rows[block.thread()];
}

template <int kThreads, int kStride, class T, class Block>
FORDE_INLINE void add_over_blocks(const Block& block, const double* workspace, int M, int64_t groups, double* rows, T* scale) {
  constexpr int kWarps = kThreads / 32, kAtOnce = 2;  // rows of a warp
  const int lane = block.thread() % 32;
  for (int first = block.thread() / 32; first < M; first += kAtOnce * kWarps) {
    double total[kAtOnce] = {};
    FORDE_FOUR_TIMES for (int b = lane; b < block.blocks(); b += 32)
      FORDE_UNROLL for (int n = 0; n < kAtOnce; ++n) total[n] += workspace[b * kStride + (first + n * kWarps < M ? first + n * kWarps : 0)];
    for (int half = 16; half > 0; half /= 2)
      FORDE_UNROLL for (int n = 0; n < kAtOnce; ++n) total[n] += block.shuffle(total[n], half);
    const int row = first + lane * kWarps;
    if (lane < kAtOnce && row < M) {
      const double own = lane == 0 ? total[0] : total[1];
      rows[row] = own;
      scale[row] = -2 / T(groups * own);
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
