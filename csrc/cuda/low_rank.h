// The whole operation for C = F F^T + tail I in one launch: what a launch is given and how its work is laid out.
// Plain C++, included by the kernel, by its binding and by the tests that run it on the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "fused.h"

namespace forde_fast {

constexpr int kLowRankMembers = 10;  // rows of a sample that fit a thread's registers
constexpr int kGroup = 8;            // samples of an item: one for each warp
constexpr int kTileRows = kGroup * kLowRankMembers;
constexpr int kLowRankThreads = 32 * kGroup;

struct LowRank {
  const float* particles;  // [M, G, D], 2 <= M <= kLowRankMembers; D and the strides are multiples of 4
  const void* factor;      // [D / 8, K / 8, 8, 8] in float16, K = 128 or 256: tiles of the [D, K] whose unit-fold is F,
                           // with rows of zeros up to a multiple of kUpColumns
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
  int64_t rows;      // double [blocks, 16]: sums of a block's kernel values
  int64_t again;     // int: whether provisional norms were not good enough
  int64_t pairs;     // float [items, kGroup, 64]: distances of pairs without C, and squares of rows behind them
  int64_t x;         // float [items, kTileRows, K]: contrasts times the factor
  int64_t weights;   // float [G, 10, 10]: kernel / h, 0 where d = 0
  int64_t y;         // half [groups of samples, K / 8, kTileRows, 8]: x mixed by them, in units of its row
  int64_t norms, unit, aligned;  // float [G, 10]: 1 / norm; this unit; the weights' sum over j times (q_i - q_j) s_i
  int64_t size;
};

// An item of work is kGroup samples on one of the equal ranges of columns that D is split into where there are fewer
// such groups than multiprocessors. Blocks take items in turn; all blocks are on the chip at once.
struct LowRankPlan {
  int blocks, splits, items;
  int width;  // columns of an item, the last one's may be fewer; a multiple of kUpColumns
  LowRankWorkspace at;
};

constexpr int kDownColumns = 64, kUpColumns = 128;  // that pass through shared memory together
constexpr int kLowRankShared = 232448;              // bytes that a block may need, all that a multiprocessor of Hopper has

inline LowRankPlan plan(const LowRank& f, int processors) {
  const int64_t groups = up(f.groups, kGroup), widest = up(f.columns, kUpColumns);
  const int64_t wanted = std::clamp<int64_t>(processors / groups, 1, widest);
  LowRankPlan p = {};
  p.width = int(up(widest, wanted) * kUpColumns);
  p.splits = int(up(f.columns, p.width));
  p.items = int(groups * p.splits);
  p.blocks = int(std::min<int64_t>(processors, std::max<int64_t>(p.items, f.groups)));
  LowRankWorkspace& at = p.at;
  const int64_t rows = groups * kTileRows;
  const auto take = [&at](int64_t bytes) { return std::exchange(at.size, at.size + up(bytes, 256) * 256); };
  at.rows = take(int64_t(p.blocks) * 16 * 8);
  at.again = take(4);
  at.pairs = take(int64_t(p.items) * kGroup * 64 * 4);
  at.x = take(int64_t(p.items) * kTileRows * f.rank * 4);
  at.weights = take(rows * kLowRankMembers * 4);
  at.y = take(rows * f.rank * 2);
  at.norms = take(rows * 4);
  at.unit = take(rows * 4);
  at.aligned = take(rows * 4);
  return p;
}

}  // namespace forde_fast
