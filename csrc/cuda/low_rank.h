// The whole operation for C = F F^T + tail I in one launch: what a launch is given and how its work is laid out.
// Plain C++, included by the kernel, by its binding and by the tests that run it on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "fused.h"

namespace forde_fast {

constexpr int kLowRankMembers = 10;  // rows of a sample that fit a thread's registers
constexpr int kGroup = 8;            // samples of an item: one for each warp that works on rows
constexpr int kTileRows = kGroup * kLowRankMembers;
constexpr int kColumns = 64;  // that pass through shared memory together
constexpr int kMostRank = 256;
constexpr int kFactorRows = 128;
// The first warps of a block multiply, the next ones work on rows, and one of the last four asks for copies.
constexpr int kProductThreads = 128, kRowThreads = 32 * kGroup, kCopyThreads = 128, kLowRankThreads = kProductThreads + kRowThreads + kCopyThreads;
constexpr int kProductRegisters = 200, kRowRegisters = 144, kCopyRegisters = 24;  // of a thread
// Of contrasts in float16, which ends at 32 of them: contrasts are at most 2.5 times as long as rows, and these less
// than 1 / kLeastRho.
constexpr float kHalfUnit = 2048;
constexpr double kLeastRho = 0.125, kMostRho = 4;
static_assert(kProductThreads * kProductRegisters + kRowThreads * kRowRegisters + kCopyThreads * kCopyRegisters <= 65536, "");

struct LowRank {
  const float* particles;  // [M, G, D], 2 <= M <= kLowRankMembers; D and the strides are multiples of 4
  const void* factor;      // [D / 8, K / 8, 8, 8] in float16, K = 128 or 256: tiles of the [D, K] whose unit-fold is F,
                           // with rows of zeros up to a multiple of kFactorRows
  float* gradient;         // [M, G, D], contiguous
  float* value;            // []
  float* bandwidth;        // [M, G]
  float* distances;        // [M, M, G]
  char* workspace;         // [plan(f).at.size]
  int64_t groups, columns, stride_m, stride_g;  // G, D; strides of the particles, in numbers
  int members, rank;                            // M, K
  double unit, tail, eps, log_count;
};

// Where in the workspace is what, in bytes.
struct LowRankWorkspace {
  int64_t rows;    // double [M, blocks]: sums of a block's kernel values
  int64_t again;   // int: whether provisional norms were not good enough
  int64_t pairs;   // float [items, kGroup, 64]: distances of pairs without C, and squares of rows behind them
  int64_t x;       // float [items, kTileRows, K]: contrasts times the factor, a SumsOfSample for each of an item
  int64_t norms;   // float [G, 10]: provisional 1 / norm
  int64_t y;       // half [groups of samples, K / 8, kTileRows, 8]: x mixed by the weights, in units of its row
  int64_t mixing;  // float [G, 10, kMixing]: what low_rank_rule.h says
  int64_t size;
};

// An item of work is kGroup samples on one of the equal ranges of columns that D is split into where there are fewer
// such groups than multiprocessors. Blocks take items in turn; all blocks are on the chip at once.
struct LowRankPlan {
  int blocks, splits, items;
  uint64_t per_split;            // 2^32 / splits rounded up: a division takes longer than a product
  int width;                     // columns of an item, the last one's may be fewer; a multiple of kColumns
  float share[kLowRankMembers];  // of row 0 less row m in contrast 0: 1 / (sqrt(M) - M), or 0 where no row is
  // Provisional norms are found from 32 columns, one request to memory, at so many places of each quarter of D, which lie
  // `step` columns apart; from these squares times `scale`.
  int places, step;
  float scale;
  // What is found here as it would be on a block's way to its first loads.
  double far_unit;               // of distances with F: of x, and of y
  float mixed_unit;
  float per_total;               // 1 / (sqrt(M) - 1)
  float per_median;              // what a bandwidth has of the sum of the middle two
  LowRankWorkspace at;
};

constexpr int kMixing = 12;             // numbers of a row on the way up, in three vectors
constexpr int kLowRankShared = 232448;  // bytes that a block may need, all that a multiprocessor of Hopper has

inline LowRankPlan plan(const LowRank& f, int processors) {
  const int64_t groups = up(f.groups, kGroup), widest = up(f.columns, kColumns);
  const int64_t wanted = std::clamp<int64_t>(processors / groups, 1, widest);
  LowRankPlan p = {};
  for (int m = 0; m < f.members; ++m) p.share[m] = float(1 / (std::sqrt(double(f.members)) - f.members));
  const int quarter = int(f.columns / 16 * 4);
  p.places = int(f.columns / 16384 + 1);
  p.step = quarter / p.places / 4 * 4;
  p.scale = float(f.columns / (128.0 * p.places));
  p.far_unit = f.unit / kHalfUnit * (f.unit / kHalfUnit);
  p.mixed_unit = float(f.unit * f.unit / kHalfUnit);
  p.per_total = float(1 / (std::sqrt(double(f.members)) - 1));
  p.per_median = float(0.5 / f.log_count);
  p.width = int(up(widest, wanted) * kColumns);
  p.splits = int(up(f.columns, p.width));
  p.items = int(groups * p.splits);
  p.per_split = up(int64_t(1) << 32, p.splits);
  p.blocks = int(std::min<int64_t>(processors, std::max<int64_t>(p.items + 1, f.groups)));  // 1: see write_value in the kernel
  LowRankWorkspace& at = p.at;
  const int64_t rows = groups * kTileRows;
  const auto take = [&at](int64_t bytes) { return std::exchange(at.size, at.size + up(bytes, 256) * 256); };
  at.rows = take(int64_t(f.members) * p.blocks * 8);
  at.again = take(4);
  at.pairs = take(int64_t(p.items) * kGroup * 64 * 4);
  at.x = take(int64_t(p.items) * kTileRows * f.rank * 4);
  at.norms = take(rows * 4);
  at.y = take(rows * f.rank * 2);
  at.mixing = take(rows * kMixing * 4);
  return p;
}

}  // namespace forde_fast
