// The rule for the default bandwidth: what forde_fast/rule.py does between the two stages, in two halves, as all samples
// must have been seen before the second. In double throughout; sums in a fixed order, whatever the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
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

template <class T>
class MedianRule {
 public:
  // distances, alignment [Mi, Mj, G], the latter or null; results are coefficients [Mi, Mj, G], bandwidth [Mj, G] and
  // projection [Mi, G]
  MedianRule(void (*exponentials)(double*, int64_t), int64_t moving, int64_t repelling, int64_t groups, double log_count, const T* distances, const T* alignment,
             T* coefficients, T* bandwidth, T* projection)
      : exponentials_(exponentials), moving_(moving), repelling_(repelling), groups_(groups), log_count_(log_count), d_(distances), alignment_(alignment),
        c_(coefficients), h_(bandwidth), projection_(projection), sums_(groups * moving), reciprocal_h_(repelling * groups),
        kernel_(new double[moving * repelling * groups]), rows_(moving) {}

  // Bandwidths and kernel values of the samples g .. g + count, at most kLanes. All lanes are worked on, so that the
  // compiler makes vectors of them; those without a sample have distances of 1.
  void kernels(int64_t g, int64_t count) {
    std::vector<T> memory(moving_ * kLanes);
    std::vector<double> values(moving_ * kLanes);
    auto* columns = reinterpret_cast<T(*)[kLanes]>(memory.data());
    double middle[kLanes], own[kLanes];
    T excess[kLanes] = {};  // 0 as long as all is finite
    for (int64_t j = 0; j < repelling_; ++j) {
      for (int64_t i = 0; i < moving_; ++i) {
        std::fill_n(columns[i], kLanes, T(1));
        std::copy_n(d_ + at(i, j, g), count, columns[i]);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          excess[lane] += columns[i][lane] * 0;
          values[i * kLanes + lane] = columns[i][lane];
        }
      }
      medians(columns, moving_, middle);
      for (int64_t lane = 0; lane < kLanes; ++lane) own[lane] = middle[lane] / log_count_ + 1e-12;
      std::copy_n(own, count, h_ + j * groups_ + g);
      for (int64_t lane = 0; lane < count; ++lane) reciprocal_h_[j * groups_ + g + lane] = 1 / own[lane];
      for (int64_t i = 0; i < moving_; ++i)
        for (int64_t lane = 0; lane < kLanes; ++lane) values[i * kLanes + lane] /= -own[lane];
      exponentials_(values.data(), moving_ * kLanes);
      for (int64_t i = 0; i < moving_; ++i) {
        std::copy_n(&values[i * kLanes], count, &kernel_[at(i, j, g)]);
        for (int64_t lane = 0; lane < count; ++lane) sums_[i * groups_ + g + lane] += values[i * kLanes + lane];
      }
    }
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

  // Coefficients and projection of the samples g .. g + count; after the value.
  void coefficients(int64_t g, int64_t count) {
    count == kLanes ? coefficients_of(g, std::integral_constant<int64_t, kLanes>()) : coefficients_of(g, count);
  }

 private:
  // A count that is known beforehand makes vectors of the loops.
  template <class Count>
  void coefficients_of(int64_t g, Count count) {
    for (int64_t i = 0; i < moving_; ++i) {
      const double scale = -2.0 / groups_ / rows_[i];
      double aligned[kLanes] = {};
      for (int64_t j = 0; j < repelling_; ++j) {
        const int64_t from = at(i, j, g);
        const double *kernel = &kernel_[from], *reciprocal = &reciprocal_h_[j * groups_ + g];
        T c[kLanes];
        for (int64_t lane = 0; lane < count; ++lane) c[lane] = d_[from + lane] == 0 ? T(0) : T(scale * kernel[lane] * reciprocal[lane]);
        for (int64_t lane = 0; alignment_ && lane < count; ++lane) aligned[lane] += double(c[lane]) * double(alignment_[from + lane]);
        std::copy_n(c, int64_t(count), c_ + from);
      }
      for (int64_t lane = 0; lane < count; ++lane) projection_[i * groups_ + g + lane] = T(aligned[lane]);
    }
  }

  int64_t at(int64_t i, int64_t j, int64_t g) const { return (i * repelling_ + j) * groups_ + g; }

  void (*const exponentials_)(double*, int64_t);  // of repulsion.h
  const int64_t moving_, repelling_, groups_;
  const double log_count_;
  const T *d_, *alignment_;
  T *c_, *h_, *projection_;
  std::vector<double> sums_, reciprocal_h_;  // [Mi, G], [Mj, G]
  std::unique_ptr<double[]> kernel_;    // [Mi, Mj, G]
  std::vector<double> rows_;            // [Mi]
  std::atomic<bool> finite_ = true;
};

}  // namespace forde_fast
