// The way up of low_rank_kernel.h: gradient^T [D, rows] = F [D, K] y^T [K, rows] and the tail's part, from the rows.
//
// The warps that multiply leave a tile's products where its rows were. Of those that work on rows each half has every
// second tile, and a warp two samples: it mixes the tail's part meanwhile and writes both.
#pragma once

#include "low_rank_item.h"
#include "low_rank_rule.h"

namespace forde_fast {

constexpr int kRowStagesUp = 4;     // of each half of the warps one in use, one on its way
constexpr int kFactorStagesUp = 3;  // one being multiplied, two on their way

struct ArrivalsUp {
  Ring<kRowStagesUp> rows;
  Ring<kFactorStagesUp> factor;
  Ring<1> y;
};

template <int kRank>
struct SharedUp {
  RowTile rows[kRowStagesUp];
  FactorTile<kRank> factor[kFactorStagesUp];
  char y[kTileRows * kRank * 2];
  float mixing[kGroup][kLowRankMembers][kMixing];  // of low_rank_rule.h, with their scale
};

constexpr int kHalfThreads = kProductThreads + kRowThreads / 2;  // that wait for each other's products or rows

// Tiles that were copied before an item's, of rows and of F, and items; all that ask or wait for copies count them.
struct TurnsUp {
  int rows = 0, factor = 0, y = 0;

  // Past an item whose first copies alone were asked for.
  FORDE_INLINE void drop(int tiles) {
    rows += tiles < kRowStagesUp ? tiles : kRowStagesUp;
    factor += tiles < kFactorStagesUp - 1 ? tiles : kFactorStagesUp - 1;
    ++y;
  }
  FORDE_INLINE void pass(int tiles) { rows += tiles, factor += tiles, ++y; }
};

// By the warps that ask for copies: rows, F and y.
template <int kRank, class Block>
struct CopyUp {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  SharedUp<kRank>& shared;
  ArrivalsUp& arrivals;
  TurnsUp turns = {};

  FORDE_INLINE void copy_rows(const Range& own, int tile) const {
    forde_fast::copy_rows(block, arrivals.rows, shared.rows, own, turns.rows, tile);
  }
  FORDE_INLINE void copy_factor(const Range& own, int tile) const {
    forde_fast::copy_factor(block, f, arrivals.factor, shared.factor, own, turns.factor, tile);
  }

  // These need not wait for the rule.
  FORDE_INLINE void start(int item) const {
    if (item >= p.items || block.thread() != kCopier) return;
    const Range own = range(f, p, item);
    FORDE_ROLLED for (int n = 0; n < kRowStagesUp; ++n) {
      copy_rows(own, n);
      if (n < kFactorStagesUp - 1) copy_factor(own, n);
    }
  }
  FORDE_INLINE void copy_mixed(int item) const {
    if (item >= p.items || block.thread() != kCopier) return;
    const Range own = range(f, p, item);
    block.fence_of_global();
    Arrival* arrival = arrivals.y.expect(block, turns.y, sizeof shared.y);
    block.copy(shared.y, workspace<char>(f, p.at.y) + int64_t(own.first / kGroup) * sizeof shared.y, sizeof shared.y, arrival);
  }

  FORDE_INLINE void run(int item) {
    const Range own = range(f, p, item);
    const bool asks = block.thread() == kCopier;
    FORDE_ROLLED for (int tile = 0; tile < own.tiles(); ++tile) {
      block.sync(kFound, kProductAndCopyThreads);  // the last tile's products
      if (asks) copy_factor(own, tile + 2);
      block.sync(kEmpty + tile % 2, kHalfThreads + kCopyThreads);  // the products two tiles before have been read
      if (tile >= 2 && asks) copy_rows(own, tile + 2);
    }
    turns.pass(own.tiles());
  }
};

template <int kRank, class Block>
struct MultiplyUp {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  SharedUp<kRank>& shared;
  ArrivalsUp& arrivals;
  TurnsUp turns = {};

  // Nothing of this is on its way any more.
  FORDE_INLINE void drop(int item) {
    const int tiles = range(f, p, item).tiles();
    arrivals.y.wait(block, turns.y);
    FORDE_ROLLED for (int n = 0; n < kRowStagesUp && n < tiles; ++n) arrivals.rows.wait(block, turns.rows + n);
    FORDE_ROLLED for (int n = 0; n < kFactorStagesUp - 1 && n < tiles; ++n) arrivals.factor.wait(block, turns.factor + n);
    turns.drop(tiles);
  }

  FORDE_INLINE void run(int item) {
    const int tiles = range(f, p, item).tiles();
    const Operand y = block.uniform(Operand{reinterpret_cast<const Half*>(shared.y), 128, kTileRows * 16});
    arrivals.y.wait(block, turns.y);
    FORDE_ROLLED for (int tile = 0; tile < tiles; ++tile) {
      float out[40] = {};
      const Operand factor = block.uniform(Operand{shared.factor[(turns.factor + tile) % kFactorStagesUp].numbers(), kRank * 16, 128});
      arrivals.factor.wait(block, turns.factor + tile);
      block.sync(kFound, kProductAndCopyThreads);  // the last tile's products
      block.start_products();
      FORDE_UNROLL for (int k = 0; k < kRank; k += 16) block.template multiply_add<false>(out, factor.from(0, k), y.from(0, k));
      block.commit_products();
      block.wait_for_products(out);
      block.sync(kEmpty + tile % 2, kHalfThreads + kCopyThreads);  // its rows have been read, and the products two tiles before
      leave(shared.rows[(turns.rows + tile) % kRowStagesUp], out);
      block.arrive(kFull + tile % 2, kHalfThreads);
    }
    turns.pass(tiles);
  }

