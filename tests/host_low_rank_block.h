// What low_rank_kernel.h asks of a block beyond host_block.h: csrc/cuda/low_rank_block.h on the host.
#pragma once

#include <algorithm>
#include <map>
#include <stdexcept>

#include "../csrc/cuda/low_rank.h"
#include "host_block.h"

// Of copies to one place: which phase they are of, and those asked for that have not come.
struct HostArrival {
  static constexpr int kNever = 1 << 30;
  Barrier barrier;
  int phase = 0, bytes = 0, asked = 0;
  std::vector<std::function<void()>> copies;
};

struct LowRankMemory : BlockMemory<forde_fast::kLowRankThreads> {
  using BlockMemory::BlockMemory;
  Barrier some[16];
  std::map<const void*, HostArrival> arrivals;
};

struct LowRankHostBlock : HostBlock<forde_fast::kLowRankThreads> {
  using Arrival = forde_fast::Arrival;
  LowRankMemory& own;
  const forde_fast::LowRank& f;
  mutable std::vector<std::function<void()>> products = {};  // that are found as late as they may be if copies are early
  mutable std::vector<size_t> ends = {};                     // of their groups

  LowRankHostBlock(int thread, int index, int blocks, LowRankMemory& own, Barrier& grid, const forde_fast::LowRank& f)
      : HostBlock{thread, index, blocks, own, grid}, own(own), f(f) {}

  using HostBlock::sync;
  void sync(int barrier, int threads) const { Fibers::current->wait(own.some[barrier], threads); }
  void arrive(int barrier, int threads) const { Fibers::current->arrive(own.some[barrier], threads); }
  template <int>
  void take_registers() const {}
  template <int>
  void leave_registers() const {}
  int anew(int x) const { return x; }
  template <class T>
  T from_lane(T x, int lane) const {
    double* all = own.exchanged[turn ^= 1];
    all[thread_] = x;
    Fibers::current->wait(own.warp[thread_ / 32], 32);
    return T(all[thread_ / 32 * 32 + lane]);
  }

  // Copies come as late as the kernel allows, when they are waited for, or if `early` at once.
  void init(Arrival* arrival) const { own.arrivals[arrival] = {}; }
  void expect(Arrival* arrival, int bytes) const {
    if (own.arrivals.at(arrival).bytes) throw std::logic_error("copies to where others are on their way");
    own.arrivals.at(arrival).bytes = bytes;
  }
  void wait(Arrival* arrival, int phase) const {
    auto& at = own.arrivals.at(arrival);
    if (at.phase % 2 != phase) return;
    while (at.phase % 2 == phase && !(at.asked == at.bytes && at.bytes > 0)) Fibers::current->wait(at.barrier, at.kNever);
    if (at.phase % 2 != phase) return;  // others have seen to it
    for (const auto& copy : at.copies) copy();
    at.copies.clear();
    at.bytes = at.asked = 0;
    ++at.phase;
  }
  void add_copy(Arrival* arrival, int bytes, std::function<void()> copy) const {
    auto& at = own.arrivals.at(arrival);
    if (early)
      copy();
    else
      at.copies.push_back(copy);
    at.asked += bytes;
    ++at.barrier.generation;
  }
  void copy(void* shared, const void* global, int bytes, Arrival* arrival) const {
    add_copy(arrival, bytes, [=] { memcpy(shared, global, bytes); });
  }
  void copy_rows(float* shared, int column, int sample, Arrival* arrival) const {
    add_copy(arrival, forde_fast::kTileRows * forde_fast::kColumns * 4, [=, this] {
      for (int row = 0; row < forde_fast::kTileRows; ++row)
        for (int k = 0; k < forde_fast::kColumns; ++k) {
          const int64_t g = sample + row / forde_fast::kLowRankMembers, m = row % forde_fast::kLowRankMembers, c = column + k;
          const bool there = g < f.groups && m < f.members && c < f.columns;
          shared[row * forde_fast::kColumns + k] = there ? f.particles[g * f.stride_g + m * f.stride_m + c] : 0;
        }
    });
  }
  void fence() const {}
  void fence_of_global() const {}
  void prefetch_rows() const {}

  template <class Operand>
  Operand uniform(const Operand& x) const {
    return x;
  }

  // As in csrc/cuda/low_rank_block.h: found at once or, where copies are early, when they are waited for.
  void start_products() const {}
  void commit_products() const { ends.push_back(products.size()); }
  template <int kPending>
  void wait_for_products_but() const {
    const size_t count = int(ends.size()) > kPending ? ends[ends.size() - 1 - kPending] : 0;
    for (size_t n = 0; n < count; ++n) products[n]();
    products.erase(products.begin(), products.begin() + count);
    ends.erase(ends.begin(), ends.end() - std::min<size_t>(kPending, ends.size()));
    for (size_t& end : ends) end -= count;
  }
  template <int kPending = 0>
  void wait_for_products(float (&)[40]) const {
    wait_for_products_but<kPending>();
  }
  template <bool kTransposed, class Operand>
  void multiply_add(float (&c)[40], const Operand& a, const Operand& b) const {
    if (early)
      products.push_back([this, &c, a, b] { find_product<kTransposed>(c, a, b); });
    else
      find_product<kTransposed>(c, a, b);
  }
  template <bool kTransposed, class Operand>
  void find_product(float (&c)[40], const Operand& a, const Operand& b) const {
    const auto number = [](const Operand& x, int row, int column, bool transposed) {
      const char* tile = reinterpret_cast<const char*>(x.at) + x.from(row, column).offset;
      const int down = transposed ? column : row, across = transposed ? row : column;
      return double(reinterpret_cast<const _Float16*>(tile)[down % 8 * 8 + across % 8]);
    };
    for (int n = 0; n < 40; ++n) {
      const int row = thread_ / 32 % 4 * 16 + thread_ % 32 / 4 + n % 4 / 2 * 8, column = n / 4 * 8 + thread_ % 4 * 2 + n % 2;
      double total = c[n];
      for (int k = 0; k < 16; ++k) total += number(a, row, k, kTransposed) * number(b, column, k, false);
      c[n] = float(total);
    }
  }
};
