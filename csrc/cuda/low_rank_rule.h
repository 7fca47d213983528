// The rule of one sample on the way of low_rank_kernel.h: from its K columns and sums to distances, bandwidth and what
// the way up takes. The warps that multiply find what needs no columns, while the others read them.
#pragma once

#include "low_rank_item.h"

namespace forde_fast {

constexpr float kMixedUnit = 4096;  // the most that a number of `y` can be

constexpr int kLowRankPairs = kLowRankMembers * (kLowRankMembers - 1) / 2;
constexpr int pair(int i, int j) { return i * (2 * kLowRankMembers - i - 1) / 2 + j - i - 1; }  // i < j: row after row

// What a sample's rule needs of shared memory.
struct RuleOfSample {
  static constexpr int kRows = kLowRankMembers, kSquare = kRows * kRows;

  // Of rows i and j: kernel / h, which is 0 where d = 0 and of rows that are not there; the kernel; the weight times
  // |q_i - q_j|, and times (q_i - q_j) s_i. And their sums over j, but of the lengths the unit of row i of y.
  enum Part { kWeight, kKernel, kLength, kAligned, kCount };
  alignas(16) float parts[kCount * kRows * kMixing];
  float sums[kCount * kRows];

  FORDE_INLINE float* row(Part part, int i) { return parts + (part * kRows + i) * kMixing; }
  FORDE_INLINE float& sum(Part part, int i) { return sums[part * kRows + i]; }

  float d[kSquare], lower[kRows], upper[kRows], r[kRows];
  double rho[kRows];
  float to_s[kRows], beyond[kRows];  // rho; rho less row 0's
  double sums_near[64];  // without F: distances of pairs of rows s' and, behind them, squares
  double near[kSquare];  // distances of pairs of rows s
  float far[kSquare];    // with F
  float growth[kRows];   // of s^T F F^T s from row 0 to each
  alignas(16) float x[kRows + 1][kMostRank];  // rows of s^T F less what all lack; and twice row 0 as it is
};

constexpr int kSplits = 8;  // whose sums come together

// Where sums come to before the rule is found.
template <int kRank>
struct SumsOfSplits {
  SumsOfSample<kRank> of[2][kSplits];
};

// By the last two of the warps that multiply.
template <class Block>
struct RuleWithoutF {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  RuleOfSample& rule;

  static constexpr int kRows = kLowRankMembers, kPairs = kLowRankPairs, kThreads = 64;

  FORDE_INLINE int thread() const { return block.thread() - (kProductThreads - kThreads); }

  // Sums over the splits, a thread's pair or square; and 1 / norm.
  FORDE_INLINE void add_splits(int sample) const {
    const int thread = this->thread();
    const bool squares = thread >= kPairs && thread < kPairs + kRows;
    const double r = squares ? workspace<float>(f, p.at.norms)[sample * kRows + thread - kPairs] : 0;
    const float* pairs = workspace<float>(f, p.at.pairs) + (int64_t(sample / kGroup) * p.splits * kGroup + sample % kGroup) * 64 + thread;
    double total = 0;
    FORDE_ROLLED for (int split = 0; split < p.splits; split += kSplits) {
      float own[kSplits];
      FORDE_UNROLL for (int n = 0; n < kSplits; ++n) own[n] = split + n < p.splits ? pairs[(split + n) * kGroup * 64] : 0;
      FORDE_UNROLL for (int n = 0; n < kSplits; ++n) total += own[n];
    }
    rule.sums_near[thread] = total;
    if (!squares) return;
    const int m = thread - kPairs;
    const double rho = m < f.members ? inverse_root(total + f.eps * r * r) : 1;
    rule.rho[m] = rho;
    rule.to_s[m] = float(rho);
    rule.r[m] = float(r * rho);
    if (!(rho > kLeastRho && rho < kMostRho)) *workspace<int>(f, p.at.again) = 1;
  }

  // Of rows that are not there.
  FORDE_INLINE void clear() const {
    for (unsigned n = block.thread(); n < rule.kCount * kRows * kMixing; n += kProductThreads) rule.parts[n] = 0;
  }

  FORDE_INLINE void find(int sample) const {
    const int thread = this->thread(), i = thread % kRows, apart = thread / kRows + 1, j = (i + apart) % kRows;
    if (thread < 0) return;
    add_splits(sample);
    block.sync(kRuleBarrier, kThreads);
    if (thread < kRows) {
      rule.beyond[thread] = float(rule.rho[thread] - rule.rho[0]);
      rule.near[thread * (kRows + 1)] = 0;
    }
    if (i >= f.members || j >= f.members || apart > kRows / 2) return;
    const double a = rule.rho[i], b = rule.rho[j], of_pair = a * b * rule.sums_near[i < j ? pair(i, j) : pair(j, i)];
    double near = of_pair + (a - b) * (a * rule.sums_near[kPairs + i] - b * rule.sums_near[kPairs + j]);
    near = near < 0 ? 0 : near;  // NaN stays NaN
    if (of_pair > 4 * near) *workspace<int>(f, p.at.again) = 1;
    rule.near[i * kRows + j] = near;
    if (apart < kRows / 2) rule.near[j * kRows + i] = near;
  }
};

// By the warps that work on rows.
template <int kRank, class Block>
struct LowRankRule {
  RowWarps<Block> block;
  const LowRank& f;
  const LowRankPlan& p;
  RuleOfSample& rule;
  double* const rows;  // sums of kernel values over j and the block's samples
  SumsOfSplits<kRank>& sums;
  Ring<2>& arrivals;
  int turn = 0;

