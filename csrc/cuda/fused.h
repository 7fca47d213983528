// The whole operation at the default bandwidth in one launch: what a launch is given and how its work is laid out.
// Plain C++, included by the kernel, by its binding and by the tests that run it on the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../repulsion.h"

namespace forde_fast {

constexpr int kMostMembers = 16;

// T below: the computing type, double for float64 and otherwise float.
struct Fused {
  const void* particles;  // [M, G, D] of the input type, M <= kMostMembers; neighbouring columns lie side by side
  const void* product;    // [M - 1, G, D] of T, contiguous: contrasts times C; null: C is the identity
  void* gradient;         // [M, G, D] of the input type, contiguous
  void* value;            // [] of T
  void* bandwidth;        // [M, G] of T
  void* distances;        // [M, M, G] of T
  double* workspace;      // [workspace_size(fused, plan)]
  int64_t groups, columns, stride_m, stride_g;  // G, D; strides of the particles, in numbers
  int members;                                  // M
  Input input;
  bool normalize;
  double eps, log_count;
};

// An item of work is one sample, or one of the equal ranges of columns that it is split into where there are fewer
// samples than multiprocessors. Blocks take items in turn; all blocks are on the chip at once.
struct Plan {
  int blocks;     // as many threads each as there are registers for
  int splits;     // items of a sample; more than one only where no block has a second item
  int items;      // of all samples
  int width;      // columns of an item, the last one's may be fewer; a multiple of a block's threads
  int chunk;      // columns that are in shared memory at a time: all of an item's where they fit; likewise a multiple
  int slots;      // items that a block keeps in shared memory from the first stage to the second
  bool aligned;   // rows may be read 16 bytes at a time
  size_t shared;  // bytes
};

constexpr int kSmallShared = 16384;  // bytes that a block needs beside its rows; Small in fused_kernel.h fits
constexpr int kFewColumns = 1024;    // with fewer in an item, the barriers of a split sample cost more than it saves

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int input_size(Input input) { return input == Input::kFloat64 ? 8 : input == Input::kFloat32 ? 4 : 2; }

// Rows that the kernel has in registers; those beyond M cost arithmetic, other numbers of them time to compile. 10 is
// the published number of members; float64 is for few columns.
constexpr int rows_in_registers(Input input, int members) { return members <= 10 && input != Input::kFloat64 ? 10 : 16; }

// The sums of the pairs of rows are in registers, of which a multiprocessor has 65536.
constexpr int fused_threads(int rows) { return rows <= 10 ? 384 : 256; }

// At most one block for each of the `processors`.
inline Plan plan(const Fused& f, int threads, int processors, int64_t shared_memory) {
  const int64_t size = input_size(f.input), column = f.members * size;
  const int64_t room = (shared_memory - kSmallShared) / column / threads * threads;
  const int64_t wanted = std::max<int64_t>(1, std::min(processors / f.groups, up(f.columns, kFewColumns)));
  Plan p = {};
  p.width = int(up(up(f.columns, wanted), threads) * threads);
  p.splits = int(up(f.columns, p.width));
  p.items = int(f.groups * p.splits);
  p.blocks = std::min(processors, p.items);
  p.chunk = int(std::min<int64_t>(p.width, room));
  p.slots = p.chunk < p.width ? 1 : int(std::min(up(p.items, p.blocks), room / p.chunk));
  p.aligned = reinterpret_cast<uintptr_t>(f.particles) % 16 == 0;
  for (int64_t length : {f.columns, f.stride_m, f.stride_g}) p.aligned &= length * size % 16 == 0;
  p.shared = size_t(kSmallShared + p.slots * p.chunk * column);
  return p;
}

// The workspace: of each block the sums of its samples' kernel rows, of each item what its second stage needs and,
// where samples are split, what its blocks have to tell each other.
constexpr int64_t kShared = kMostMembers * (kMostMembers + 3) / 2;  // squares, growth and pairs

constexpr int64_t state_size(int64_t members) { return members * (members + 2); }

inline int64_t workspace_size(const Fused& f, const Plan& p) {
  return p.blocks * kMostMembers + p.items * (state_size(f.members) + (p.splits > 1 ? kShared : 0));
}

}  // namespace forde_fast
