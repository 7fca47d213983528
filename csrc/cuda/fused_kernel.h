// The kernel of fused.h, for any Block: fused.cu has the one of a GPU, tests/fused_on_host.cpp one for the host.
//
// Stage 1, item after item: rows to shared memory, norms, pair distances from differences, median, kernel values.
// One barrier over the grid, for the sums of the kernel values over all samples. Stage 2: the gradient, from the rows
// that are still in shared memory. Where a block has one item that fits, memory is read once and written once.
//
// Compiled without multiply-add contraction: fma(p, r, -s') would see the unrounded product on one side only, and
// equal rows would differ by a rounding that a coefficient of 1e12 shows. All sums run in a fixed order.
#pragma once

#include <cmath>
#include <cstring>

#include "block_steps.h"
#include "fused.h"

namespace forde_fast {

struct bfloat16 {
  uint16_t bits;
};

FORDE_INLINE float widen(float x) { return x; }
FORDE_INLINE double widen(double x) { return x; }
FORDE_INLINE float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

FORDE_INLINE void narrow(float x, float* y) { *y = x; }
FORDE_INLINE void narrow(double x, double* y) { *y = x; }
FORDE_INLINE void narrow(float x, bfloat16* y) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
struct Coefficients {  // of one pair
  T ij, ji;
};

// What a block keeps beside its rows.
template <class T>
struct Small {
  static constexpr int kSquare = kMostMembers * kMostMembers;

  double squares[kMostMembers], sums[kShared];         // over the columns: of rows; of pairs and growth (add_pairs)
  double d[kSquare], kernel[kSquare], mixed[kSquare];  // [M, M] of one sample
  double lower[kMostMembers], upper[kMostMembers];     // the middle two distances of each second particle
  double rows[kMostMembers], scale[kMostMembers];      // sums of kernel values over j and the samples; -2 / G / rows
  T partial[4096 / sizeof(T)];                         // [warps, 64] sums
  T r[kMostMembers], t[kMostMembers];                  // 1 / norm; what a gradient has along its row
  Coefficients<T> c[kMostMembers * (kMostMembers - 1) / 2];
};

// kRows: the number of rows in registers, at least M; those beyond M are zero.
template <class In, int kRows, bool kProduct, int kThreads, class Block>
struct FusedKernel {
  using T = decltype(widen(In{}));

  const Block& block;
  const Fused& f;
  const Plan& p;
  Small<T>& small;
  In* const memory;  // [slots, chunk / kThreads, M, kThreads]

  static_assert(sizeof(Small<T>) <= kSmallShared && kThreads / 32 * 64 * sizeof(T) <= sizeof(Small<T>::partial), "");
  static constexpr int kPairs = kRows * (kRows - 1) / 2;
  static constexpr int kPairsAtOnce = 48;                           // sums in the registers of a thread
  static constexpr int kColumns = kRows * sizeof(T) <= 40 ? 2 : 1;  // mixed at a time

  static constexpr int pair(int i, int j) { return i * (2 * kRows - i - 1) / 2 + j - i - 1; }
  static constexpr int last_row(int first) {  // of as many rows i as have no more than kPairsAtOnce pairs i < j
    int last = first + 1;
    while (last < kRows - 1 && pair(last + 1, last + 2) - pair(first, first + 1) <= kPairsAtOnce) ++last;
    return last;
  }

  // Some columns of one sample and their rows in shared memory, [count / kThreads, M, kThreads]: thread t has the columns
  // t, t + kThreads, ..., whose rows are at constant distances.
  struct Range {
    In* rows;
    int sample, from, count;
  };

  FORDE_INLINE int width(int item) const { return min_of(p.width, int(f.columns) - item % p.splits * p.width); }

  FORDE_INLINE Range range(int item, int from) const {
    In* rows = memory + min_of(item / block.blocks(), p.slots - 1) * f.members * p.chunk;
    return {rows, item / p.splits, item % p.splits * p.width + from, min_of(width(item) - from, p.chunk)};
  }

