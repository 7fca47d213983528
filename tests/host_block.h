// The blocks of a CUDA kernel on the host: every thread of every block is a fiber, one runs at a time and hands on at
// barriers. A missing barrier shows as a difference between the orders in which fibers run, one that not all threads
// reach as a standstill. Shared memory starts as NaN.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

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
    if (!arrive(barrier, size)) swapcontext(&own.context, &scheduler_);
  }

  // Whether all have now.
  bool arrive(Barrier& barrier, int size) {
    if (++barrier.arrived < size) return false;
    barrier.arrived = 0;
    ++barrier.generation;
    return true;
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

inline Fibers* Fibers::current = nullptr;

template <int kThreads>
struct BlockMemory {
  std::vector<double> shared;
  Barrier barrier, warp[kThreads / 32];
  double exchanged[2][kThreads];

  explicit BlockMemory(size_t bytes = 0) : shared((bytes + 7) / 8, std::numeric_limits<double>::quiet_NaN()) {}
};

template <int kThreads>
struct HostBlock {
  int thread_, index_, blocks_;
  BlockMemory<kThreads>& memory;
  Barrier& grid;
  mutable int turn = 0;  // a lane that is ahead writes to the other half
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    int group;
  };
  mutable std::vector<Copy> copies = {};
  mutable int groups = 0;
  bool early = false;  // copies as early as they may come

  int thread() const { return thread_; }
  int index() const { return index_; }
  int blocks() const { return blocks_; }
  void sync() const { Fibers::current->wait(memory.barrier, kThreads); }
  void sync_grid() const { Fibers::current->wait(grid, kThreads * blocks_); }
  void reload() const {}
  // As late as the kernel allows, when their group is waited for, unless `early`.
  void copy_16_bytes(void* shared, const void* global, bool there = true) const {
    const Copy copy{shared, there ? global : nullptr, groups};
    if (early)
      land(copy);
    else
      copies.push_back(copy);
  }
  void commit_copies() const { ++groups; }
  template <int kPending>
  void wait_for_copies() const {
    size_t kept = 0;
    for (const Copy& copy : copies)
      if (copy.group >= groups - kPending)
        copies[kept++] = copy;
      else
        land(copy);
    copies.resize(kept);
  }
  static void land(const Copy& copy) {
    if (copy.from)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
  }
  template <class T>
  T shuffle(T x, int mask) const {
    double* all = memory.exchanged[turn ^= 1];
    all[thread_] = x;
    Fibers::current->wait(memory.warp[thread_ / 32], 32);
    return T(all[thread_ ^ mask]);
  }
};
