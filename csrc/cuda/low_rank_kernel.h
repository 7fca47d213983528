// The kernel of low_rank.h, for any Block: low_rank.cu has the one of a GPU, tests/ one for the host.
//
// Three stages with a barrier over the grid between them. The way down: contrasts in float16 times F by the matrix
// units, while distances without C come from differences; then each sample's rule, from K columns; and the way up: what
// is mixed of these columns times F^T by the matrix units, while the tail's part is mixed from the rows.
//
// Norms would take a pass over the particles of their own. The way down does with norms r' found from a few columns,
// and sums up the squares of the rows s' = r' p: s = rho s', with rho = 1 / sqrt(|s'|^2 + eps r'^2), and so
//     |s_i - s_j|^2 = rho_i rho_j |s'_i - s'_j|^2 + (rho_i - rho_j) (rho_i |s'_i|^2 - rho_j |s'_j|^2).
// Where that would cost accuracy, as those columns say too little of a row, all goes down again with exact norms.
//
// Contrasts (Householder's, of which the first row holds the vector u that all of a sample lack) are the differences of
// its rows: 11 bits of them are what tf32 leaves of the rows themselves, or better. Compiled without multiply-add
// contraction, with all sums in a fixed order: equal rows stay equal.
#pragma once

#include "block_steps.h"
#include "half.h"
#include "low_rank_rule.h"

namespace forde_fast {

template <int kRank, class Block>
struct LowRankKernel {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  char* const shared;

  static constexpr int kRows = kLowRankMembers, kPairs = kLowRankPairs;
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
  FORDE_INLINE int warp() const { return block.thread() / 32; }
  FORDE_INLINE int lane() const { return block.thread() % 32; }
  FORDE_INLINE int quad() const { return warp() / 4; }  // of the two groups of four warps that the matrix units work for

  // The columns of an item, and its first sample.
  struct Range {
    int from, count, first;
  };
  FORDE_INLINE Range range(int item) const {
    const int from = item % p.splits * p.width, rest = int(f.columns) - from;
    return {from, rest < p.width ? rest : p.width, item / p.splits * kGroup};
  }

  // A warp's sample: whether there is one, and its columns of row 0.
  FORDE_INLINE bool there(const Range& own) const { return own.first + warp() < f.groups; }
  FORDE_INLINE const float* rows_of(const Range& own) const { return f.particles + (own.first + warp()) * f.stride_g + own.from; }

