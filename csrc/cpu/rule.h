// The rule for the default bandwidth: what forde_fast/rule.py does between the two stages, in two halves, as all samples
// must have been seen before the second. In double throughout; sums in a fixed order, whatever the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace forde_fast {

constexpr int64_t kLanes = 16;    // samples that are worked on together, next to one another in memory
constexpr int64_t kNetwork = 32;  // up to so many rows are sorted without a branch, all lanes at once

// The median of each lane of columns [rows][kLanes], the mean of the middle two of an even number; reorders them.
template <class T>
void medians(T (*columns)[kLanes], int64_t rows, double* out) {
  if (rows <= kNetwork) {  // odd-even transposition
    for (int64_t round = 0; round < rows; ++round)
      for (int64_t i = round % 2; i + 1 < rows; i += 2)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const T a = columns[i][lane], b = columns[i + 1][lane];
          columns[i][lane] = b < a ? b : a;
          columns[i + 1][lane] = b < a ? a : b;
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

template <class T>
class MedianRule {
 public:
  // distances, alignment [Mi, Mj, G], the latter or null; results are coefficients [Mi, Mj, G], bandwidth [Mj, G] and
  // projection [Mi, G]
  MedianRule(void (*exponentials)(double*, int64_t), int64_t moving, int64_t repelling, int64_t groups, double log_count, const T* distances, const T* alignment,
             T* coefficients, T* bandwidth, T* projection)
      : exponentials_(exponentials), moving_(moving), repelling_(repelling), groups_(groups), log_count_(log_count), d_(distances), alignment_(alignment),
        c_(coefficients), h_(bandwidth), projection_(projection), sums_(groups * moving), exact_h_(repelling * groups),
        kernel_(new double[moving * repelling * groups]), rows_(moving) {}

  // Bandwidths and kernel values of the samples g .. g + count, at most kLanes.
  void kernels(int64_t g, int64_t count) {
    std::vector<T> memory(moving_ * kLanes);
    auto* columns = reinterpret_cast<T(*)[kLanes]>(memory.data());
    std::vector<double> values(moving_ * count);
    double middle[kLanes];
    T excess = 0;  // 0 as long as all is finite
    for (int64_t j = 0; j < repelling_; ++j) {
      for (int64_t i = 0; i < moving_; ++i)
        for (int64_t lane = 0; lane < count; ++lane) {
          columns[i][lane] = d_[at(i, j, g) + lane];
          excess += columns[i][lane] * 0;
        }
      medians(columns, moving_, middle);
      double* own = &exact_h_[j * groups_ + g];
      for (int64_t lane = 0; lane < count; ++lane) {
        own[lane] = middle[lane] / log_count_ + 1e-12;
        h_[j * groups_ + g + lane] = T(own[lane]);
      }
      for (int64_t i = 0; i < moving_; ++i)
        for (int64_t lane = 0; lane < count; ++lane) values[i * count + lane] = -double(d_[at(i, j, g) + lane]) / own[lane];
      exponentials_(values.data(), moving_ * count);
      for (int64_t i = 0; i < moving_; ++i)
        for (int64_t lane = 0; lane < count; ++lane) {
          kernel_[at(i, j, g) + lane] = values[i * count + lane];
          sums_[(g + lane) * moving_ + i] += values[i * count + lane];
        }
    }
    if (excess != 0) finite_ = false;  // an infinite distance alone would only make a kernel value 0
  }

  // The value, NaN where a distance is not finite; after the kernels of all samples.
  double value() {
    for (int64_t g = 0; g < groups_; ++g)
      for (int64_t i = 0; i < moving_; ++i) rows_[i] += sums_[g * moving_ + i];
    double value = finite_ ? 0 : std::numeric_limits<double>::quiet_NaN();
    for (double row : rows_) value += std::log(row / groups_) / groups_;
    return value;
  }

  // Coefficients and projection of the samples g .. g + count; after the value.
  void coefficients(int64_t g, int64_t count) {
    for (int64_t i = 0; i < moving_; ++i) {
      const double scale = -2.0 / groups_ / rows_[i];
      double aligned[kLanes] = {};
      for (int64_t j = 0; j < repelling_; ++j)
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t to = at(i, j, g) + lane;
          c_[to] = d_[to] == 0 ? T(0) : T(scale * kernel_[to] / exact_h_[j * groups_ + g + lane]);
          if (alignment_) aligned[lane] += double(c_[to]) * double(alignment_[to]);
        }
      for (int64_t lane = 0; lane < count; ++lane) projection_[i * groups_ + g + lane] = T(aligned[lane]);
    }
  }

 private:
  int64_t at(int64_t i, int64_t j, int64_t g) const { return (i * repelling_ + j) * groups_ + g; }

  void (*const exponentials_)(double*, int64_t);  // of repulsion.h
  const int64_t moving_, repelling_, groups_;
  const double log_count_;
  const T *d_, *alignment_;
  T *c_, *h_, *projection_;
  std::vector<double> sums_, exact_h_;  // [G, Mi], [Mj, G]
  std::unique_ptr<double[]> kernel_;    // [Mi, Mj, G]
  std::vector<double> rows_;            // [Mi]
  std::atomic<bool> finite_ = true;
};

}  // namespace forde_fast
