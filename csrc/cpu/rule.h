// The rule for the default bandwidth: what forde_fast/rule.py does between the two stages, in two halves, as all samples
// must have been seen before the second. In double throughout; sums in a fixed order, whatever the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace forde_fast {

constexpr int64_t kLanes = 16;    // samples that are worked on together, next to one another in memory
constexpr int64_t kNetwork = 32;  // up to so many rows are sorted without a branch, all lanes at once

// The median of each lane of columns [rows][kLanes], the mean of the middle two of an even number; reorders them.
template <class T>
void medians(T (*columns)[kLanes], int64_t rows, double* out) {
  if (rows <= kNetwork) {  // odd-even transposition
    using Some __attribute__((vector_size(16), aligned(alignof(T)))) = T;  // every processor has vectors of so many bytes
    constexpr int64_t kParts = kLanes * sizeof(T) / 16;
    auto* parts = reinterpret_cast<Some*>(columns);
    for (int64_t round = 0; round < rows; ++round)
      for (Some* pair = parts + round % 2 * kParts; pair + kParts < parts + rows * kParts; pair += 2 * kParts)
        for (int64_t k = 0; k < kParts; ++k) {
          const Some a = pair[k], b = pair[kParts + k];
          pair[k] = b < a ? b : a;
          pair[kParts + k] = b < a ? a : b;
        }
    for (int64_t lane = 0; lane < kLanes; ++lane)
      out[lane] = (double(columns[(rows - 1) / 2][lane]) + double(columns[rows / 2][lane])) / 2;
    return;
  }
  std::vector<T> column(rows);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    bool ordered = true;
    for (int64_t i = 0; i < rows; ++i) column[i] = columns[i][lane], ordered &= column[i] == column[i];
    const auto upper = column.begin() + rows / 2;
    if (ordered) std::nth_element(column.begin(), upper, column.end());  // NaN has no place in an order
    out[lane] = rows % 2 ? double(*upper) : (double(*std::max_element(column.begin(), upper)) + double(*upper)) / 2;
  }
}

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
  MedianRule(void (*exponentials)(double*, int64_t), int64_t moving, int64_t repelling, int64_t groups, double log_count, T* bandwidth)
      : exponentials_(exponentials), moving_(moving), repelling_(repelling), groups_(groups), log_count_(log_count), h_(bandwidth),
        sums_(groups * moving), rows_(moving) {}

  // Bandwidths of the samples g .. g + count, at most kLanes, and what coefficients are multiples of: the kernel values
  // divided by these, 0 where a distance is; d, slopes [Mi Mj]. All lanes are worked on, so that the compiler makes
  // vectors of them.
  void kernels(int64_t g, int64_t count, Block<T>& d, Block<double>& slopes) {
    Block<T> columns(moving_);
    Block<double> values(moving_), sums(moving_);
    double middle[kLanes], own[kLanes], reciprocal[kLanes];
    T excess[kLanes] = {};  // 0 as long as all is finite
    for (int64_t j = 0; j < repelling_; ++j) {
      for (int64_t i = 0; i < moving_; ++i) {
        const T* from = d[i * repelling_ + j];
        T* to = columns[i];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          to[lane] = from[lane];
          excess[lane] += from[lane] * 0;
        }
      }
      medians(reinterpret_cast<T(*)[kLanes]>(columns[0]), moving_, middle);
      for (int64_t lane = 0; lane < kLanes; ++lane) own[lane] = middle[lane] / log_count_ + 1e-12, reciprocal[lane] = 1 / own[lane];
      std::copy_n(own, count, h_ + j * groups_ + g);
      for (int64_t i = 0; i < moving_; ++i) {
        const T* from = d[i * repelling_ + j];
        double* to = values[i];
        for (int64_t lane = 0; lane < kLanes; ++lane) to[lane] = -double(from[lane]) / own[lane];
      }
      exponentials_(values[0], moving_ * kLanes);
      for (int64_t i = 0; i < moving_; ++i) {
        const T* from = d[i * repelling_ + j];
        double *to = slopes[i * repelling_ + j], *value = values[i], *sum = sums[i];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          to[lane] = from[lane] == 0 ? 0 : value[lane] * reciprocal[lane];
          sum[lane] = (j == 0 ? 0 : sum[lane]) + value[lane];
        }
      }
    }
    for (int64_t i = 0; i < moving_; ++i) std::copy_n(sums[i], count, &sums_[i * groups_ + g]);
    for (T x : excess)
      if (x != 0) finite_ = false;  // an infinite distance alone would only make a kernel value 0
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
  void (*const exponentials_)(double*, int64_t);  // of repulsion.h
  const int64_t moving_, repelling_, groups_;
  const double log_count_;
  T* h_;                      // [Mj, G]
  std::vector<double> sums_;  // of the kernel values, [Mi, G]
  std::vector<double> rows_;  // [Mi]
  std::atomic<bool> finite_ = true;
};

}  // namespace forde_fast
