// The kernel of low_rank.h, for any Block: low_rank.cu has the one of a GPU, tests/ one for the host.
//
// Three stages with a barrier over the grid between them. The way down: contrasts in float16 times F by the matrix
// units, while distances without C come from differences; then each sample's rule, from K columns; and the way up: what
// is mixed of these columns times F^T by the matrix units, while the tail's part is mixed from the rows. On both ways
// four warps of a block multiply, eight work on rows, and one asks for copies: they wait for each other's buffers only, so
// that copies, products and arithmetic of different tiles of columns go on at once.
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

#include "low_rank_down.h"
#include "low_rank_up.h"

namespace forde_fast {

template <int kRank, class Block>
struct LowRankKernel {
  const Block& block;
  const LowRank& f;
  const LowRankPlan& p;
  char* const memory;

  static constexpr int kRows = kLowRankMembers;

  struct Small {
    double rows[kRows];  // sums of kernel values over j and the samples
    float scale[kRows];  // -2 / G / rows
    ArrivalsDown down;
    ArrivalsUp up;
    Ring<2> sums;
    bool again[2];  // as those that multiply or copy know it, and those that work on rows
  };
  static constexpr int kSmall = 384;  // of which copies of rows want a multiple of 128
  FORDE_INLINE Small& small() const { return *reinterpret_cast<Small*>(memory); }
  template <class T>
  FORDE_INLINE T& room() const {
    static_assert(sizeof(Small) <= kSmall && kSmall + sizeof(T) <= kLowRankShared, "");
    return *reinterpret_cast<T*>(memory + kSmall);
  }

  FORDE_INLINE RuleOfSample& room_of_rule() const {
    auto& y = room<SharedUp<kRank>>().y;  // comes when the rule has been found
    static_assert(sizeof(RuleOfSample) <= sizeof y && alignof(RuleOfSample) <= 16, "");
    return reinterpret_cast<RuleOfSample&>(y);
  }

  FORDE_INLINE SumsOfSplits<kRank>& room_of_sums() const {
    auto& up = room<SharedUp<kRank>>();  // all of which comes later
    static_assert(sizeof(SumsOfSplits<kRank>) <= sizeof up.rows + sizeof up.factor, "");
    return reinterpret_cast<SumsOfSplits<kRank>&>(up);
  }

  // Whether the way down is to be repeated with exact norms. To be asked by few: they all read the same place.
  FORDE_INLINE bool again(bool exact) const { return !exact && *workspace<int>(f, p.at.again) != 0; }

