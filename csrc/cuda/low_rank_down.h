// The way down of low_rank_kernel.h: x^T [K, rows] = F^T [K, D] z^T [D, rows] of contrasts z, and distances without F.
//
// A warp for each sample finds its rows' distances from differences and hands contrasts on in float16; the other warps
// multiply by them, one tile of columns behind.
#pragma once

#include "low_rank_item.h"
#include "low_rank_rule.h"

namespace forde_fast {

constexpr int kRowStages = 3;     // one in use, two on their way
constexpr int kFactorStages = 4;  // and one of which it is not known yet that all warps have multiplied by it

struct ArrivalsDown {
  Ring<kRowStages> rows;
  Ring<kFactorStages> factor;
};

template <int kRank>
struct SharedDown {
  static constexpr int kContrasts = kTileRows * 16 + 16;  // bytes of 8 columns of z: the next ones begin in other banks

  RowTile rows[kRowStages];
  FactorTile<kRank> factor[kFactorStages];
  char z[2][kColumns / 8 * kContrasts];
};

// By the warps that ask for copies: rows and F, as far ahead as there are buffers.
template <int kRank, class Block>
struct CopyDown {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  SharedDown<kRank>& shared;
  ArrivalsDown& arrivals;
  int turn = 0;  // tiles of the items before

  FORDE_INLINE void copy_rows(const Range& own, int tile) const {
    forde_fast::copy_rows(block, arrivals.rows, shared.rows, own, turn, tile);
  }
  FORDE_INLINE void copy_factor(const Range& own, int tile) const {
    forde_fast::copy_factor(block, f, arrivals.factor, shared.factor, own, turn, tile);
  }

  // The first rows: before all else, as code and what norms are found from take long to come too, and all the other copies
  // would delay these.
  FORDE_INLINE void start(int item) const {
    if (block.thread() == kCopier) copy_rows(range(f, p, item), 0);
  }

  FORDE_INLINE void run(int item) {
    const Range own = range(f, p, item);
    const bool asks = block.thread() == kCopier;
    if (turn > 0) {
      block.sync(kFound, kProductAndCopyThreads);  // the last item's products
      start(item);
    }
    static_assert(kRowStages == kFactorStages - 1, "");
    FORDE_ROLLED for (int n = 0; n < kRowStages && asks; ++n) {
      if (n > 0) copy_rows(own, n);
      copy_factor(own, n);
    }
    FORDE_ROLLED for (int tile = 0; tile < own.tiles(); ++tile) {
      block.sync(kFull + tile % 2, kLowRankThreads);  // its rows were read, and the last products found
      if (asks) copy_factor(own, tile + kFactorStages - 1), copy_rows(own, tile + kRowStages);
    }
    turn += own.tiles();
  }
};

template <int kRank, class Block>
struct MultiplyDown {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  SharedDown<kRank>& shared;
  ArrivalsDown& arrivals;
  int turn = 0;

  static constexpr int kTiles = kRank / 64, kHalf = kLowRankMembers / 2;  // of 64 rows of x^T

  FORDE_INLINE void multiply(int tile, float (&x)[kTiles][40]) const {
    const Operand factor = block.uniform(Operand{shared.factor[(turn + tile) % kFactorStages].numbers(), 128, kRank * 16});
    const Operand z = block.uniform(Operand{reinterpret_cast<const Half*>(shared.z[tile % 2]), 128, SharedDown<kRank>::kContrasts});
    block.start_products();
    FORDE_UNROLL for (int n = 0; n < kTiles; ++n) {
      FORDE_UNROLL for (int k = 0; k < kColumns; k += 16) block.template multiply_add<true>(x[n], factor.from(n * 64, k), z.from(0, k));
      block.commit_products();
    }
  }

  FORDE_INLINE void run(int item) {
    const int tiles = range(f, p, item).tiles();
    float x[kTiles][40] = {};
    if (turn > 0) block.sync(kFound, kProductAndCopyThreads);
    for (int n = 0; n < 2 && n < tiles; ++n) block.arrive(kEmpty + n, kProductThreads + kRowThreads);
    FORDE_ROLLED for (int tile = 0; tile < tiles; ++tile) {
      arrivals.factor.wait(block, turn + tile);
      block.sync(kFull + tile % 2, kLowRankThreads);  // z is there, its rows were read, the last products found
      multiply(tile, x);
      if (tile + 2 < tiles) {
        block.template wait_for_products_but<0>();
        block.arrive(kEmpty + tile % 2, kProductThreads + kRowThreads);
      }
    }
    turn += tiles;
    write(item, x);
  }

  // Tile after tile as it is found; eight lanes write 128 bytes of a sample together.
  template <int kTile = 0>
  FORDE_INLINE void write(int item, float (&x)[kTiles][40]) const {
    const int lane = block.thread() % 32, warp = block.thread() / 32;
    auto* const sums = workspace<SumsOfSample<kRank>>(f, p.at.x) + int64_t(item) * kGroup + lane % 4 * 2;
    block.template wait_for_products<kTiles - 1 - kTile>(x[kTile]);
    FORDE_UNROLL for (int k = 0; k < kTileRows / 8; ++k)
      sums[k / kHalf].of[kTile][k % kHalf][warp * 8 + lane / 4] = {{x[kTile][4 * k], x[kTile][4 * k + 1], x[kTile][4 * k + 2], x[kTile][4 * k + 3]}};
    if constexpr (kTile + 1 < kTiles)
      write<kTile + 1>(item, x);
    else
      block.sync(kProductBarrier, kProductThreads);  // shared memory is free
  }
};

template <int kRank, class Block>
struct RowsDown {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  SharedDown<kRank>& shared;
  ArrivalsDown& arrivals;
  int turn = 0;
  RowWarps<Block> warps{block};

