// The way down of low_rank_kernel.h: x^T [K, rows] = F^T [K, D] z^T [D, rows] of contrasts z, and distances without F.
//
// A warp for each sample hands its contrasts on in float16 and has the matrix units find products of each with each, from
// which distances come; the other warps multiply by them, one tile of columns behind, and have rows and F copied.
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
  // Of 8 columns of z, bytes: behind the contrasts what each sample's row 0 has beyond c; the next ones begin in other banks.
  static constexpr int kContrasts = (kTileRows + kGroup) * 16 + 16;

  RowTile rows[kRowStages];
  FactorTile<kRank> factor[kFactorStages];
  char z[2][kColumns / 8 * kContrasts];
};

template <int kRank, class Block>
struct MultiplyDown {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  SharedDown<kRank>& shared;
  ArrivalsDown& arrivals;
  int turn = 0;  // tiles of the items before

  static constexpr int kTiles = kRank / 64;  // of 64 rows of x^T

  FORDE_INLINE void copy_rows(const Range& own, int tile) const {
    forde_fast::copy_rows(block, arrivals.rows, shared.rows, own, turn, tile);
  }
  FORDE_INLINE void copy_factor(const Range& own, int tile) const {
    forde_fast::copy_factor(block, f, arrivals.factor, shared.factor, own, turn, tile);
  }

