// The median rule on CPU tensors: what forde_fast/rule.py does for the default bandwidth, in one pass over the small
// tensors between the two stages. In double throughout; sums in a fixed order, whatever the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

namespace forde_fast {
namespace {

using at::Tensor;

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
double median_rule_of(const T* d, const T* alignment, int64_t moving, int64_t repelling, int64_t groups,
                      double log_count, T* c, T* h, T* projection) {
  std::vector<double> sums(groups * moving), bandwidths(repelling * groups);
  const std::unique_ptr<double[]> kernel(new double[moving * repelling * groups]);
  std::atomic<bool> finite = true;  // an infinite distance alone would only make a kernel value 0
  const auto each = [&](const auto& f) {  // f(g, count): a few samples, split over threads
    const auto grain = std::max<int64_t>(1, 2048 / (moving * repelling * kLanes));
    at::parallel_for(0, (groups + kLanes - 1) / kLanes, grain, [&](int64_t from, int64_t to) {
      for (int64_t g = from * kLanes; g < std::min(groups, to * kLanes); g += kLanes) f(g, std::min(kLanes, groups - g));
    });
  };
  each([&](int64_t g, int64_t count) {
    std::vector<T> memory(moving * kLanes);
    auto* columns = reinterpret_cast<T(*)[kLanes]>(memory.data());
    double middle[kLanes];
    T excess = 0;  // 0 as long as all is finite
    for (int64_t j = 0; j < repelling; ++j) {
      for (int64_t i = 0; i < moving; ++i)
        for (int64_t lane = 0; lane < count; ++lane) {
          columns[i][lane] = d[(i * repelling + j) * groups + g + lane];
          excess += columns[i][lane] * 0;
        }
      medians(columns, moving, middle);
      double* own = &bandwidths[j * groups + g];
      for (int64_t lane = 0; lane < count; ++lane) {
        own[lane] = middle[lane] / log_count + 1e-12;
        h[j * groups + g + lane] = T(own[lane]);
      }
      for (int64_t i = 0; i < moving; ++i)
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t at = (i * repelling + j) * groups + g + lane;
          kernel[at] = std::exp(-double(d[at]) / own[lane]);
          sums[(g + lane) * moving + i] += kernel[at];
        }
    }
    if (excess != 0) finite = false;
  });
  std::vector<double> rows(moving);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < moving; ++i) rows[i] += sums[g * moving + i];
  double value = finite ? 0 : std::numeric_limits<double>::quiet_NaN();
  for (double row : rows) value += std::log(row / groups) / groups;
  each([&](int64_t g, int64_t count) {
    for (int64_t i = 0; i < moving; ++i) {
      const double scale = -2.0 / groups / rows[i];
      double aligned[kLanes] = {};
      for (int64_t j = 0; j < repelling; ++j)
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t at = (i * repelling + j) * groups + g + lane;
          c[at] = d[at] == 0 ? T(0) : T(scale * kernel[at] / bandwidths[j * groups + g + lane]);
          if (alignment) aligned[lane] += double(c[at]) * double(alignment[at]);
        }
      for (int64_t lane = 0; lane < count; ++lane) projection[i * groups + g + lane] = T(aligned[lane]);
    }
  });
  return value;
}

// distances, alignment [Mi, Mj, G] or none -> value [] (NaN where a distance is not finite), coefficients [Mi, Mj, G], bandwidth [Mj, G], projection [Mi, G]
std::tuple<Tensor, Tensor, Tensor, Tensor> median_rule(const Tensor& distances, const std::optional<Tensor>& alignment, double log_count) {
  TORCH_CHECK(distances.dim() == 3, "distances: expected [Mi, Mj, G], got ", distances.sizes());
  if (alignment)
    TORCH_CHECK(alignment->sizes() == distances.sizes() && alignment->scalar_type() == distances.scalar_type(), "alignment: expected ",
                distances.scalar_type(), " ", distances.sizes(), " as distances, got ", alignment->scalar_type(), " ", alignment->sizes());
  const Tensor d = distances.contiguous(), e = alignment ? alignment->contiguous() : Tensor();
  const int64_t moving = d.size(0), repelling = d.size(1), groups = d.size(2);
  Tensor c = at::empty_like(d), value = at::empty({}, d.options());
  Tensor h = at::empty({repelling, groups}, d.options()), projection = at::empty({moving, groups}, d.options());
  AT_DISPATCH_FLOATING_TYPES(d.scalar_type(), "median_rule", [&] {
    const double exact = median_rule_of<scalar_t>(
        d.const_data_ptr<scalar_t>(), e.defined() ? e.const_data_ptr<scalar_t>() : nullptr, moving, repelling, groups, log_count,
        c.mutable_data_ptr<scalar_t>(), h.mutable_data_ptr<scalar_t>(), projection.mutable_data_ptr<scalar_t>());
    *value.mutable_data_ptr<scalar_t>() = scalar_t(exact);
  });
  return {value, c, h, projection};
}

}  // namespace

TORCH_LIBRARY_IMPL(forde_fast, CPU, m) { m.impl("median_rule", median_rule); }

}  // namespace forde_fast
