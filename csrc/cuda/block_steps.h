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
template <int kThreads, class Block>
FORDE_INLINE void find_medians(const Block& block, const double* d, int M, double* lower, double* upper) {
  FORDE_ROLLED for (int e = block.thread(); e < M * M; e += kThreads) {
    const int i = e / M, j = e % M;
    const double own = d[e];
    int rank = 0;
    bool nan = false;
    for (int k = 0; k < M; ++k) {
      const double other = d[k * M + j];
      nan |= other != other;
      rank += other < own || (other == own && k < i);
    }
    if (nan ? i == 0 : rank == (M - 1) / 2) lower[j] = nan ? NAN : own;
    if (nan ? i == 0 : rank == M / 2) upper[j] = nan ? NAN : own;
  }
  block.sync();
}

FORDE_INLINE double bandwidth(double lower, double upper, double log_count) { return (lower + upper) / 2 / log_count + 1e-12; }

// From a block's sums of kernel values rows[M] to those over all blocks, by `workspace` [blocks, kStride], and to
// scale[i] = -2 / G / rows[i]; one barrier over the grid. Block 0 writes the value.
template <int kThreads, int kStride, class T, class Block>
FORDE_INLINE void add_over_blocks(const Block& block, double* workspace, int M, int64_t groups, double* rows, double* scale, T* value) {
  if (block.thread() < M) workspace[block.index() * kStride + block.thread()] = rows[block.thread()];
  block.sync_grid();
  for (int i = block.thread() / 32; i < M; i += kThreads / 32) {
    double total = 0;
    for (int b = block.thread() % 32; b < block.blocks(); b += 32) total += workspace[b * kStride + i];
    for (int half = 16; half > 0; half /= 2) total += block.shuffle(total, half);
    if (block.thread() % 32 == 0) {
      rows[i] = total;
      scale[i] = -2 / (groups * total);
    }
  }
  block.sync();
  if (block.index() == 0 && block.thread() == 0) {
    double all = 0;
    for (int i = 0; i < M; ++i) all += log(rows[i] / groups) / groups;
    *value = T(all);
  }
}

}  // namespace forde_fast
