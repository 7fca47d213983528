// The rule for the default bandwidth: what forde_fast/rule.py does between the two stages, in two halves, as all samples
// must have been seen before the second. In double throughout; sums in a fixed order, whatever the number of threads.
// (Distances themselves may differ by it in their last bits: where samples are few, `Rows::splits` cuts columns for it.)
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "../repulsion.h"

namespace forde_fast {

// Numbers of kLanes samples next to one another, [count][kLanes]: 1 where there is no sample.
template <class T>
struct Block {
  std::vector<T> memory;

  explicit Block(int64_t count) : memory(count * kLanes, T(1)) {}
  T* operator[](int64_t n) { return &memory[n * kLanes]; }
};

template <class T>
class MedianRule {
 public:
  MedianRule(const Kernels& kernels, int64_t moving, int64_t repelling, int64_t groups, double log_count, T* bandwidth)
      : kernels_(kernels), moving_(moving), repelling_(repelling), groups_(groups), log_count_(log_count), h_(bandwidth),
        sums_(groups * moving), rows_(moving) {}

  // Bandwidths of the samples g .. g + count, at most kLanes, and the slopes, which coefficients are multiples of, from
  // their distances: both [Mi Mj].
  void kernels(int64_t g, int64_t count, Block<T>& d, Block<double>& slopes) {
    Block<double> bandwidth(repelling_), sums(moving_);
    if (!kernels_.rule(moving_, repelling_, log_count_, d[0], bandwidth[0], slopes[0], sums[0])) finite_ = false;
    for (int64_t j = 0; j < repelling_; ++j) std::copy_n(bandwidth[j], count, h_ + j * groups_ + g);
    for (int64_t i = 0; i < moving_; ++i) std::copy_n(sums[i], count, &sums_[i * groups_ + g]);
  }

  // The value, NaN where a distance is not finite; after the kernels of all samples.
  double value() {
    for (int64_t i = 0; i < moving_; ++i) rows_[i] = std::accumulate(&sums_[i * groups_], &sums_[i * groups_] + groups_, 0.0);
    double value = finite_ ? 0 : std::numeric_limits<double>::quiet_NaN();
    for (double row : rows_) value += std::log(row / groups_) / groups_;
    return value;
  }

  // The coefficients of row i are so many times its slopes; after the value.
  double scale(int64_t i) const { return -2.0 / groups_ / rows_[i]; }

  // Slopes of a sample [Mi, Mj] -> its coefficients.
  void scale_rows(double* slopes) const {
    for (int64_t i = 0; i < moving_; ++i)
      std::for_each_n(slopes + i * repelling_, repelling_, [own = scale(i)](double& slope) { slope *= own; });
  }

 private:
  const Kernels& kernels_;
  const int64_t moving_, repelling_, groups_;
  const double log_count_;
  T* h_;                      // [Mj, G]
  std::vector<double> sums_;  // of the kernel values, [Mi, G]
  std::vector<double> rows_;  // [Mi]
  std::atomic<bool> finite_ = true;
};

}  // namespace forde_fast
