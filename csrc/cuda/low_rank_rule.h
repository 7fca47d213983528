// The rule of one sample on the way of low_rank_kernel.h, by the warps that work on rows: from its K columns and sums
// to distances, bandwidth and what the way up takes.
#pragma once

#include "low_rank_item.h"

namespace forde_fast {

// Of contrasts in float16, which ends at 8 of them: of rows less than 1 / kLeastRho long, contrasts are at most 4.9 long.
constexpr float kHalfUnit = 8192;
constexpr double kLeastRho = 0.5, kMostRho = 4;
constexpr float kMixedUnit = 4096;  // the most that a number of `y` can be

constexpr int kLowRankPairs = kLowRankMembers * (kLowRankMembers - 1) / 2;
constexpr int pair(int i, int j) { return i * (2 * kLowRankMembers - i - 1) / 2 + j - i - 1; }  // i < j: row after row

// What a sample's rule needs of shared memory.
struct RuleOfSample {
  static constexpr int kRows = kLowRankMembers, kSquare = kRows * kRows;

  // Of rows i and j: kernel / h, which is 0 where d = 0 and of rows that are not there; the kernel; the weight times
  // |q_i - q_j|, and times (q_i - q_j) s_i. And their sums over j, but of the lengths the unit of row i of y.
  enum Part { kWeight, kKernel, kLength, kAligned, kCount };
  float parts[kCount * kRows * kMixing], sums[kCount * kRows];

  FORDE_INLINE float* row(Part part, int i) { return parts + (part * kRows + i) * kMixing; }
  FORDE_INLINE float& sum(Part part, int i) { return sums[part * kRows + i]; }

  float d[kSquare], lower[kRows], upper[kRows], r[kRows];
  double rho[kRows];
  double near[64];  // without F: distances of pairs and, behind them, squares
  double far[64];   // with F: likewise, and what s^T F F^T s grows by from row 0 to another
  float partial[kRowThreads / 32][64];
};

template <int kRank, class Block>
struct LowRankRule {
  RowWarps<Block> block;
  const LowRank& f;
  const LowRankPlan& p;
  RuleOfSample& rule;
  double* const rows;  // sums of kernel values over j and the block's samples

  static constexpr int kRows = kLowRankMembers, kPairs = kLowRankPairs, kSquare = kRows * kRows;
  static constexpr int kSplits = 8;  // whose sums are on their way at once

  // Sums over the splits: a thread's pair or square and, a column for each thread, the rows of x.
  FORDE_INLINE void find_rows(int sample, float (&x)[kRows]) const {
    const int thread = block.thread(), place = sample % kGroup;
    const int64_t first = int64_t(sample / kGroup) * p.splits;
    const float* pairs = workspace<float>(f, p.at.pairs) + (first * kGroup + place) * 64 + thread % 64;
    const Two* columns = workspace<Two>(f, p.at.x) + first * (kTileRows / 2 * kRank);
    double total = 0;
    const bool squares = thread >= kPairs && thread < kPairs + kRows;
    const double r = squares ? workspace<float>(f, p.at.norms)[sample * kRows + thread - kPairs] : 0;
    FORDE_ROLLED for (int split = 0; split < p.splits; split += kSplits) {
      float own[kSplits];
      Two part[kSplits][kRows / 2];
      FORDE_UNROLL for (int n = 0; n < kSplits; ++n) {
        const bool there = split + n < p.splits;
        own[n] = there && thread < 64 ? pairs[(split + n) * kGroup * 64] : 0;
        FORDE_UNROLL for (int m = 0; m < kRows / 2; ++m)
          part[n][m] = there && thread < kRank ? columns[(split + n) * (kTileRows / 2 * kRank) + place_of_sum(place * (kRows / 2) + m, thread)] : Two{};
      }
      FORDE_UNROLL for (int n = 0; n < kSplits; ++n) {
        total += own[n];
        FORDE_UNROLL for (int m = 0; m < kRows; ++m) x[m] += part[n][m / 2].of[m % 2];
      }
    }
    if (thread < 64) rule.near[thread] = total;
    if (squares) {
      const int m = thread - kPairs;
      const double rho = m < f.members ? 1 / sqrt(total + f.eps * r * r) : 1;
      rule.rho[m] = rho;
      rule.r[m] = float(r * rho);
      if (!(rho > kLeastRho && rho < kMostRho)) *workspace<int>(f, p.at.again) = 1;
    }
    for (int n = thread; n < rule.kCount * kRows * kMixing; n += kRowThreads) rule.parts[n] = 0;
    block.sync();
  }