  // The first rows: before all else, as code and what norms are found from take long to come too, and all the other copies
  // would delay these.
  FORDE_INLINE void start(int item) const { copy_rows(range(f, p, item), 0); }

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
    const Range own = range(f, p, item);
    const int tiles = own.tiles();
    float x[kTiles][40] = {};
    if (turn == 0) block.sync();  // arrivals are there, and what norms are found from
    if (block.thread() == 0) {    // who wrote the last item's sums
      if (turn > 0) start(item);
      static_assert(kRowStages == kFactorStages - 1, "");
      FORDE_ROLLED for (int n = 0; n < kRowStages; ++n) {
        if (n > 0) copy_rows(own, n);
        copy_factor(own, n);
      }
    }
    for (int n = 0; n < 2 && n < tiles; ++n) block.arrive(kEmpty + n, kLowRankThreads);
    FORDE_ROLLED for (int tile = 0; tile < tiles; ++tile) {
      arrivals.factor.wait(block, turn + tile);
      block.sync(kFull + tile % 2, kLowRankThreads);  // z is there, its rows were read, the last products found
      multiply(tile, x);
      if (block.thread() == 0) copy_rows(own, tile + kRowStages), copy_factor(own, tile + kFactorStages - 1);
      if (tile + 2 < tiles) {
        block.template wait_for_products_but<0>();
        block.arrive(kEmpty + tile % 2, kLowRankThreads);
      }
    }
    turn += tiles;
    write(item, x);
  }

  // Tile after tile as it is found, by shared memory: where rows were and behind them F, which is free after the last.
  template <int kTile = 0>
  FORDE_INLINE void write(int item, float (&x)[kTiles][40]) const {
    constexpr int kCount = kTileRows / 2 * 64, kBytes = kCount * sizeof(Two);
    static_assert((kTiles - 1) * kBytes <= sizeof shared.rows && kBytes <= sizeof shared.factor, "");
    const int lane = block.thread() % 32, column = block.thread() / 32 * 16 + lane / 4;  // and 8 more
    Two* const sums = reinterpret_cast<Two*>(shared.rows) + kTile * kCount;
    block.template wait_for_products<kTiles - 1 - kTile>(x[kTile]);
    if (kTile == kTiles - 1) block.sync(kProductBarrier, kProductThreads);
    FORDE_UNROLL for (int half = 0; half < 2; ++half) {
      Two* own = sums + place_of_sum(lane % 4, column + half * 8);
      FORDE_UNROLL for (int k = 0; k < 10; ++k)  // of each eight rows lane % 4 * 2 and the next
        own[k * 4 * 64] = {{x[kTile][4 * k + 2 * half], x[kTile][4 * k + 2 * half + 1]}};
    }
    block.fence();
    block.sync(kProductBarrier, kProductThreads);
    if (block.thread() == 0) block.write(workspace<char>(f, p.at.x) + (int64_t(item) * kTiles + kTile) * kBytes, sums, kBytes);
    if constexpr (kTile + 1 < kTiles) {
      write<kTile + 1>(item, x);
    } else if (block.thread() == 0) {
      block.wait_for_writes();
    }
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

  static constexpr int kRows = kLowRankMembers;

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
    const float norm = sqrtf(float(f.eps) + total[0] * (exact ? 1 : p.scale));
    const bool own_row = there && warps.lane() < f.members;
    const float own = own_row ? norm < INFINITY ? 1 / norm : NAN : 0;  // a row that overflowed is not one of zeros
    if (warps.lane() < kRows && range.from == 0)
      workspace<float>(f, p.at.norms)[int64_t(range.first + warps.warp()) * kRows + warps.lane()] = own;
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) r[m] = block.from_lane(own, m) * kHalfUnit;
  }

  FORDE_INLINE void load(int tile, Two (&rows)[kRows]) const {
    arrivals.rows.wait(block, turn + tile);
    const float* from = shared.rows[(turn + tile) % kRowStages].of[warps.warp() * kRows] + 2 * warps.lane();
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) rows[m] = load_two(from + m * kColumns);
  }

  // Two columns of the sample for each lane: their part of the squares, and their contrasts: of row m > 0 what it has
  // beyond c, which is contrast 0. And what row 0 has beyond c.
  FORDE_INLINE void find_contrasts(const Two (&rows)[kRows], const float (&r)[kRows], float (&squares)[kRows], TwoHalves (&z)[kRows + 1]) const {
    float s[2][kRows], c[2], total[2] = {};
    FORDE_UNROLL for (int m = 0; m < kRows; ++m)
      FORDE_UNROLL for (int v = 0; v < 2; ++v) {
        s[v][m] = rows[m].of[v] * r[m];
        squares[m] = multiply_add(s[v][m], s[v][m], squares[m]);
        if (m > 0) total[v] = multiply_add(p.share[m], s[v][0] - s[v][m], total[v]);
      }
    FORDE_UNROLL for (int v = 0; v < 2; ++v) c[v] = s[v][0] + total[v];
    z[0] = {{to_half(c[0]), to_half(c[1])}};
    FORDE_UNROLL for (int m = 1; m < kRows; ++m) z[m] = {{to_half(s[0][m] - c[0]), to_half(s[1][m] - c[1])}};
    z[kRows] = {{to_half(s[0][0] - c[0]), to_half(s[1][0] - c[1])}};
  }

  // Products over a tile's columns of what rows have beyond c, each with each: parts of these, of which none waits for
  // another, as the matrix units have more to do. In float32 they would be half of the arithmetic on this way.
  FORDE_INLINE void multiply_rows(const char* z, float (&parts)[kColumns / 16][8]) const {
    const int row = warps.lane() % 16, place = row == 0 ? kTileRows + warps.warp() : warps.warp() * kRows + (row < kRows ? row : kRows - 1);
    const char* from = z + warps.lane() / 16 * SharedDown<kRank>::kContrasts + place * 16;
    FORDE_UNROLL for (int k = 0; k < kColumns; k += 16) block.multiply_rows(parts[k / 16], from + k / 8 * SharedDown<kRank>::kContrasts);
  }
  // Not by the matrix units, which do not round to nearest: what they leave out would grow with D.
  FORDE_INLINE void add_products(const float (&parts)[kColumns / 16][8], float (&products)[8]) const {
    FORDE_UNROLL for (int n = 0; n < 8; ++n) products[n] += (parts[0][n] + parts[1][n]) + (parts[2][n] + parts[3][n]);
  }

  // |q_i - q_j|^2 from products of such rows q, of which equal ones have equal products; and |s'_i|^2 where i = j.
  FORDE_INLINE void write_pairs(int item, const float (&products)[8], const float (&squares)[kRows]) const {
    float* out = workspace<float>(f, p.at.pairs) + (int64_t(item) * kGroup + warps.warp()) * kPairs;
    const int lane = warps.lane(), row = lane / 4, column = lane % 4 * 2;
    const float low = row % 2 ? products[1] : products[0], high = row % 2 ? products[7] : products[6];  // on the diagonal in lanes 4 row + row / 2
    FORDE_UNROLL for (int n = 0; n < 8; ++n) {
      const int down = n / 2 % 2, right = n / 4, i = row + 8 * down, j = column + 8 * right + n % 2, k = column + n % 2;
      const float a = block.from_lane(down ? high : low, 4 * row + row / 2), b = block.from_lane(right ? high : low, 4 * k + k / 2);
      if (i < j && j < kRows) out[i * kRows + j] = (a + b - 2 * products[n]) / (kHalfUnit * kHalfUnit);
    }
    float total[1];
    add_over_warp(block, squares, total);
    if (lane < kRows) out[lane * (kRows + 1)] = total[0] / (kHalfUnit * kHalfUnit);
  }

  FORDE_INLINE void run(int item, bool exact) {
    warps.forget();
    const Range own = range(f, p, item);
    const bool there = own.first + warps.warp() < f.groups;
    float squares[kRows] = {}, r[kRows], parts[kColumns / 16][8] = {}, products[8] = {};
    Two rows[kRows];
    if (there) add_squares(f.particles + (own.first + warps.warp()) * f.stride_g, exact, squares);
    if (turn == 0) block.sync();  // arrivals are there
    find_norms(own, there, exact, squares, r);
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) squares[m] = 0;
    FORDE_ROLLED for (int tile = 0; tile < own.tiles(); ++tile) {
      TwoHalves z[kRows + 1];
      load(tile, rows);
      find_contrasts(rows, r, squares, z);
      add_products(parts, products);  // of the last tile
      block.sync(kEmpty + tile % 2, kLowRankThreads);
      char* const out = shared.z[tile % 2] + warps.lane() / 4 * SharedDown<kRank>::kContrasts + warps.lane() % 4 * 4;
      FORDE_UNROLL for (int m = 0; m <= kRows; ++m)
        *reinterpret_cast<TwoHalves*>(out + (m < kRows ? warps.warp() * kRows + m : kTileRows + warps.warp()) * 16) = z[m];
      block.fence();
      block.arrive(kFull + tile % 2, kLowRankThreads);
      block.sync_warp();
      multiply_rows(shared.z[tile % 2], parts);
    }
    add_products(parts, products);
    turn += own.tiles();
    write_pairs(item, products, squares);
  }
};

}  // namespace forde_fast