  static constexpr int kRows = kLowRankMembers;

  // The column whose sums a thread finds; those of two that are read together are eight apart.
  FORDE_INLINE int own_column() const {
    const int thread = block.thread() % kRank;
    return thread / 16 * 16 + thread % 2 * 8 + thread / 2 % 8;
  }

  // The sums of some splits, from `round` on; none behind the last. By the first of the threads that wait for them.
  FORDE_INLINE void copy_sums(int sample, int round) const {
    const int splits = p.splits - round * kSplits, bytes = sizeof(SumsOfSample<kRank>);
    if (splits <= 0) return;
    const int count = splits < kSplits ? splits : kSplits;
    const auto* from = workspace<SumsOfSample<kRank>>(f, p.at.x) + (int64_t(sample / kGroup) * p.splits + round * kSplits) * kGroup + sample % kGroup;
    Arrival* arrival = arrivals.expect(block.block, turn + round, count * bytes);
    FORDE_ROLLED for (int n = 0; n < count; ++n) block.block.copy(&sums.of[(turn + round) % 2][n], from + n * kGroup, bytes, arrival);
  }

  // The rows of x: sums over the splits.
  FORDE_INLINE void find_rows(int sample, float (&x)[kRows]) {
    const int thread = block.thread() % kRank, rounds = (p.splits + kSplits - 1) / kSplits;
    if (block.thread() == 0) {
      block.block.fence_of_global();
      copy_sums(sample, 0), copy_sums(sample, 1);
    }
    FORDE_ROLLED for (int round = 0; round < rounds; ++round) {
      arrivals.wait(block.block, turn + round);
      const SumsOfSample<kRank>* own = sums.of[(turn + round) % 2];
      FORDE_UNROLL for (int n = 0; n < kSplits; ++n) {
        if (round * kSplits + n >= p.splits) break;
        FORDE_UNROLL for (int m = 0; m < kRows / 2; ++m) {
          const Two part = reinterpret_cast<const Two*>(own[n].of[thread / 64][m])[thread % 64];
          x[2 * m] += part.of[0], x[2 * m + 1] += part.of[1];
        }
      }
      if (round + 2 >= rounds) continue;
      block.sync();
      if (block.thread() == 0) copy_sums(sample, round + 2);
    }
    turn += rounds;
  }

