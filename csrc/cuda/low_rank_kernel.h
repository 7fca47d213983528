// The kernel of low_rank.h, for any Block: low_rank.cu has the one of a GPU, tests/ one for the host.
//
// Four stages with a barrier over the grid after each of the first three. Squares of the rows; then, with their norms,
// the way down: contrasts in float16 times F by the matrix units, while distances without C come from differences;
// then each sample's rule, from K columns; and the way up: what is mixed of these columns times F^T by the matrix
// units, while the tail's part is mixed from the rows. Particles pass by three times, the first time to bring them on
// the chip where they fit its level-2 cache.
//
// Contrasts (Householder's, of which the first row holds the vector u that all of a sample lack) are the differences of
// its rows: 11 bits of them are what tf32 leaves of the rows themselves, or better. Compiled without multiply-add
// contraction, with all sums in a fixed order: equal rows stay equal.
#pragma once

#include "block_steps.h"
#include "half.h"
#include "low_rank.h"

namespace forde_fast {

constexpr float kHalfUnit = 8192;   // of contrasts in float16: of unit vectors, they are at most 3.5 long
constexpr float kMixedUnit = 4096;  // the most that a number of `y` can be

template <int kRank, class Block>
struct LowRankKernel {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  char* const shared;

  static constexpr int kRows = kLowRankMembers, kPairs = kRows * (kRows - 1) / 2, kSquare = kRows * kRows;
  static constexpr int kThreads = kLowRankThreads;

  // What stays in shared memory; beside it what the stage at work needs.
  struct Small {
    float r[kTileRows], factor[kTileRows];  // 1 / norm; of a row's product with F^T. Row 10 s + m is sample s's member m
    float mixing[kGroup][kRows][12];        // of the way up: of row i itself, then of the differences n to row 0
    double rows[kRows], scale[kRows];       // sums of kernel values over j and the samples; -2 / G / rows
  };

  FORDE_INLINE Small& small() const { return *reinterpret_cast<Small*>(shared); }
  template <class T>
  FORDE_INLINE T& room() const {
    static_assert(sizeof(Small) % 16 == 0 && sizeof(Small) + sizeof(T) <= kLowRankShared, "");
    return *reinterpret_cast<T*>(shared + sizeof(Small));
  }
  template <class T>
  FORDE_INLINE T* in_workspace(int64_t offset) const {
    return reinterpret_cast<T*>(f.workspace + offset);
  }
  FORDE_INLINE int warp() const { return block.thread() / 32; }
  FORDE_INLINE int lane() const { return block.thread() % 32; }
  FORDE_INLINE int quad() const { return warp() / 4; }  // of the two groups of four warps that the matrix units work for

  static constexpr int pair(int i, int j) { return i * (2 * kRows - i - 1) / 2 + j - i - 1; }

  // The columns of an item, and its first sample.
  struct Range {
    int64_t from;
    int count, first;
  };
  FORDE_INLINE Range range(int item) const {
    const int64_t from = int64_t(item % p.splits) * p.width;
    const int64_t rest = f.columns - from;
    return {from, int(rest < p.width ? rest : p.width), item / p.splits * kGroup};
  }

  // A warp's sample: whether there is one, and its columns of row 0.
  FORDE_INLINE bool there(const Range& own) const { return own.first + warp() < f.groups; }
  FORDE_INLINE const float* rows_of(const Range& own) const { return f.particles + (own.first + warp()) * f.stride_g + own.from; }

  // --- squares of the rows ---

  FORDE_INLINE void add_squares(int item) const {
    const Range own = range(item);
    if (!there(own)) return;
    const float* rows = rows_of(own) + 4 * lane();
    float x[kRows] = {};
    FORDE_FOUR_TIMES for (int k = 4 * lane(); k < own.count; k += 128, rows += 128) {
      Four v[kRows];
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) v[m] = load_four(rows + (m < f.members ? m : 0) * f.stride_m);
      FORDE_UNROLL for (int m = 0; m < kRows; ++m)
        FORDE_UNROLL for (int n = 0; n < 4; ++n) x[m] = multiply_add(v[m].of[n], v[m].of[n], x[m]);
    }
    float total[1];
    add_over_warp(block, x, total);
    if (lane() < kRows) in_workspace<float>(p.at.squares)[item * kTileRows + warp() * kRows + lane()] = total[0];
  }

