// The rule of one sample on the way of low_rank_kernel.h: from its K columns and sums to distances, bandwidth and what
// the way up takes.
#pragma once

#include "block_steps.h"
#include "half.h"
#include "low_rank.h"

namespace forde_fast {

// Of contrasts in float16, which ends at 8 of them: of rows less than 1 / kLeastRho long, contrasts are at most 4.9 long.
constexpr float kHalfUnit = 8192;
constexpr double kLeastRho = 0.5, kMostRho = 4;
constexpr float kMixedUnit = 4096;  // the most that a number of `y` can be

template <class T>
FORDE_INLINE T* workspace(const LowRank& f, int64_t offset) {
  return reinterpret_cast<T*>(f.workspace + offset);
}

constexpr int kLowRankPairs = kLowRankMembers * (kLowRankMembers - 1) / 2;
constexpr int pair(int i, int j) { return i * (2 * kLowRankMembers - i - 1) / 2 + j - i - 1; }  // i < j: row after row

// What a sample's rule needs of shared memory.
template <int kRank>
struct RuleOfSample {
  static constexpr int kRows = kLowRankMembers, kSquare = kRows * kRows;

  double tail[64];  // without F: distances of pairs and, behind them, squares
  double sums[64];  // with F: likewise, and what s^T F F^T s grows by from row 0 to another
  double rho[kRows], d[kSquare], kernel[kSquare], mixed[kSquare], lower[kRows], upper[kRows];
  float w[kSquare], size[kSquare], r[kRows], unit[kRows];
  float x[kRows + 1][kRank + 1], partial[4][64];  // the rows of x, and what all of them lack
};

template <int kRank, class Block>
struct LowRankRule {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  RuleOfSample<kRank>& rule;
  double* const rows;  // sums of kernel values over j and the block's samples

  static constexpr int kRows = kLowRankMembers, kPairs = kLowRankPairs, kSquare = kRows * kRows;
  static constexpr int kThreads = kLowRankThreads;

  // Squares, norms and the rows of x.
  FORDE_INLINE void find_rows(int sample, float (&x)[kRows]) const {
    const int M = f.members, thread = block.thread(), group = sample / kGroup, place = sample % kGroup;
    if (thread < 64) {
      double total = 0;
      const float* from = workspace<float>(f, p.at.pairs) + (group * p.splits * kGroup + place) * 64 + thread;
      FORDE_FOUR_TIMES for (int split = 0; split < p.splits; ++split) total += from[split * kGroup * 64];
      rule.tail[thread] = total;
    } else if (thread < 64 + kRows) {
      rule.r[thread - 64] = workspace<float>(f, p.at.norms)[sample * kRows + thread - 64];
    }
    if (thread < kSquare) rule.w[thread] = 0;  // of rows that are not there too
    if (thread < kRank) {
      const float* from = workspace<float>(f, p.at.x) + (int64_t(group) * p.splits * kTileRows + place * kRows) * kRank + thread;
      FORDE_FOUR_TIMES for (int split = 0; split < p.splits; ++split, from += kTileRows * kRank)
        FORDE_UNROLL for (int m = 0; m < kRows; ++m) x[m] += from[m * kRank];
    }
    block.sync();
    if (thread < kRows) {
      const double r = rule.r[thread], rho = thread < M ? 1 / sqrt(rule.tail[kPairs + thread] + f.eps * r * r) : 1;
      rule.rho[thread] = rho;
      rule.r[thread] = float(r * rho);
      workspace<float>(f, p.at.norms)[sample * kRows + thread] = float(r * rho);
      if (!(rho > kLeastRho && rho < kMostRho)) *workspace<int>(f, p.at.again) = 1;
    }
    block.sync();
    if (thread < kRank) {
      const float u = x[0], rho = float(rule.rho[0]);
      float total = 0;
      FORDE_UNROLL for (int m = 1; m < kRows; ++m) total += m < M ? x[m] : 0;
      x[0] = rho * (total / (sqrtf(float(M)) - 1));
      FORDE_UNROLL for (int m = 1; m < kRows; ++m) x[m] = multiply_add(float(rule.rho[m]), x[m], float(rule.rho[m] - rule.rho[0]) * u);
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) rule.x[m][thread] = x[m];
      rule.x[kRows][thread] = rho * u;
    }
    block.sync();
  }