  FORDE_INLINE void ask_for_copies() const {
    CopyDown<kRank, Block> down{block, f, p, room<SharedDown<kRank>>(), small().down};
    CopyUp<kRank, Block> up{block, f, p, room<SharedUp<kRank>>(), small().up};
    block.sync();  // arrivals are there, and what norms are found from
    FORDE_ROLLED for (bool exact = false;; exact = true) {
      FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) down.run(item);
      block.sync_grid();
      FORDE_ROLLED for (int sample = block.index(); sample < f.groups; sample += block.blocks()) {
        block.sync();
        if (sample + block.blocks() >= f.groups) up.start(block.index());  // behind the sums, to where they were
        block.sync();
      }
      if (block.index() >= f.groups) up.start(block.index());
      block.sync_grid();
      up.copy_mixed(block.index());
      if (block.thread() == kCopier) small().again[0] = again(exact);
      block.sync(kFound, kProductAndCopyThreads);
      if (!small().again[0]) break;
      if (block.index() < p.items) up.turns.drop(range(f, p, block.index()).tiles());
      block.sync();
    }
    FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) {
      if (item >= block.blocks()) {
        block.sync();  // the last item is done
        up.start(item);
        up.copy_mixed(item);
      }
      up.run(item);
    }
  }

  FORDE_INLINE void multiply() const {
    MultiplyDown<kRank, Block> down{block, f, p, room<SharedDown<kRank>>(), small().down};
    MultiplyUp<kRank, Block> up{block, f, p, room<SharedUp<kRank>>(), small().up};
    const RuleWithoutF<Block> rule{block, f, p, room_of_rule()};
    block.sync();
    FORDE_ROLLED for (;;) {
      FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) down.run(item);
      rule.clear();
      block.sync_grid();
      FORDE_ROLLED for (int sample = block.index(); sample < f.groups; sample += block.blocks()) {
        rule.find(sample);
        block.sync();  // the others have read the sums, and go on from what was found
        block.sync();  // they are done with the sample
      }
      block.fence();  // y comes to where the rule is
      block.sync_grid();
      block.sync(kFound, kProductAndCopyThreads);
      if (!small().again[0]) break;
      if (block.index() < p.items) up.drop(block.index());
      block.sync();
    }
    FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) {
      if (item >= block.blocks()) block.sync();
      up.run(item);
    }
  }

  FORDE_INLINE void work_on_rows() const {
    const RowWarps<Block> warps{block};
    RowsDown<kRank, Block> down{block, f, p, room<SharedDown<kRank>>(), small().down};
    RowsUp<kRank, Block> up{block, f, p, room<SharedUp<kRank>>(), small().up};
    double* const of_blocks = workspace<double>(f, p.at.rows);
    LowRankRule<kRank, Block> rule{warps, f, p, room_of_rule(), small().rows, room_of_sums(), small().sums};
    typename RowsUp<kRank, Block>::Mixing mixing;
    if (block.index() >= p.items) block.sync();  // arrivals are there
    FORDE_ROLLED for (bool exact = false;; exact = true) {
      if (warps.thread() < kRows) small().rows[warps.thread()] = 0;
      FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) down.run(item, exact);
      block.sync_grid();
      FORDE_ROLLED for (int sample = block.index(); sample < f.groups; sample += block.blocks()) {
        float x[kRows] = {};
        rule.block.forget();
        rule.find_rows(sample, x);
        block.sync();  // distances without F are there
        rule.find(sample, x);
        block.sync();
      }
      write_rows(warps, of_blocks, f.members, small().rows);
      block.fence();  // y comes to where the rule is, or the first tiles once more
      block.sync_grid();
      if (warps.thread() == kRowThreads - 1) small().again[1] = again(exact);
      mixing = up.load_mixing(block.index());
      add_over_blocks<kRowThreads>(warps, of_blocks, f.members, f.groups, small().rows, small().scale);
      if (!small().again[1]) break;
      if (block.index() < p.items) up.turns.drop(range(f, p, block.index()).tiles());
      block.sync();
    }
    FORDE_ROLLED for (int item = block.index(); item < p.items; item += block.blocks()) {
      if (item >= block.blocks()) {
        block.sync();
        mixing = up.load_mixing(item);
      }
      up.scale_mixing(mixing, small().scale);
      warps.sync();
      up.run(item);
    }
    // The last block has no item if the chip has room for one block more than there are: nothing waits for code that has
    // to come from memory, as no other block runs it.
    if (block.index() == block.blocks() - 1 && warps.warp() == 0) write_value(warps, f.members, f.groups, small().rows, f.value);
  }

  FORDE_INLINE void run() const {
    if (block.thread() == kProductThreads) block.prefetch_rows();
    if (block.thread() == kCopier) {
      if (block.index() == 0) *workspace<int>(f, p.at.again) = 0;
      small().down.rows.init(block), small().down.factor.init(block);
      small().up.rows.init(block), small().up.factor.init(block), small().up.y.init(block), small().sums.init(block);
      block.fence();
      if (block.index() < p.items) CopyDown<kRank, Block>{block, f, p, room<SharedDown<kRank>>(), small().down}.start(block.index());
    }
    if (block.thread() < kProductThreads) {
      block.template take_registers<kProductRegisters>();
      multiply();
    } else if (block.thread() < kCopier) {
      block.template take_registers<kRowRegisters>();
      work_on_rows();
    } else {
      block.template leave_registers<kCopyRegisters>();
      ask_for_copies();
    }
  }
};

}  // namespace forde_fast