  // The sum over the splits of a group of the numbers at `from`, `step` apart.
  FORDE_INLINE double add_splits(const float* from, int step) const {
    double total = 0;
    FORDE_EIGHT_TIMES for (int split = 0; split < p.splits; ++split) total += from[split * step];
    return total;
  }

  FORDE_INLINE void find_norms(int item) const {
    const int row = block.thread(), group = item / p.splits;
    block.sync();
    if (row < kTileRows) {
      const int64_t sample = int64_t(group) * kGroup + row / kRows;
      float r = 0;
      if (sample < f.groups && row % kRows < f.members) {
        const double square = f.eps + add_splits(in_workspace<float>(p.at.squares) + group * p.splits * kTileRows + row, kTileRows);
        r = float(square < INFINITY ? 1 / sqrt(square) : NAN);  // a row that overflowed is not a row of zeros
      }
      small().r[row] = r;
      if (item % p.splits == 0) in_workspace<float>(p.at.norms)[sample * kRows + row % kRows] = r;
    }
    block.sync();
  }

  // kColumns of the rows of a warp's sample from column k of the range on, [kTileRows, kStride]; zeros where none are.
  template <int kColumns, int kStride>
  FORDE_INLINE void copy_rows(float* to, const Range& own, int k) const {
    constexpr int kLanes = kColumns / 4, kAtOnce = 32 / kLanes;
    const int column = lane() % kLanes * 4, first = lane() / kLanes;
    const bool inside = there(own) && k + column < own.count;
    const float* from = rows_of(own) + first * f.stride_m + k + column;
    to += (warp() * kRows + first) * kStride + column;
    FORDE_UNROLL for (int m = 0; m < kRows; m += kAtOnce, from += kAtOnce * f.stride_m) {
      const bool own_row = inside && m + first < f.members;
      block.copy_16_bytes(to + m * kStride, own_row ? from : f.particles, own_row);
    }
  }

  // kCount rows and kColumns columns of the factor, whose tiles of 8 by 8 lie as the matrix units want them.
  template <int kCount, int kColumns>
  FORDE_INLINE void copy_factor(char* to, const Range& own, int k, int column) const {
    constexpr int kAtOnce = kThreads / kColumns;  // eight rows of so many columns are as many copies
    static_assert(kThreads % kColumns == 0, "");
    const int first = block.thread() / kColumns, place = block.thread() % kColumns * 16;
    const char* from = static_cast<const char*>(f.factor) + ((own.from + k) / 8 + first) * (kRank * 16) + column * 16 + place;
    to += block.thread() * 16;
    FORDE_UNROLL for (int n = 0; n < kCount / 8; n += kAtOnce, from += kAtOnce * kRank * 16) block.copy_16_bytes(to + n * (kColumns * 16), from);
  }