  static FORDE_INLINE int min_of(int a, int b) { return a < b ? a : b; }

  // Of column k, row 0; the others follow kThreads apart.
  FORDE_INLINE In* rows_at(const Range& range, int k) const {
    return range.rows + unsigned(k) / kThreads * f.members * kThreads + unsigned(k) % kThreads;
  }

  FORDE_INLINE double* state(int item) const { return f.workspace + p.blocks * kMostMembers + item * state_size(f.members); }

  FORDE_INLINE double* told(int item) const { return state(p.items) + int64_t(item) * kShared; }

  // Rows of the particles to shared memory, all on their way at once.
  FORDE_INLINE void load(const Range& range) const {
    constexpr int kVector = 16 / sizeof(In);
    block.sync();  // what was there has been read
    const In* from = static_cast<const In*>(f.particles) + range.sample * f.stride_g + range.from;
    FORDE_ROLLED for (int m = 0; m < f.members; ++m, from += f.stride_m)
      if (p.aligned)
        FORDE_ROLLED for (int k = block.thread() * kVector; k < range.count; k += kThreads * kVector)
          block.copy_16_bytes(rows_at(range, k) + m * kThreads, from + k);
      else
        FORDE_ROLLED for (int k = block.thread(); k < range.count; k += kThreads) rows_at(range, k)[m * kThreads] = from[k];
    block.commit_copies();
    block.template wait_for_copies<0>();
    block.sync();
  }

  FORDE_INLINE void add_squares(const Range& range) const {
    T x[kRows] = {};
    for (int k = block.thread(); k < range.count; k += kThreads)
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) {
        const T p = s(rows_at(range, k), m, T(1));
        x[m] = multiply_add(p, p, x[m]);
      }
    add_over_threads<kThreads>(block, x, small.partial, small.squares);
  }

  // The sum of x over the blocks that share a sample, in each of them.
  FORDE_INLINE void add_over_splits(int item, double* x, int count, int offset) const {
    if (p.splits == 1) return;
    FORDE_ROLLED for (int n = block.thread(); n < count; n += kThreads) told(item)[offset + n] = x[n];
    block.sync_grid();
    const int first = item - item % p.splits;
    FORDE_ROLLED for (int n = block.thread(); n < count; n += kThreads) {
      double total = 0;
      for (int split = 0; split < p.splits; ++split) total += told(first + split)[offset + n];
      x[n] = total;
    }
    block.sync();
  }

  FORDE_INLINE void find_norms() const {
    const int n = block.thread();
    if (n < kMostMembers) {
      const double square = small.squares[n] + f.eps;
      const double r = square < INFINITY ? 1 / sqrt(square) : NAN;  // a row that overflowed is not a row of zeros
      small.r[n] = n >= f.members ? T(0) : f.normalize ? T(r) : T(1);
    }
    block.sync();
  }

  FORDE_INLINE T s(const In* rows, int m, T r) const { return m < f.members ? widen(rows[m * kThreads]) * r : T(0); }

  // Column k of all rows of q: up to what all have in common, the contrasts' product and, as row 0, what it leaves out.
  FORDE_INLINE void load_product(const Range& range, int k, T (&q)[kRows]) const {
    const T* product = static_cast<const T*>(f.product) + int64_t(range.sample) * f.columns + range.from + k;
    T total = 0;
    FORDE_UNROLL for (int m = 1; m < kRows; ++m, product += f.groups * f.columns) {
      q[m] = m < f.members ? *product : T(0);
      total += q[m];
    }
    q[0] = total * T(1 / (sqrt(double(f.members)) - 1));
  }