  // A thread has one sum over a quarter of the columns.
  FORDE_INLINE void add_sums() const {
    const int sum = block.thread() % 64, quarter = block.thread() / 64;
    if (sum < kPairs + kRows - 1) {
      const bool growth = sum >= kPairs;
      int i = 0, j = growth ? sum - kPairs + 1 : sum + 1;
      while (!growth && j >= kRows) ++i, j += i + 1 - kRows;  // pairs lie row after row
      const float sign = growth ? 1 : -1, twice = growth ? 2 : 0;
      float total = 0;
      FORDE_EIGHT_TIMES for (int k = quarter * (kRank / 4); k < (quarter + 1) * (kRank / 4); ++k) {
        const float a = rule.x[j][k], b = rule.x[i][k];
        total = multiply_add(a - b, (a + sign * b) + twice * rule.x[kRows][k], total);
      }
      rule.partial[quarter][sum] = total;
    }
    block.sync();
    if (block.thread() < kPairs + kRows - 1) {
      double total = 0;
      for (int n = 0; n < 4; ++n) total += rule.partial[n][block.thread()];
      rule.sums[block.thread()] = total;
    }
    block.sync();
  }

  // From the sums to distances, bandwidth and w = kernel / h; the rows of kernel values to rows.
  FORDE_INLINE void weigh(int sample) const {
    const int M = f.members, thread = block.thread(), i = thread / M, j = thread % M;
    const bool own = thread < M * M;
    const double unit = f.unit / kHalfUnit * (f.unit / kHalfUnit);
    double sum = 0, tail = 0;
    if (own && i != j) {
      const int at = i < j ? pair(i, j) : pair(j, i);
      const double a = rule.rho[i], b = rule.rho[j], near = a * b * rule.tail[at];
      sum = rule.sums[at];
      tail = near + (a - b) * (a * rule.tail[kPairs + i] - b * rule.tail[kPairs + j]);
      tail = tail < 0 ? 0 : tail;  // NaN stays NaN
      if (near > 4 * tail) *workspace<int>(f, p.at.again) = 1;
    }
    if (own) {
      const double d = tail == 0 ? 0 : unit * sum + f.tail * tail;  // equal rows have no distance
      rule.d[thread] = float(d);
      f.distances[thread * f.groups + sample] = float(d);
    }
    block.sync();
    find_medians<kThreads>(block, rule.d, M, rule.lower, rule.upper);
    if (own) {
      const auto growth = [&](int n) { return n == 0 ? 0 : rule.sums[kPairs + n - 1]; };
      const auto missing = [&](int n) { return f.eps * rule.r[n] * rule.r[n]; };  // 1 - |s_n|^2
      const double d = rule.d[thread], h = forde_fast::bandwidth(rule.lower[j], rule.upper[j], f.log_count);
      const double kernel = exp(-d / h), w = d == 0 ? 0 : kernel / h;
      rule.kernel[thread] = kernel;
      rule.mixed[thread] = w * (unit * (sum + growth(i) - growth(j)) + f.tail * (tail + missing(j) - missing(i))) / 2;
      rule.w[i * kRows + j] = float(w);
      rule.size[thread] = float(w) * sqrtf(float(sum));
      workspace<float>(f, p.at.weights)[int64_t(sample) * kSquare + i * kRows + j] = float(w);
      if (i == 0) f.bandwidth[j * f.groups + sample] = float(h);
    }
    block.sync();
    if (thread < M) {
      double kernel = 0, aligned = 0;
      float size = 0;  // no number of y is larger
      for (int k = 0; k < M; ++k) {
        kernel += rule.kernel[thread * M + k];
        aligned += rule.mixed[thread * M + k];
        size += rule.size[thread * M + k];
      }
      rows[thread] += kernel;
      rule.unit[thread] = size < 1e-30f ? 1 : kMixedUnit / size;  // nothing beside the kernel value 1 of the row itself
      workspace<float>(f, p.at.unit)[int64_t(sample) * kRows + thread] = rule.unit[thread];
      workspace<float>(f, p.at.aligned)[int64_t(sample) * kRows + thread] = float(aligned);
    }
    block.sync();
  }

  FORDE_INLINE void find(int sample) const {
    float x[kRows] = {};
    find_rows(sample, x);
    add_sums();
    weigh(sample);
    if (block.thread() < kRank) {  // as the matrix units want them
      const int column = block.thread(), row = sample % kGroup * kRows;
      Half* y = workspace<Half>(f, p.at.y) + int64_t(sample / kGroup) * kTileRows * kRank + column / 8 * (kTileRows * 8) + row * 8 + column % 8;
      FORDE_ROLLED for (int i = 0; i < f.members; ++i) {
        const float own = rule.x[i][column];
        float total = 0;
        FORDE_UNROLL for (int j = 0; j < kRows; ++j) total = multiply_add(rule.w[i * kRows + j], own - x[j], total);
        y[i * 8] = to_half(total * rule.unit[i]);
      }
    }
    block.sync();
  }
};

}  // namespace forde_fast