  // r of the item's rows, from eight columns at each of 16 places or, if `exact`, from all of them.
  FORDE_INLINE void find_norms(int item, bool exact) const {
    const Range own = range(item);
    float x[kRows] = {}, total[1];
    if (there(own)) {
      const int columns = int(f.columns), sampled = lane() / 2 * (columns / 16) / 4 * 4 + lane() % 2 * 4;
      const int first = exact ? 4 * lane() : sampled < columns ? sampled : 0, last = exact ? columns : first + 1;
      const float* rows = f.particles + (own.first + warp()) * f.stride_g;
      FORDE_ROLLED for (int k = first; k < last; k += 128) {
        Four v[kRows];
        FORDE_UNROLL for (int m = 0; m < kRows; ++m) v[m] = load_four(rows + (m < f.members ? m : 0) * f.stride_m + k);
        FORDE_UNROLL for (int m = 0; m < kRows; ++m)
          FORDE_UNROLL for (int n = 0; n < 4; ++n) x[m] = multiply_add(v[m].of[n], v[m].of[n], x[m]);
      }
    }
    add_over_warp(block, x, total);
    if (lane() < kRows) {
      const bool own_row = there(own) && lane() < f.members;
      const double square = f.eps + double(total[0]) * (exact ? 1 : f.columns / 128.0);
      const float r = own_row ? float(square < INFINITY ? 1 / sqrt(square) : NAN) : 0;  // a row that overflowed is not one of zeros
      small().r[warp() * kRows + lane()] = r;
      if (item % p.splits == 0) workspace<float>(f, p.at.norms)[(own.first + warp()) * kRows + lane()] = r;
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
    const char* from = static_cast<const char*>(f.factor) + ((own.from + k) / 8 + first) * int64_t(kRank * 16) + column * 16 + place;
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

  // What turn `chunk` of the way down needs: its columns of F, and the next ones of the rows.
  FORDE_INLINE void copy_down(Down& down, const Range& own, int chunk) const {
    const int next = chunk + 1;
    if (next * kDownColumns < own.count) copy_rows<kDownColumns, kDownColumns>(down.p[next % kDownStages], own, next * kDownColumns);
    if (chunk >= 0 && chunk * kDownColumns < own.count)
      copy_factor<kDownColumns, kRank>(down.factor[chunk % kDownStages], own, chunk * kDownColumns, 0);
    block.commit_copies();
  }

  // Two columns of a warp's sample for each lane: their part of the distances, and their contrasts to z.
  FORDE_INLINE void add_pairs(const float* rows, Contrasts& z, float (&sums)[kPairs + kRows]) const {
    const float* own = rows + warp() * kRows * kDownColumns + 2 * lane();
    float s[2][kRows], contrast[2][kRows];
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) {
      const Two two = load_two(own + m * kDownColumns);
      FORDE_UNROLL for (int v = 0; v < 2; ++v) s[v][m] = two.of[v] * small().r[warp() * kRows + m];
    }
    FORDE_UNROLL for (int v = 0; v < 2; ++v) {
      FORDE_UNROLL for (int i = 0; i < kRows; ++i)
        FORDE_UNROLL for (int j = i + 1; j < kRows; ++j) {
          const float difference = s[v][i] - s[v][j];
          sums[pair(i, j)] = multiply_add(difference, difference, sums[pair(i, j)]);
        }
      FORDE_UNROLL for (int m = 0; m < kRows; ++m) sums[kPairs + m] = multiply_add(s[v][m], s[v][m], sums[kPairs + m]);
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

  FORDE_INLINE void go_down(int item, bool exact) const {
    const Range own = range(item);
    Down& down = room<Down>();
    block.sync();  // the last item's contrasts have been read
    copy_down(down, own, -1);
    copy_down(down, own, 0);
    find_norms(item, exact);
    float sums[kPairs + kRows] = {}, x[kDownTiles][40] = {};
    FORDE_ROLLED for (int chunk = -1; chunk * kDownColumns < own.count; ++chunk) {  // products are one turn behind
      const int next = chunk + 1;
      block.template wait_for_copies<1>();
      block.sync_for_products();  // what this turn needs, contrasts too; and the last turn's products have been found
      copy_down(down, own, chunk + 2);
      if (chunk >= 0) multiply_down(down.operand(chunk % kDownStages), down.z[chunk % 2].operand(), x);
      if (next * kDownColumns < own.count) add_pairs(down.p[next % kDownStages], down.z[next % 2], sums);
      block.wait_for_products(x);
    }
    block.template wait_for_copies<0>();
    float* out = workspace<float>(f, p.at.x) + int64_t(item) * kTileRows * kRank;
    FORDE_UNROLL for (int tile = 0; tile < kDownTiles; ++tile)
      FORDE_UNROLL for (int n = 0; n < 40; ++n) {
        const int row = n / 4 * 8 + lane() % 4 * 2 + n % 2, column = (quad() * kDownTiles + tile) * 64 + warp() % 4 * 16 + lane() / 4 + n % 4 / 2 * 8;
        out[row * kRank + column] = x[tile][n];
      }
    float totals[2];
    add_over_warp(block, sums, totals);
    FORDE_UNROLL for (int part = 0; part < 2; ++part)
      workspace<float>(f, p.at.pairs)[(item * kGroup + warp()) * 64 + part * 32 + lane()] = totals[part];
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
    const char* y = workspace<char>(f, p.at.y) + int64_t(item / p.splits) * sizeof up.y + row * 16;
    FORDE_UNROLL for (int n = 0; n < kTileRows * kRank / 8; n += kThreads)
      if (n + row < kTileRows * kRank / 8) block.copy_16_bytes(up.y + (n + row) * 16, y + n * 16);
    if (row >= kTileRows) return;
    const bool own_row = i < M && sample < f.groups;
    const int64_t at = own_row ? sample * kRows + i : 0;
    const float* w = workspace<float>(f, p.at.weights) + at * kRows;
    const float r = own_row ? workspace<float>(f, p.at.norms)[at] : 0, scale = float(small().scale[i < M ? i : 0]) * r;
    float all = 0;
    FORDE_ROLLED for (int n = 0; n < M; ++n) all += w[n];
    small().r[row] = r;
    small().factor[row] = scale * float(f.unit * f.unit / kHalfUnit) / workspace<float>(f, p.at.unit)[at];
    float* mixing = small().mixing[row / kRows][i];
    FORDE_ROLLED for (int n = 1; n < kRows; ++n) mixing[n] = float(f.tail) * scale * (n < M ? (n == i ? all : 0) - w[n] : 0);
    mixing[0] = -scale * workspace<float>(f, p.at.aligned)[at];
  }

  // In place of four columns of a warp's sample for each lane: the tail's part less what lies along the row.
  FORDE_INLINE void mix_rows(float* rows) const {
    float* own = rows + warp() * kRows * kUpStride + 4 * lane();
    Four s[kRows];  // behind row 0 differences to it
    FORDE_UNROLL for (int m = 0; m < kRows; ++m) {
      s[m] = load_four(own + m * kUpStride);
      FORDE_UNROLL for (int v = 0; v < 4; ++v) {
        s[m].of[v] *= small().r[warp() * kRows + m];
        if (m > 0) s[m].of[v] -= s[0].of[v];
      }
    }
    FORDE_UNROLL for (int i = 0; i < kRows; ++i) {
      Four total, weights[3];
      FORDE_UNROLL for (int n = 0; n < 3; ++n) weights[n] = load_four(small().mixing[warp()][i] + 4 * n);
      FORDE_UNROLL for (int v = 0; v < 4; ++v) total.of[v] = weights[0].of[0] * (i > 0 ? s[i].of[v] + s[0].of[v] : s[0].of[v]);
      FORDE_UNROLL for (int n = 1; n < kRows; ++n)
        FORDE_UNROLL for (int v = 0; v < 4; ++v) total.of[v] = multiply_add(weights[n / 4].of[n % 4], s[n].of[v], total.of[v]);
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

  // The first copies need not wait for the rule, which is found where the last piece of F comes to.
  FORDE_INLINE RuleOfSample<kRank>& room_for_rule() const {
    static_assert(sizeof(RuleOfSample<kRank>) <= sizeof(Up::factor[0]), "");
    return reinterpret_cast<RuleOfSample<kRank>&>(room<Up>().factor[kPieces - 1]);
  }
  FORDE_INLINE void start_up(int item) const {
    if (item >= p.items) return;
    Up& up = room<Up>();
    copy_rows<kUpColumns, kUpStride>(up.p[0], range(item), 0);
    copy_piece(up, range(item), 0);
  }

  FORDE_INLINE void go_up(int item) const {
    const Range own = range(item);
    Up& up = room<Up>();
    if (item >= block.blocks()) start_up(item);
    load_mixed(item, up);
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
    if (block.index() == 0 && block.thread() == 0) *workspace<int>(f, p.at.again) = 0;
    FORDE_ROLLED for (bool exact = false;; exact = true) {
      if (block.thread() < kRows) small().rows[block.thread()] = 0;
      FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) go_down(item, exact);
      block.sync_grid();
      start_up(block.index());
      const LowRankRule<kRank, Block> rule{block, f, p, room_for_rule(), small().rows};
      FORDE_ROLLED for (int sample = block.index(); sample < f.groups; sample += block.blocks()) rule.find(sample);
      add_over_blocks<kThreads, 16>(block, workspace<double>(f, p.at.rows), f.members, f.groups, small().rows, small().scale, f.value);
      if (exact || *workspace<int>(f, p.at.again) == 0) break;
      block.commit_copies();
      block.template wait_for_copies<0>();
      block.sync();
    }
    FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) go_up(item);
  }
};

}  // namespace forde_fast