  // Of each eight rows lane % 4 * 2 and the next; in different banks by the last bits of a column.
  FORDE_INLINE void leave(RowTile& tile, const float (&out)[40]) const {
    const int lane = block.thread() % 32, row = lane % 4 * 2, column = block.thread() / 32 * 16 + lane / 4;  // and 8 more
    FORDE_UNROLL for (int half = 0; half < 2; ++half) {
      float* own = &tile.of[row][(column + half * 8) ^ (lane % 4 * 8)];
      FORDE_UNROLL for (int k = 0; k < 20; ++k) own[(k / 2 * 8 + k % 2) * kColumns] = out[k / 2 * 4 + half * 2 + k % 2];
    }
    block.fence();
  }
};

template <int kRank, class Block>
struct RowsUp {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  SharedUp<kRank>& shared;
  ArrivalsUp& arrivals;
  TurnsUp turns = {};
  RowWarps<Block> warps{block};

  static constexpr int kRows = kLowRankMembers;

  // A row of `mixing` for each of the first threads; zeros where there is no such row.
  struct Mixing {
    Four of[kMixing / 4];
  };
  FORDE_INLINE Mixing load_mixing(int item) const {
    const int row = warps.thread(), i = row % kRows, sample = range(f, p, item).first + row / kRows;
    Mixing mixing = {};
    if (item < p.items && row < kTileRows && i < f.members && sample < f.groups)
      FORDE_UNROLL for (int n = 0; n < kMixing / 4; ++n)
        mixing.of[n] = load_four(workspace<float>(f, p.at.mixing) + (int64_t(sample) * kRows + i) * kMixing + 4 * n);
    return mixing;
  }
  FORDE_INLINE void scale_mixing(Mixing& mixing, const float* scale) const {
    const int row = warps.thread(), i = row % kRows;
    if (row >= kTileRows) return;
    const float r = mixing.of[2].of[3], own = i < f.members ? scale[i] * r : 0;
    FORDE_UNROLL for (int n = 0; n < kMixing; ++n) mixing.of[n / 4].of[n % 4] *= own;
    mixing.of[2].of[3] = r;
    FORDE_UNROLL for (int n = 0; n < kMixing / 4; ++n) store_four(&shared.mixing[row / kRows][i][4 * n], mixing.of[n]);
  }

  // What a lane mixes a row's four columns from, but for s: row 0 and differences to it.
  struct OfRow {
    Four weights[kMixing / 4], product;
  };
  // The tail's part and the product.
  FORDE_INLINE Four mix(const OfRow& row, const Four (&s)[kRows]) const {
    Four own;
    FORDE_UNROLL for (int v = 0; v < 4; ++v) own.of[v] = row.weights[0].of[0] * s[0].of[v];
    FORDE_UNROLL for (int n = 1; n < kRows; ++n)
      FORDE_UNROLL for (int v = 0; v < 4; ++v) own.of[v] = multiply_add(row.weights[n / 4].of[n % 4], s[n].of[v], own.of[v]);
    FORDE_UNROLL for (int v = 0; v < 4; ++v) own.of[v] = multiply_add(row.product.of[v], row.weights[kRows / 4].of[kRows % 4], own.of[v]);
    return own;
  }

  // A loop over rows that is not unrolled: its code is short, as it is cold.
  FORDE_INLINE void run(int item) {
    warps.forget();
    const Range own = range(f, p, item);
    const int half = warps.warp() / 4, place = warps.warp() % 4 * 2 + warps.lane() / 16, column = warps.lane() % 16 * 4;
    const float* mixing = shared.mixing[place][0];
    const int64_t sample = own.first + place, next = f.groups * f.columns;
    FORDE_ROLLED for (int tile = half; tile < own.tiles(); tile += 2) {
      const float* rows = shared.rows[(turns.rows + tile) % kRowStagesUp].of[place * kRows];
      const float* products = shared.rows[(turns.rows + tile) % kRowStagesUp].of[place_of_row(place, 0)] + (column ^ (place / 2 * 8));
      Four s[kRows];
      arrivals.rows.wait(block, turns.rows + tile);
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) s[m] = load_four(rows + m * kColumns + column);
      block.arrive(kEmpty + half, kHalfThreads + kCopyThreads);
      FORDE_UNROLL for (int m = 0; m < kRows; ++m)
        FORDE_UNROLL for (int v = 0; v < 4; ++v) {
          s[m].of[v] *= mixing[m * kMixing + kMixing - 1];
          if (m > 0) s[m].of[v] -= s[0].of[v];
        }
      const int k = tile * kColumns + column;
      const bool there = sample < f.groups && k < own.count;
      float* to = f.gradient + (there ? sample * f.columns + own.from + k : 0);
      block.sync(kFull + half, kHalfThreads);
      if (there) {
        const auto load = [&](int i) {
          OfRow row;
          FORDE_UNROLL for (int n = 0; n < kMixing / 4; ++n) row.weights[n] = load_four(mixing + i * kMixing + 4 * n);
          row.product = load_four(products + place_of_row(0, i) * kColumns);
          return row;
        };
        // A row's numbers are on their way while the one before is mixed. Where a last row has none beside it, what is
        // written first is not its own.
        OfRow one = load(0);
        FORDE_ROLLED for (int i = 0; i < f.members; i += 2, to += 2 * next) {
          const OfRow other = load(i + 1);
          const Four first = mix(one, s);
          one = load(i + 2 < kRows ? i + 2 : 0);
          store_four(i + 1 < f.members ? to + next : to, mix(other, s));
          store_four(to, first);
        }
      }
    }
    turns.pass(own.tiles());
  }
};

}  // namespace forde_fast