  // From contrasts to the rows of x up to what all lack.
  FORDE_INLINE void find_x(float (&x)[kRows]) const {
    const float rho = rule.to_s[0], lacking = rho * x[0];
    float total = 0;
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) total += m < f.members ? x[m] : 0;
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) x[m] = multiply_add(rule.to_s[m], x[m], rule.beyond[m] * x[0]);
    x[0] = rho * (total * p.per_total);
    if (block.thread() < kRank) {
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) rule.x[m][block.thread()] = x[m];
      rule.x[kRows][block.thread()] = 2 * (x[0] + lacking);
    }
    block.sync();
  }

  // Sums over the columns, four threads for each: of rows i and (i + k) % kRows for k up to half of kRows, and of row i
  // and row 0. A loop, as its code is cold; equal rows have equal sums, as all are in one order.
  FORDE_INLINE void add_columns() const {
    const unsigned thread = block.thread(), n = thread / 4, k = n / kRows + 1, i = n % kRows, j = (i + k) % kRows;
    const bool growth = k == kRows / 2 + 1;
    static_assert(kRows % 2 == 0 && (kRows / 2 + 1) * kRows * 4 <= kRowThreads, "");
    const float *one = rule.x[i], *other = rule.x[growth ? 0 : j];
    float sums[2] = {};
    FORDE_ROLLED for (unsigned first = thread % 4 * 4; first < kRank; first += 32)
      FORDE_UNROLL for (unsigned half = 0; half < 2; ++half) {
        const unsigned column = first + (half + n) % 2 * 16;  // of two sums that are read together in different banks
        const Four a = load_four(one + column), b = load_four(other + column), c = growth ? load_four(rule.x[kRows] + column) : Four{};
        FORDE_UNROLL for (int v = 0; v < 4; ++v) {
          const float difference = a.of[v] - b.of[v];
          sums[half] = multiply_add(difference, difference + c.of[v], sums[half]);
        }
      }
    float total = sums[0] + sums[1];
    total += block.shuffle(total, 1);
    total += block.shuffle(total, 2);
    if (thread % 4 == 0 && growth) rule.growth[i] = total;
    if (thread % 4 == 0 && k <= kRows / 2) rule.far[i * kRows + j] = total;
    if (thread % 4 == 0 && k < kRows / 2) rule.far[j * kRows + i] = total;
    block.sync();
  }

  // From the sums to distances, bandwidth and weights.
  FORDE_INLINE void weigh(int sample) const {
    const unsigned M = f.members, thread = block.thread(), i = thread / kRows, j = thread % kRows;
    const bool own = i < M && j < M;
    const double far = own && i != j ? rule.far[thread] : 0, near = own ? rule.near[thread] : 0;
    const auto missing = [&](unsigned n) { return f.eps * rule.r[n] * rule.r[n]; };  // 1 - |s_n|^2
    const float half = own ? float(0.5 * (p.far_unit * (far + rule.growth[i] - rule.growth[j]) + f.tail * (near + missing(j) - missing(i)))) : 0;
    const float length = far > 0 ? float(far) * inverse_root(float(far)) : 0;
    const float d = near == 0 ? 0 : float(p.far_unit * far + f.tail * near);  // equal rows have no distance
    if (thread < rule.kSquare) rule.d[thread] = own ? d : INFINITY;
    if (own) f.distances[(i * M + j) * f.groups + sample] = d;
    block.sync();
    if (own) find_median(rule.d + j, kRows, kRows, M, i, rule.lower[j], rule.upper[j]);
    block.sync();
    if (own) {
      const float h = multiply_add(rule.lower[j] + rule.upper[j], p.per_median, 1e-12f), per_h = inverse(h);
      const float kernel = expf(-d * per_h), w = d == 0 ? 0 : kernel * per_h;
      rule.row(rule.kWeight, i)[j] = w;
      rule.row(rule.kKernel, i)[j] = kernel;
      rule.row(rule.kLength, i)[j] = w * length;
      rule.row(rule.kAligned, i)[j] = w * half;
      if (i == 0) f.bandwidth[j * f.groups + sample] = h;
    }
    block.sync();
    if (thread < rule.kCount * kRows) {
      float total = 0;
      FORDE_UNROLL for (int k = 0; k < kRows; ++k) total += rule.parts[thread * kMixing + k];
      const bool length = thread / kRows == rule.kLength;  // there may be nothing beside the kernel value 1 of the row itself
      rule.sums[thread] = !length ? total : total < 1e-30f ? 1 : kMixedUnit * inverse(total);
    }
    block.sync();
    if (thread < M) rows[thread] += rule.sum(rule.kKernel, thread);
  }

  // Of row i on the way up, but for its scale: what the tail's part takes of row 0 and of the differences of rows n to
  // it; behind these what a product takes, and 1 / norm. What lies along s_i is s_0's and the difference's.
  FORDE_INLINE void write_mixing(int sample) const {
    const unsigned i = unsigned(block.thread()) / kMixing, n = unsigned(block.thread()) % kMixing;
    if (i >= unsigned(f.members)) return;
    float x = -rule.sum(rule.kAligned, i);
    if (n == kRows) x = p.mixed_unit * inverse(rule.sum(rule.kLength, i));
    if (n == kRows + 1) x = rule.r[i];
    if (n >= 1 && n < kRows)
      x = float(f.tail) * ((n == i ? rule.sum(rule.kWeight, i) : 0) - rule.row(rule.kWeight, i)[n]) + (n == i ? x : 0);
    workspace<float>(f, p.at.mixing)[int64_t(sample) * kRows * kMixing + block.thread()] = x;
  }

  // The rows of y, as the matrix units want them.
  FORDE_INLINE void write_mixed(int sample, const float (&x)[kRows]) const {
    const int thread = block.thread(), column = own_column();
    if (thread >= kRank) return;
    Half* y = workspace<Half>(f, p.at.y) + int64_t(sample / kGroup) * kTileRows * kRank + column / 8 * (kTileRows * 8) +
              place_of_row(sample % kGroup, 0) * 8 + column % 8;
    FORDE_ROLLED for (int i = 0; i < f.members; i += 2, y += 64) {  // two, of which none waits for the other
      float total[2] = {}, own[2];
      Four weights[2][kMixing / 4];
      FORDE_UNROLL for (int n = 0; n < 2; ++n) {
        own[n] = rule.x[i + n][thread];
        FORDE_UNROLL for (int k = 0; k < kMixing / 4; ++k) weights[n][k] = load_four(rule.row(rule.kWeight, i + n) + 4 * k);
      }
      FORDE_UNROLL for (int j = 0; j < kRows; ++j)
        FORDE_UNROLL for (int n = 0; n < 2; ++n) total[n] = multiply_add(weights[n][j / 4].of[j % 4], own[n] - x[j], total[n]);
      FORDE_UNROLL for (int n = 0; n < 2; ++n) y[8 * n] = to_half(total[n] * rule.sum(rule.kLength, i + n));
    }
  }

  // From the rows of x, when all that needs no F has been found.
  FORDE_INLINE void find(int sample, float (&x)[kRows]) const {
    static_assert(kRows + 2 == kMixing && kRows * kMixing <= kRowThreads, "");
    find_x(x);
    add_columns();
    weigh(sample);
    write_mixing(sample);
    write_mixed(sample, x);
  }
};

}  // namespace forde_fast
