// csrc/cuda/fused_kernel.h run on the host. The workspace starts as NaN.
#include <cstring>
#include <limits>
#include <vector>

#include "../csrc/cuda/fused_kernel.h"
#include "host_block.h"

namespace {

constexpr int kThreads = 64;  // two warps are enough to go wrong

using namespace forde_fast;

template <class In, int kRows, bool kProduct>
bool run(const Fused& f, const Plan& p, bool backwards) {
  using Small = Small<decltype(widen(In{}))>;
  std::vector<BlockMemory<kThreads>> memory(p.blocks, BlockMemory<kThreads>(p.shared));
  Barrier grid;
  return Fibers().run(p.blocks * kThreads, backwards, [&](int n) {
    char* shared = reinterpret_cast<char*>(memory[n / kThreads].shared.data());
    const HostBlock<kThreads> block{n % kThreads, n / kThreads, p.blocks, memory[n / kThreads], grid};
    FusedKernel<In, kRows, kProduct, kThreads, HostBlock<kThreads>>{
        block, f, p, *reinterpret_cast<Small*>(shared), reinterpret_cast<In*>(shared + kSmallShared)}.run();
  });
}

template <class In>
bool run(const Fused& f, const Plan& p, bool backwards) {
  if (rows_in_registers(f.input, f.members) == 10)
    return f.product ? run<In, 10, true>(f, p, backwards) : run<In, 10, false>(f, p, backwards);
  return f.product ? run<In, 16, true>(f, p, backwards) : run<In, 16, false>(f, p, backwards);
}

// [blocks, splits, chunks of an item, slots, bytes of shared memory]
void report(const Plan& p, int* plan) {
  const int numbers[] = {p.blocks, p.splits, int(up(p.width, p.chunk)), p.slots, int(p.shared)};
  memcpy(plan, numbers, sizeof numbers);
}

}  // namespace

// The plan of the kernel on a chip.
extern "C" void plan_of_chip(Fused f, int processors, int64_t shared_memory, int* chosen) {
  report(plan(f, fused_threads(rows_in_registers(f.input, f.members)), processors, shared_memory), chosen);
}

// As on a chip with so many processors and `shared` bytes for rows. False if threads wait for each other.
extern "C" bool fused_on_host(Fused f, int processors, int64_t shared, bool backwards, int* chosen) {
  const Plan p = plan(f, kThreads, processors, kSmallShared + shared);
  std::vector<double> workspace(workspace_size(f, p), std::numeric_limits<double>::quiet_NaN());
  f.workspace = workspace.data();
  report(p, chosen);
  switch (f.input) {
    case Input::kFloat32: return run<float>(f, p, backwards);
    case Input::kBFloat16: return run<bfloat16>(f, p, backwards);
    default: return run<double>(f, p, backwards);
  }
}