  // Of one column.
  FORDE_INLINE void contrasts(const float (&s)[kRows], float (&z)[kRows]) const {
    const float root = sqrtf(float(f.members));
    float total = 0;
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) {
      z[m] = s[m] - s[0];
      total += m < f.members ? z[m] : 0;
    }
    total *= 1 / (f.members - root);
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) z[m] = (z[m] - total) * kHalfUnit;
    z[0] = (s[0] + total) * kHalfUnit;
  }

  // --- down: x^T [K, rows] = F^T [K, D] z^T [D, rows] ---

  static constexpr int kDownTiles = kRank / 128;  // of 64 rows of x^T, for a quad
  static constexpr int kDownStages = 3;           // on their way, waiting, in use

  // z in tiles; a column of tiles begins 16 bytes farther in the 128 of all banks than the one before.
  struct Contrasts {
    char z[kDownColumns / 8 * (kTileRows * 16 + 16)];
    FORDE_INLINE Operand operand() { return {reinterpret_cast<Half*>(z), 128, kTileRows * 16 + 16}; }
  };
  struct Down {
    float p[kDownStages][kTileRows * kDownColumns];
    char factor[kDownStages][kDownColumns * kRank * 2];
    Contrasts z[2];
    FORDE_INLINE Operand operand(int stage) { return {reinterpret_cast<Half*>(factor[stage]), 128, kRank * 16}; }
  };

  FORDE_INLINE void copy_down(Down& down, const Range& own, int chunk) const {
    const int k = chunk * kDownColumns, stage = chunk % kDownStages;
    if (k < own.count) {
      copy_rows<kDownColumns, kDownColumns>(down.p[stage], own, k);
      copy_factor<kDownColumns, kRank>(down.factor[stage], own, k, 0);
    }
    block.commit_copies();
  }

  // Two columns of a warp's sample for each lane: their part of the distances, and their contrasts to z.
  FORDE_INLINE void add_pairs(const float* rows, Contrasts& z, const float (&r)[kRows], float (&sums)[kPairs]) const {
    const float* own = rows + warp() * kRows * kDownColumns + 2 * lane();
    float s[2][kRows], contrast[2][kRows];
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) {
      const Two two = load_two(own + m * kDownColumns);
      FORDE_UNROLL for (int v = 0; v < 2; ++v) s[v][m] = two.of[v] * r[m];
    }
    FORDE_UNROLL for (int v = 0; v < 2; ++v) {
      FORDE_UNROLL for (int i = 0; i < kRows; ++i)
        FORDE_UNROLL for (int j = i + 1; j < kRows; ++j) {
          const float difference = s[v][i] - s[v][j];
          sums[pair(i, j)] = multiply_add(difference, difference, sums[pair(i, j)]);
        }
      contrasts(s[v], contrast[v]);
    }
    char* out = z.z + lane() / 4 * (kTileRows * 16 + 16) + lane() % 4 * 4;
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) store_two(reinterpret_cast<Half*>(out + (warp() * kRows + m) * 16), contrast[0][m], contrast[1][m]);
  }

  FORDE_INLINE void multiply_down(Operand factor, Operand z, float (&x)[kDownTiles][40]) const {
    block.start_products();
    FORDE_UNROLL for (int k = 0; k < kDownColumns; k += 16)
      FORDE_UNROLL for (int tile = 0; tile < kDownTiles; ++tile)
        block.template multiply_add<true>(x[tile], factor.from((quad() * kDownTiles + tile) * 64, k), z.from(0, k));
    block.commit_products();
  }

  FORDE_INLINE void go_down(int item) const {
    const Range own = range(item);
    Down& down = room<Down>();
    find_norms(item);
    copy_down(down, own, 0);
    copy_down(down, own, 1);
    float r[kRows], sums[kPairs] = {}, x[kDownTiles][40] = {};
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) r[m] = small().r[warp() * kRows + m];
    FORDE_ROLLED for (int chunk = -1; chunk * kDownColumns < own.count; ++chunk) {  // products are one behind
      block.template wait_for_copies<0>();
      block.sync_for_products();  // the next rows, these contrasts; and the last chunk's products have been found
      if (chunk >= 0) {
        multiply_down(down.operand(chunk % kDownStages), down.z[chunk % 2].operand(), x);
        copy_down(down, own, chunk + 2);
      }
      const int next = chunk + 1;
      if (next * kDownColumns < own.count) add_pairs(down.p[next % kDownStages], down.z[next % 2], r, sums);
      block.wait_for_products(x);
    }
    float* out = in_workspace<float>(p.at.x) + int64_t(item) * kTileRows * kRank;
    FORDE_UNROLL for (int tile = 0; tile < kDownTiles; ++tile)
      FORDE_UNROLL for (int n = 0; n < 40; ++n) {
        const int row = n / 4 * 8 + lane() % 4 * 2 + n % 2, column = (quad() * kDownTiles + tile) * 64 + warp() % 4 * 16 + lane() / 4 + n % 4 / 2 * 8;
        out[row * kRank + column] = x[tile][n];
      }
    float totals[2];
    add_over_warp(block, sums, totals);
    FORDE_UNROLL for (int part = 0; part < 2; ++part)
      in_workspace<float>(p.at.pairs)[(item * kGroup + warp()) * 64 + part * 32 + lane()] = totals[part];
  }

  // --- the rule ---

  struct Rule {
    double sums[64], tail[64];  // distances of pairs, with F, and growths behind them; without F
    double d[kSquare], kernel[kSquare], mixed[kSquare], lower[kRows], upper[kRows];
    float w[kSquare], size[kSquare], r[kRows], unit[kRows], partial[kGroup * 64];
  };

  // Column thread() of the rows of x, row 0 what the others leave; the sums of the sample.
  FORDE_INLINE void find_sums(int sample, float (&x)[kRows]) const {
    Rule& rule = room<Rule>();
    const int M = f.members, thread = block.thread(), group = sample / kGroup, place = sample % kGroup;
    float sums[kPairs + kRows - 1] = {};
    if (thread < 64) {
      rule.tail[thread] = add_splits(in_workspace<float>(p.at.pairs) + (group * p.splits * kGroup + place) * 64 + thread, kGroup * 64);
      rule.sums[thread] = 0;
      if (thread < kSquare - 64) rule.w[thread + 64] = 0;  // w of rows that are not there
      rule.w[thread] = 0;
    } else if (thread < 64 + kRows) {
      rule.r[thread - 64] = in_workspace<float>(p.at.norms)[sample * kRows + thread - 64];
    }
    if (thread < kRank) {
      const float* from = in_workspace<float>(p.at.x) + (int64_t(group) * p.splits * kTileRows + place * kRows) * kRank + thread;
      FORDE_FOUR_TIMES for (int split = 0; split < p.splits; ++split, from += kTileRows * kRank)
        FORDE_UNROLL for (int m = 0; m < kRows; ++m) x[m] += from[m * kRank];
      const float shift = x[0];
      float total = 0;
      FORDE_UNROLL for (int m = 1; m < kRows; ++m) total += m < M ? x[m] : 0;
      x[0] = total / (sqrtf(float(M)) - 1);
      FORDE_UNROLL for (int i = 0; i < kRows; ++i)
        FORDE_UNROLL for (int j = i + 1; j < kRows; ++j) sums[pair(i, j)] = (x[i] - x[j]) * (x[i] - x[j]);
      FORDE_UNROLL for (int m = 1; m < kRows; ++m) sums[kPairs + m - 1] = (x[m] - x[0]) * ((x[m] + x[0]) + 2 * shift);
    }
    block.sync();
    add_over_threads<kThreads>(block, sums, rule.partial, rule.sums);
  }

  // From the sums to distances, bandwidth and w = kernel / h; the rows of kernel values to small().rows.
  FORDE_INLINE void weigh(int sample) const {
    Rule& rule = room<Rule>();
    const int M = f.members, thread = block.thread(), i = thread / M, j = thread % M;
    const bool own = thread < M * M;
    const double unit = f.unit / kHalfUnit * (f.unit / kHalfUnit);
    const double sum = own && i != j ? rule.sums[i < j ? pair(i, j) : pair(j, i)] : 0;
    const double tail = own && i != j ? rule.tail[i < j ? pair(i, j) : pair(j, i)] : 0;
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
      in_workspace<float>(p.at.weights)[int64_t(sample) * kSquare + i * kRows + j] = float(w);
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
      small().rows[thread] += kernel;
      rule.unit[thread] = size == 0 ? 1 : kMixedUnit / size;
      in_workspace<float>(p.at.unit)[int64_t(sample) * kRows + thread] = rule.unit[thread];
      in_workspace<float>(p.at.aligned)[int64_t(sample) * kRows + thread] = float(aligned);
    }
    block.sync();
  }

  FORDE_INLINE void find_rule(int sample) const {
    const Rule& rule = room<Rule>();
    float x[kRows] = {};
    find_sums(sample, x);
    weigh(sample);
    if (block.thread() < kRank) {  // as the matrix units want them
      const int column = block.thread(), row = sample % kGroup * kRows;
      Half* y = in_workspace<Half>(p.at.y) + int64_t(sample / kGroup) * kTileRows * kRank + column / 8 * (kTileRows * 8) + row * 8 + column % 8;
      FORDE_UNROLL for (int i = 0; i < kRows; ++i) {
        float total = 0;
        FORDE_UNROLL for (int j = 0; j < kRows; ++j)
          if (j != i) total = multiply_add(rule.w[i * kRows + j], x[i] - x[j], total);
        if (i < f.members) y[i * 8] = to_half(total * rule.unit[i]);
      }
    }
    block.sync();
  }

  // --- up: gradient^T [D, rows] = F [D, K] y^T [K, rows], and the tail ---

  static constexpr int kUpStride = kUpColumns + 4;
  static constexpr int kPieces = 3;  // each half of the columns of F: two at work, one on its way

  struct Up {
    float p[2][kTileRows * kUpStride];
    char y[kTileRows * kRank * 2], factor[kPieces][kUpColumns * kRank];
    FORDE_INLINE Operand mixed() { return {reinterpret_cast<Half*>(y), 128, kTileRows * 16}; }
    FORDE_INLINE Operand operand(int piece) { return {reinterpret_cast<Half*>(factor[piece % kPieces]), kRank * 8, 128}; }
  };

  // What an item's rows have in common on all of its columns.
  FORDE_INLINE void load_mixed(int item, Up& up) const {
    const int M = f.members, row = block.thread(), i = row % kRows;
    const int64_t sample = range(item).first + row / kRows;
    const char* y = in_workspace<char>(p.at.y) + int64_t(item / p.splits) * sizeof up.y + row * 16;
    FORDE_UNROLL for (int n = 0; n < kTileRows * kRank / 8 / kThreads; ++n)
      block.copy_16_bytes(up.y + row * 16 + n * (kThreads * 16), y + n * (kThreads * 16));
    if (row >= kTileRows) return;
    const bool own_row = i < M && sample < f.groups;
    const int64_t at = own_row ? sample * kRows + i : 0;
    const float* w = in_workspace<float>(p.at.weights) + at * kRows;
    const float r = own_row ? in_workspace<float>(p.at.norms)[at] : 0, scale = float(small().scale[i < M ? i : 0]) * r;
    float own[kRows], all = 0;
    FORDE_UNROLL for (int n = 0; n < kRows; ++n) {
      own[n] = n < M ? w[n < M ? n : 0] : 0;
      all += own[n];
    }
    small().r[row] = r;
    small().factor[row] = scale * float(f.unit * f.unit / kHalfUnit) / in_workspace<float>(p.at.unit)[at];
    float* mixing = small().mixing[row / kRows][i];
    FORDE_UNROLL for (int n = 1; n < kRows; ++n) mixing[n] = float(f.tail) * scale * ((n == i ? all : 0) - own[n]);
    mixing[0] = -scale * in_workspace<float>(p.at.aligned)[at];
  }

  // In place of four columns of a warp's sample for each lane: the tail's part less what lies along the row.
  FORDE_INLINE void mix_rows(float* rows) const {
    float* own = rows + warp() * kRows * kUpStride + 4 * lane();
    Four s[kRows], e[kRows];
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) {
      s[m] = load_four(own + m * kUpStride);
      const float r = small().r[warp() * kRows + m];
      FORDE_UNROLL for (int v = 0; v < 4; ++v) {
        s[m].of[v] *= r;
        e[m].of[v] = s[m].of[v] - s[0].of[v];
      }
    }
    FORDE_UNROLL for (int i = 0; i < kRows; ++i) {
      Four total, weights[3];
      FORDE_UNROLL for (int n = 0; n < 3; ++n) weights[n] = load_four(small().mixing[warp()][i] + 4 * n);
      FORDE_UNROLL for (int v = 0; v < 4; ++v) total.of[v] = weights[0].of[0] * s[i].of[v];
      FORDE_UNROLL for (int n = 1; n < kRows; ++n)
        FORDE_UNROLL for (int v = 0; v < 4; ++v) total.of[v] = multiply_add(weights[n / 4].of[n % 4], e[n].of[v], total.of[v]);
      store_four(own + i * kUpStride, total);
    }
  }

  FORDE_INLINE void copy_piece(Up& up, const Range& own, int piece) const {
    const int k = piece / 2 * kUpColumns;
    if (k < own.count) copy_factor<kUpColumns, kRank / 2>(up.factor[piece % kPieces], own, k, piece % 2 * (kRank / 2));
  }

  FORDE_INLINE void multiply_up(Up& up, int piece, float (&out)[1][40]) const {
    block.start_products();
    FORDE_UNROLL for (int k = 0; k < kRank / 2; k += 16)
      block.template multiply_add<false>(out[0], up.operand(piece).from(quad() * 64, k), up.mixed().from(0, piece % 2 * (kRank / 2) + k));
    block.commit_products();
  }

  // The products to what was mixed.
  FORDE_INLINE void add_products(float* rows, const float (&out)[40]) const {
    rows += quad() * 64 + warp() % 4 * 16 + lane() / 4;
    FORDE_UNROLL for (int n = 0; n < 10; ++n) {
      const int row = n * 8 + lane() % 4 * 2;
      const Two factor = load_two(small().factor + row);
      FORDE_UNROLL for (int k = 0; k < 4; ++k) {
        float& sum = rows[(row + k % 2) * kUpStride + k / 2 * 8];
        sum = multiply_add(out[n * 4 + k], factor.of[k % 2], sum);
      }
    }
  }

  FORDE_INLINE void store(const float* rows, const Range& own, int k) const {
    if (!there(own) || k + 4 * lane() >= own.count) return;
    float* to = f.gradient + (own.first + warp()) * f.columns + own.from + k + 4 * lane();
    rows += warp() * kRows * kUpStride + 4 * lane();
    FORDE_UNROLL for (int m = 0; m < kRows; ++m, to += f.groups * f.columns)
      if (m < f.members) store_four(to, load_four(rows + m * kUpStride));
  }

  FORDE_INLINE void go_up(int item) const {
    const Range own = range(item);
    Up& up = room<Up>();
    block.sync();
    load_mixed(item, up);
    copy_rows<kUpColumns, kUpStride>(up.p[0], own, 0);
    copy_piece(up, own, 0);
    block.commit_copies();
    FORDE_ROLLED for (int tile = 0; tile * kUpColumns < own.count; ++tile) {
      float* rows = up.p[tile % 2];
      const int next = (tile + 1) * kUpColumns;
      float out[1][40] = {};
      block.template wait_for_copies<0>();
      block.sync_for_products();  // rows and the first piece of this tile; the last one has been stored
      copy_piece(up, own, 2 * tile + 1);
      block.commit_copies();
      if (next < own.count) copy_rows<kUpColumns, kUpStride>(up.p[(tile + 1) % 2], own, next);
      copy_piece(up, own, 2 * tile + 2);
      block.commit_copies();
      multiply_up(up, 2 * tile, out);
      mix_rows(rows);
      block.template wait_for_copies<1>();
      block.sync_for_products();  // the other piece, and what was mixed
      multiply_up(up, 2 * tile + 1, out);
      block.wait_for_products(out);
      add_products(rows, out[0]);
      block.sync();
      store(rows, own, tile * kUpColumns);
    }
    block.template wait_for_copies<0>();
    block.sync();  // the next item's rows may come
  }

  FORDE_INLINE void run() const {
    if (block.thread() < kRows) small().rows[block.thread()] = 0;
    FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) add_squares(item);
    block.sync_grid();
    FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) go_down(item);
    block.sync_grid();
    FORDE_ROLLED for (int sample = block.index(); sample < f.groups; sample += block.blocks()) find_rule(sample);
    add_over_blocks<kThreads, 16>(block, in_workspace<double>(p.at.rows), f.members, f.groups, small().rows, small().scale, f.value);
    FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) go_up(item);
  }
};

}  // namespace forde_fast