  static constexpr int kRows = kLowRankMembers, kPairs = kLowRankPairs;

  // A lane's part of the squares of a sample's rows: of 32 columns at a few places or, if `exact`, of all.
  FORDE_INLINE void add_squares(const float* rows, bool exact, float (&x)[kRows]) const {
    const int columns = int(f.columns), sampled = warps.lane() / 8 * (columns / 16 * 4) + warps.lane() % 8 * 4, step = exact ? 128 : p.step;
    const int first = exact ? 4 * warps.lane() : sampled < columns ? sampled : 0, last = exact ? columns : first + step * p.places;
    FORDE_ROLLED for (int k = first; k < last; k += step) {
      const float* row = rows + k;
      Four v[kRows];
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) {
        v[m] = load_four(row);
        if (m + 1 < f.members) row += f.stride_m;
      }
      FORDE_UNROLL for (int m = 0; m < kRows; ++m)
        FORDE_UNROLL for (int n = 0; n < 4; ++n) x[m] = multiply_add(v[m].of[n], v[m].of[n], x[m]);
    }
  }

  // 1 / norm of the sample's rows, from these squares, times the unit of contrasts.
  FORDE_INLINE void find_norms(const Range& range, bool there, bool exact, const float (&x)[kRows], float (&r)[kRows]) const {
    float total[1];
    add_over_warp(block, x, total);
    const float square = float(f.eps) + total[0] * (exact ? 1 : p.scale);
    const bool own_row = there && warps.lane() < f.members;
    const float own = own_row ? square < INFINITY ? inverse_root(square) : NAN : 0;  // a row that overflowed is not one of zeros
    if (warps.lane() < kRows && range.from == 0)
      workspace<float>(f, p.at.norms)[int64_t(range.first + warps.warp()) * kRows + warps.lane()] = own;
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) r[m] = block.from_lane(own, m) * kHalfUnit;
  }

  FORDE_INLINE void load(int tile, Two (&rows)[kRows]) const {
    arrivals.rows.wait(block, turn + tile);
    const float* from = shared.rows[(turn + tile) % kRowStages].of[warps.warp() * kRows] + 2 * warps.lane();
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) rows[m] = load_two(from + m * kColumns);
  }

  // Two columns of the sample for each lane: their part of the distances, and their contrasts: of row m > 0 what it has
  // beyond c, which is contrast 0.
  FORDE_INLINE void add_pairs(const Two (&rows)[kRows], const float (&r)[kRows], float (&sums)[kPairs + kRows], TwoHalves (&z)[kRows]) const {
    float s[2][kRows], total[2] = {};
    FORDE_UNROLL for (int m = 0; m < kRows; ++m)
      FORDE_UNROLL for (int v = 0; v < 2; ++v) s[v][m] = rows[m].of[v] * r[m];
    FORDE_UNROLL for (int i = 0; i < kRows; ++i)
      FORDE_UNROLL for (int j = i + 1; j < kRows; ++j)
        FORDE_UNROLL for (int v = 0; v < 2; ++v) {
          const float difference = s[v][i] - s[v][j];
          sums[pair(i, j)] = multiply_add(difference, difference, sums[pair(i, j)]);
          if (i == 0) total[v] = multiply_add(p.share[j], difference, total[v]);
        }
    FORDE_UNROLL for (int m = 0; m < kRows; ++m)
      FORDE_UNROLL for (int v = 0; v < 2; ++v) sums[kPairs + m] = multiply_add(s[v][m], s[v][m], sums[kPairs + m]);
    const float c[2] = {s[0][0] + total[0], s[1][0] + total[1]};
    z[0] = {{to_half(c[0]), to_half(c[1])}};
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) z[m] = {{to_half(s[0][m] - c[0]), to_half(s[1][m] - c[1])}};
  }

  FORDE_INLINE void run(int item, bool exact) {
    warps.forget();
    const Range own = range(f, p, item);
    const bool there = own.first + warps.warp() < f.groups;
    float squares[kRows] = {}, r[kRows], sums[kPairs + kRows] = {};
    if (there) add_squares(f.particles + (own.first + warps.warp()) * f.stride_g, exact, squares);
    if (turn == 0) block.sync();  // arrivals are there
    find_norms(own, there, exact, squares, r);
    Two rows[kRows];
    FORDE_ROLLED for (int tile = 0; tile < own.tiles(); ++tile) {
      TwoHalves z[kRows];
      load(tile, rows);
      add_pairs(rows, r, sums, z);
      block.sync(kEmpty + tile % 2, kProductThreads + kRowThreads);
      char* out = shared.z[tile % 2] + warps.lane() / 4 * SharedDown<kRank>::kContrasts + place_of_row(warps.warp(), 0) * 16 + warps.lane() % 4 * 4;
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) *reinterpret_cast<TwoHalves*>(out + place_of_row(0, m) * 16) = z[m];
      block.fence();
      block.arrive(kFull + tile % 2, kLowRankThreads);
    }
    turn += own.tiles();
    float totals[2];
    add_over_warp(block, sums, totals);
    FORDE_UNROLL for (int part = 0; part < 2; ++part)
      workspace<float>(f, p.at.pairs)[(int64_t(item) * kGroup + warps.warp()) * 64 + part * 32 + warps.lane()] = totals[part] / (kHalfUnit * kHalfUnit);
  }
};

}  // namespace forde_fast
