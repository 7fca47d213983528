// csrc/cuda/fused_kernel.h run on the host: every thread of every block is a fiber, one runs at a time and hands on at
// barriers. A missing barrier shows as a difference between the orders in which fibers run, one that not all threads
// reach as a standstill. Shared memory and the workspace start as NaN.
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "../csrc/cuda/fused_kernel.h"

namespace {

constexpr int kThreads = 64;  // two warps are enough to go wrong

struct Barrier {
  int arrived = 0, generation = 0;
};

class Fibers {
 public:
  static Fibers* current;

  // False if all that have not ended wait for each other.
  bool run(int count, bool backwards, std::function<void(int)> body) {
    body_ = body;
    fibers_.resize(count);
    for (int n = 0; n < count; ++n) {
      Fiber& fiber = fibers_[n];
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, start, 0);
    }
    current = this;
    for (bool progress = true; progress;) {
      progress = false;
      for (int n = 0; n < count; ++n) {
        running_ = backwards ? count - 1 - n : n;
        if (!fibers_[running_].ready()) continue;
        progress = true;
        swapcontext(&scheduler_, &fibers_[running_].context);
      }
    }
    for (const Fiber& fiber : fibers_)
      if (!fiber.done) return false;
    return true;
  }

  void wait(Barrier& barrier, int size) {
    Fiber& own = fibers_[running_];
    own.at = &barrier;
    own.generation = barrier.generation;
    if (++barrier.arrived < size) {
      swapcontext(&own.context, &scheduler_);
    } else {
      barrier.arrived = 0;
      ++barrier.generation;
    }
  }

 private:
  static constexpr size_t kStack = 1 << 17;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    const Barrier* at = nullptr;
    int generation = 0;
    bool done = false;

    bool ready() const { return !done && (!at || at->generation != generation); }
  };

  static void start() {
    current->body_(current->running_);
    current->fibers_[current->running_].done = true;
  }

  std::function<void(int)> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  int running_ = 0;
};

Fibers* Fibers::current = nullptr;

struct BlockMemory {
  std::vector<double> shared;
  Barrier barrier, warp[kThreads / 32];
  double exchanged[2][kThreads];
};

struct HostBlock {
  int thread_, index_, blocks_;
  BlockMemory& memory;
  Barrier& grid;
  mutable int turn = 0;  // a lane that is ahead writes to the other half
  mutable std::vector<std::pair<void*, const void*>> copies = {};

  int thread() const { return thread_; }
  int index() const { return index_; }
  int blocks() const { return blocks_; }
  void sync() const { Fibers::current->wait(memory.barrier, kThreads); }
  void sync_grid() const { Fibers::current->wait(grid, kThreads * blocks_); }
  void reload() const {}
  void copy_16_bytes(void* shared, const void* global) const { copies.emplace_back(shared, global); }
  void wait_for_copies() const {
    for (auto [to, from] : copies) memcpy(to, from, 16);
    copies.clear();
  }
  template <class T>
  T shuffle(T x, int mask) const {
    double* all = memory.exchanged[turn ^= 1];
    all[thread_] = x;
    Fibers::current->wait(memory.warp[thread_ / 32], 32);
    return T(all[thread_ ^ mask]);
  }
};

using namespace forde_fast;

template <class In, int kRows, bool kProduct>
bool run(const Fused& f, const Plan& p, bool backwards) {
  using Small = Small<decltype(widen(In{}))>;
  std::vector<BlockMemory> memory(p.blocks);
  for (BlockMemory& block : memory) block.shared.assign(p.shared / 8, std::numeric_limits<double>::quiet_NaN());
  Barrier grid;
  return Fibers().run(p.blocks * kThreads, backwards, [&](int n) {
    char* shared = reinterpret_cast<char*>(memory[n / kThreads].shared.data());
    const HostBlock block{n % kThreads, n / kThreads, p.blocks, memory[n / kThreads], grid};
    FusedKernel<In, kRows, kProduct, kThreads, HostBlock>{
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
