// csrc/cuda/low_rank_kernel.h run on the host. The workspace starts as NaN.
#include <cstring>
#include <limits>
#include <vector>

#include "../csrc/cuda/low_rank_kernel.h"
#include "host_low_rank_block.h"

namespace {

using namespace forde_fast;

template <int kRank>
bool run(const LowRank& f, const LowRankPlan& p, bool backwards) {
  std::vector<LowRankMemory> memory(p.blocks, LowRankMemory(kLowRankShared));
  Barrier grid;
  return Fibers().run(p.blocks * kLowRankThreads, backwards, [&](int n) {
    auto& own = memory[n / kLowRankThreads];
    LowRankHostBlock block(n % kLowRankThreads, n / kLowRankThreads, p.blocks, own, grid, f);
    block.early = backwards;
    LowRankKernel<kRank, LowRankHostBlock>{block, f, p, reinterpret_cast<char*>(own.shared.data())}.run();
  });
}

}  // namespace

// As on a chip with so many processors; backwards with early copies and late products too. False if threads wait for
// each other. chosen: [blocks, splits, items], whether all went down twice
extern "C" bool low_rank_on_host(LowRank f, int processors, bool backwards, int* chosen) {
  const LowRankPlan p = plan(f, processors);
  std::vector<double> workspace(p.at.size / 8, std::numeric_limits<double>::quiet_NaN());
  f.workspace = reinterpret_cast<char*>(workspace.data());
  const bool done = f.rank == 128 ? run<128>(f, p, backwards) : run<256>(f, p, backwards);
  const int numbers[] = {p.blocks, p.splits, p.items, *reinterpret_cast<int*>(f.workspace + p.at.again)};
  memcpy(chosen, numbers, sizeof numbers);
  return done;
}