  // From contrasts to the rows of x up to what all lack; their sums over the columns.
  FORDE_INLINE void add_sums(float (&x)[kRows]) const {
    const float rho = float(rule.rho[0]), lacking = rho * x[0], twice = 2 * lacking;
    float total = 0, sums[kPairs + kRows - 1], of_warp[2];
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) total += m < f.members ? x[m] : 0;
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) x[m] = multiply_add(float(rule.rho[m]), x[m], float(rule.rho[m] - rule.rho[0]) * x[0]);
    x[0] = rho * (total / (sqrtf(float(f.members)) - 1));
    FORDE_UNROLL for (int i = 0; i < kRows; ++i)
      FORDE_UNROLL for (int j = i + 1; j < kRows; ++j) {
        const float difference = x[j] - x[i];
        sums[pair(i, j)] = difference * difference;
        if (i == 0) sums[kPairs + j - 1] = difference * ((x[j] + x[0]) + twice);
      }
    add_over_warp(block, sums, of_warp);
    FORDE_UNROLL for (int part = 0; part < 2; ++part) rule.partial[block.warp()][part * 32 + block.lane()] = of_warp[part];
    block.sync();
    if (block.thread() < 64) {
      double all = 0;
      FORDE_UNROLL for (int n = 0; n < kRowThreads / 32; ++n) all += rule.partial[n][block.thread()];
      rule.far[block.thread()] = all;
    }
    block.sync();
  }

  // From the sums to distances, bandwidth and weights.
  FORDE_INLINE void weigh(int sample) const {
    const int M = f.members, thread = block.thread(), i = thread / M, j = thread % M;
    const bool own = thread < M * M;
    const double unit = f.unit / kHalfUnit * (f.unit / kHalfUnit);
    double far = 0, near = 0;
    if (own && i != j) {
      const int at = i < j ? pair(i, j) : pair(j, i);
      const double a = rule.rho[i], b = rule.rho[j], of_pair = a * b * rule.near[at];
      far = rule.far[at];
      near = of_pair + (a - b) * (a * rule.near[kPairs + i] - b * rule.near[kPairs + j]);
      near = near < 0 ? 0 : near;  // NaN stays NaN
      if (of_pair > 4 * near) *workspace<int>(f, p.at.again) = 1;
    }
    const float d = near == 0 ? 0 : float(unit * far + f.tail * near);  // equal rows have no distance
    if (own) {
      rule.d[thread] = d;
      f.distances[thread * f.groups + sample] = d;
    }
    block.sync();
    find_medians<kRowThreads>(block, rule.d, M, rule.lower, rule.upper);
    if (own) {
      const auto growth = [&](int n) { return n == 0 ? 0 : rule.far[kPairs + n - 1]; };
      const auto missing = [&](int n) { return f.eps * rule.r[n] * rule.r[n]; };  // 1 - |s_n|^2
      const float h = float((double(rule.lower[j]) + rule.upper[j]) * p.per_median + 1e-12), inverse = 1 / h;
      const float kernel = expf(-d * inverse), w = d == 0 ? 0 : kernel * inverse;
      const double half = 0.5 * (unit * (far + growth(i) - growth(j)) + f.tail * (near + missing(j) - missing(i)));
      rule.row(rule.kWeight, i)[j] = w;
      rule.row(rule.kKernel, i)[j] = kernel;
      rule.row(rule.kLength, i)[j] = w * sqrtf(float(far));
      rule.row(rule.kAligned, i)[j] = w * float(half);
      if (i == 0) f.bandwidth[j * f.groups + sample] = h;
    }
    block.sync();
    if (thread < rule.kCount * kRows) {
      float total = 0;
      FORDE_UNROLL for (int k = 0; k < kRows; ++k) total += rule.parts[thread * kMixing + k];
      const bool length = thread / kRows == rule.kLength;  // there may be nothing beside the kernel value 1 of the row itself
      rule.sums[thread] = !length ? total : total < 1e-30f ? 1 : kMixedUnit / total;
    }
    block.sync();
    if (thread < M) rows[thread] += rule.sum(rule.kKernel, thread);
  }

  // Of row i on the way up, but for its scale: what the tail's part takes of row 0 and of the differences of rows n to
  // it; behind these what a product takes, and 1 / norm. What lies along s_i is s_0's and the difference's.
  FORDE_INLINE void write_mixing(int sample) const {
    const int i = block.thread() / kMixing, n = block.thread() % kMixing;
    if (i >= f.members) return;
    float x = -rule.sum(rule.kAligned, i);
    if (n == kRows) x = float(f.unit * f.unit / kHalfUnit) / rule.sum(rule.kLength, i);
    if (n == kRows + 1) x = rule.r[i];
    if (n >= 1 && n < kRows)
      x = float(f.tail) * ((n == i ? rule.sum(rule.kWeight, i) : 0) - rule.row(rule.kWeight, i)[n]) + (n == i ? x : 0);
    workspace<float>(f, p.at.mixing)[int64_t(sample) * kRows * kMixing + block.thread()] = x;
  }

  // The rows of y, as the matrix units want them.
  FORDE_INLINE void write_mixed(int sample, const float (&x)[kRows]) const {
    const int column = block.thread(), row = sample % kGroup * kRows;
    if (column >= kRank) return;
    Half* y = workspace<Half>(f, p.at.y) + int64_t(sample / kGroup) * kTileRows * kRank + column / 8 * (kTileRows * 8) + row * 8 + column % 8;
    FORDE_UNROLL for (int i = 0; i < kRows; ++i) {
      float total = 0;
      FORDE_UNROLL for (int j = 0; j < kRows; ++j) total = multiply_add(rule.row(rule.kWeight, i)[j], x[i] - x[j], total);
      if (i < f.members) y[i * 8] = to_half(total * rule.sum(rule.kLength, i));
    }
  }

  FORDE_INLINE void find(int sample) {
    static_assert(kRows + 2 == kMixing && kRows * kMixing <= kRowThreads, "");
    block.forget();
    float x[kRows] = {};
    find_rows(sample, x);
    add_sums(x);
    weigh(sample);
    write_mixing(sample);
    write_mixed(sample, x);
    block.sync();
  }
};

}  // namespace forde_fast
