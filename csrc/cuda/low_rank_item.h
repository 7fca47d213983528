// What the stages of low_rank_kernel.h have in common: an item's place, and how the warps wait for each other.
#pragma once

#include "block_steps.h"
#include "half.h"
#include "low_rank.h"

namespace forde_fast {

// Barriers of some of a block's warps. Of a pair, a buffer is filled and emptied in turn: who is done with it arrives,
// who wants it waits. The warps that ask for copies wait wherever a buffer of these is found to be free.
constexpr int kProductBarrier = 1, kRowBarrier = 2, kFull = 3, kEmpty = 5, kRuleBarrier = 7, kFound = 8;
constexpr int kProductAndCopyThreads = kProductThreads + kCopyThreads;
constexpr int kCopier = kProductThreads + kRowThreads;  // the thread that does so

template <class T>
FORDE_INLINE T* workspace(const LowRank& f, int64_t offset) {
  return reinterpret_cast<T*>(f.workspace + offset);
}

// The warps that work on rows, as a block of their own.
template <class Block>
struct RowWarps {
  const Block& block;
  int own = block.thread() - kProductThreads;

  FORDE_INLINE int thread() const { return own; }
  // Nothing that was found from `thread` before stays in registers, of which there are none to spare.
  FORDE_INLINE void forget() { own = block.anew(own); }
  FORDE_INLINE int warp() const { return thread() / 32; }
  FORDE_INLINE int lane() const { return thread() % 32; }
  FORDE_INLINE int index() const { return block.index(); }
  FORDE_INLINE int blocks() const { return block.blocks(); }
  FORDE_INLINE void sync() const { block.sync(kRowBarrier, kRowThreads); }
  template <class T>
  FORDE_INLINE T shuffle(T x, int mask) const {
    return block.shuffle(x, mask);
  }
};

// The columns of an item, and its first sample.
struct Range {
  int from, count, first;

  FORDE_INLINE int tiles() const { return (count + kColumns - 1) / kColumns; }
};

FORDE_INLINE Range range(const LowRank& f, const LowRankPlan& p, int item) {
  const int group = int(item * p.per_split >> 32), from = (item - group * p.splits) * p.width, rest = int(f.columns) - from;
  return {from, rest < p.width ? rest : p.width, group * kGroup};
}

// A ring of kStages buffers that copies fill in turn, one thread asking for them.
template <int kStages>
struct Ring {
  Arrival arrivals[kStages];

  template <class Block>
  FORDE_INLINE void init(const Block& block) {
    for (Arrival& arrival : arrivals) block.init(&arrival);
  }
  template <class Block>
  FORDE_INLINE Arrival* expect(const Block& block, int turn, int bytes) {
    block.expect(&arrivals[turn % kStages], bytes);
    return &arrivals[turn % kStages];
  }
  template <class Block>
  FORDE_INLINE void wait(const Block& block, int turn) {
    block.wait(&arrivals[turn % kStages], turn / kStages % 2);
  }
};

// A tile of columns of the factor in shared memory: tiles of 8 columns by 8 ranks, [kColumns / 8, K / 8], as in memory.
template <int kRank>
struct FactorTile {
  char of[kColumns * kRank * 2];

  FORDE_INLINE const Half* numbers() const { return reinterpret_cast<const Half*>(of); }
};

// And of the rows of kGroup samples; zeros where there are none.
struct RowTile {
  float of[kTileRows][kColumns];
};

// A tile of an item to where it comes in its ring, behind `turn` tiles of items before; none behind the item's last.
template <int kStages, class Block>
FORDE_INLINE void copy_rows(const Block& block, Ring<kStages>& ring, RowTile (&tiles)[kStages], const Range& own, int turn, int tile) {
  if (tile >= own.tiles()) return;
  Arrival* arrival = ring.expect(block, turn + tile, sizeof(RowTile));
  block.copy_rows(tiles[(turn + tile) % kStages].of[0], own.from + tile * kColumns, own.first, arrival);
}
template <int kStages, int kRank, class Block>
FORDE_INLINE void copy_factor(const Block& block, const LowRank& f, Ring<kStages>& ring, FactorTile<kRank> (&tiles)[kStages], const Range& own,
                              int turn, int tile) {
  if (tile >= own.tiles()) return;
  Arrival* arrival = ring.expect(block, turn + tile, sizeof(FactorTile<kRank>));
  const int64_t from = int64_t(own.from + tile * kColumns) * (kRank * 2);
  block.copy(tiles[(turn + tile) % kStages].of, static_cast<const char*>(f.factor) + from, sizeof(FactorTile<kRank>), arrival);
}

// A sample's part of what the way down leaves of an item: of tiles of 64 columns of x and pairs of rows, 32 fours of two
// columns, eight apart, by two rows.
template <int kRank>
struct SumsOfSample {
  Four of[kRank / 64][kLowRankMembers / 2][32];
};

// Where a product has the m-th row of an item's sample: so that of what it leaves a lane has all rows of two samples.
FORDE_INLINE int place_of_row(int sample, int m) { return (sample % 2 * (kLowRankMembers / 2) + m / 2) * 8 + sample / 2 * 2 + m % 2; }

}  // namespace forde_fast