  // small.sums += [kPairs] distances of the pairs (i, j), i from kFirst on, (q_i - q_j)(s_i - s_j); and, after them,
  // [kRows - 1] (q_n - q_0)(s_n + s_0), what s^T C s grows by from row 0 to row n. As many at a time as registers hold.
  template <int kFirst>
  FORDE_INLINE void add_pairs(const Range& range) const {
    constexpr int kLast = last_row(kFirst), kBase = pair(kFirst, kFirst + 1), kCount = pair(kLast, kLast + 1) - kBase;
    constexpr int kGrowth = kLast == kRows - 1 ? kRows - 1 : 0;
    T x[kCount + kGrowth] = {}, r[kRows];
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) r[m] = small.r[m];
    FORDE_ROLLED for (int k = block.thread(); k < range.count; k += kThreads) {
      T row[kRows], product[kRows];
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) row[m] = s(rows_at(range, k), m, r[m]);
      if (kProduct) load_product(range, k, product);
      const T(&q)[kRows] = kProduct ? product : row;
      FORDE_UNROLL for (int i = kFirst; i < kLast; ++i)
        FORDE_UNROLL for (int j = i + 1; j < kRows; ++j) {
          T& sum = x[pair(i, j) - kBase];
          sum = multiply_add(q[i] - q[j], row[i] - row[j], sum);
        }
      FORDE_UNROLL for (int n = 0; n < kGrowth; ++n)
        x[kCount + n] = multiply_add(q[n + 1] - q[0], row[n + 1] + row[0], x[kCount + n]);
    }
    add_over_threads<kThreads>(block, x, small.partial, small.sums + kBase);
    if constexpr (kLast < kRows - 1) add_pairs<kLast>(range);
  }

  // From the sums of a sample to distances, bandwidth and what stage 2 needs:
  // state: [M, M] kernel / h, 0 where d = 0; [M] its sum over j times (q_i - q_j) s_i; [M] 1 / norm.
  FORDE_INLINE void weigh(int item) const {
    const int M = f.members, thread = block.thread(), step = kThreads;
    const int sample = item / p.splits;
    const bool reports = item % p.splits == 0;
    const auto growth = [&](int n) { return n == 0 ? 0 : small.sums[kPairs + n - 1]; };
    const auto distance = [&](int i, int j) {
      const double d = i == j ? 0 : small.sums[i < j ? pair(i, j) : pair(j, i)];
      return d < 0 ? 0 : d;  // NaN stays NaN
    };
    FORDE_ROLLED for (int e = thread; e < M * M; e += step) {
      const T d = T(distance(e / M, e % M));
      small.d[e] = d;
      if (reports) static_cast<T*>(f.distances)[e * f.groups + sample] = d;
    }
    block.sync();
    find_medians<kThreads>(block, small.d, M, small.lower, small.upper);
    FORDE_ROLLED for (int e = thread; e < M * M; e += step) {
      const int i = e / M, j = e % M;
      const double d = small.d[e], h = bandwidth(small.lower[j], small.upper[j], f.log_count);
      const double kernel = exp(-d / h), weight = d == 0 ? 0 : kernel / h;
      small.kernel[e] = kernel;
      small.mixed[e] = weight * (distance(i, j) + growth(i) - growth(j)) / 2;
      state(item)[e] = weight;
      if (reports && i == 0) static_cast<T*>(f.bandwidth)[j * f.groups + sample] = T(h);
    }
    block.sync();
    if (thread < M) {
      double row = 0, aligned = 0;
      for (int j = 0; j < M; ++j) {
        row += small.kernel[thread * M + j];
        aligned += small.mixed[thread * M + j];
      }
      if (reports) small.rows[thread] += row;
      state(item)[M * M + thread] = aligned;
      state(item)[M * M + M + thread] = small.r[thread];
    }
  }

  FORDE_INLINE void stage_1(int item) const {
    // weigh's last barrier came after the last item's sums had been read
    FORDE_ROLLED for (int n = block.thread(); n < kShared; n += kThreads) small.sums[n] = small.squares[n % kMostMembers] = 0;
    FORDE_ROLLED for (int from = 0; from < width(item); from += p.chunk) {
      load(range(item, from));
      add_squares(range(item, from));
    }
    add_over_splits(item, small.squares, kRows, 0);
    find_norms();
    FORDE_ROLLED for (int from = 0; from < width(item); from += p.chunk) {
      if (p.chunk < width(item)) load(range(item, from));
      add_pairs<0>(range(item, from));
    }
    add_over_splits(item, small.sums, kPairs + kRows - 1, kMostMembers);
    weigh(item);
  }

  FORDE_INLINE void stage_2(int item, bool loaded) const {
    const int M = f.members;
    block.sync();  // the last item's coefficients have been used
    const double* scale = small.scale;
    FORDE_ROLLED for (int e = block.thread(); e < kRows * kRows; e += kThreads) {
      const int i = e / kRows, j = e % kRows;
      if (i >= j) continue;
      const double ij = j < M ? scale[i] * state(item)[i * M + j] : 0, ji = j < M ? scale[j] * state(item)[j * M + i] : 0;
      small.c[pair(i, j)] = {T(ij), T(ji)};
    }
    if (block.thread() < M) {
      small.t[block.thread()] = f.normalize ? T(scale[block.thread()] * state(item)[M * M + block.thread()]) : T(0);
      small.r[block.thread()] = T(state(item)[M * M + M + block.thread()]);
    }
    block.sync();
    FORDE_ROLLED for (int from = 0; from < width(item); from += p.chunk) {
      if (!loaded) load(range(item, from));
      mix(range(item, from));
    }
  }

  // gradient_i = (sum_j c_ij (q_i - q_j) - t_i s_i) / norm_i; each difference serves both of its rows.
  FORDE_INLINE void mix(const Range& range) const {
    In* out = static_cast<In*>(f.gradient) + int64_t(range.sample) * f.columns + range.from;
    FORDE_ROLLED for (int first = block.thread(); first < range.count; first += kColumns * kThreads) {
      block.reload();
      const auto column = [&](int v) { return first + v * kThreads; };
      T q[kColumns][kRows], total[kColumns][kRows] = {};
      FORDE_UNROLL for (int v = 0; v < kColumns; ++v) {
        const int k = column(v) < range.count ? column(v) : first;
        if (kProduct)
          load_product(range, k, q[v]);
        else
          FORDE_UNROLL for (int m = 0; m < kRows; ++m) q[v][m] = s(rows_at(range, k), m, small.r[m]);
      }
      FORDE_UNROLL for (int i = 0; i < kRows; ++i)
        FORDE_UNROLL for (int j = i + 1; j < kRows; ++j) {
          const Coefficients<T> c = small.c[pair(i, j)];
          FORDE_UNROLL for (int v = 0; v < kColumns; ++v) {
            const T difference = q[v][i] - q[v][j];
            total[v][i] = multiply_add(c.ij, difference, total[v][i]);
            total[v][j] = multiply_add(-c.ji, difference, total[v][j]);
          }
        }
      In* to = out + first;
      FORDE_UNROLL for (int m = 0; m < kRows; ++m, to += f.groups * f.columns) {
        if (m >= f.members) continue;
        const T r = small.r[m], t = small.t[m];
        FORDE_UNROLL for (int v = 0; v < kColumns; ++v)
          if (column(v) < range.count)
            narrow((total[v][m] - t * s(rows_at(range, column(v)), m, r)) * r, to + v * kThreads);
      }
    }
  }

  FORDE_INLINE void run() const {
    if (block.thread() < kMostMembers) small.rows[block.thread()] = 0;
    int item = block.index();
    FORDE_ROLLED for (; item < p.items; item += block.blocks()) stage_1(item);
    write_rows(block, f.workspace, f.members, small.rows);
    block.sync_grid();
    add_over_blocks<kThreads>(block, f.workspace, f.members, f.groups, small.rows, small.scale);
    if (block.index() == 0 && block.thread() < 32) write_value(block, f.members, f.groups, small.rows, static_cast<T*>(f.value));
    // Backwards: the last item of stage 1 is in the last slot still, where others have been before it.
    const int64_t last = item - block.blocks();
    FORDE_ROLLED for (item = last; item >= 0; item -= block.blocks())
      stage_2(item, p.chunk >= width(item) && (item / block.blocks() < p.slots - 1 || item == last));
  }
};

}  // namespace forde_fast
