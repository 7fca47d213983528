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
#include <tuple>
#include <vector>

namespace forde_fast {
namespace {

using at::Tensor;

// The mean of the middle two of an even number, as in NumPy; NaN if there is one.
double median(std::vector<double>& values) {
  const size_t count = values.size();
  for (double v : values)
    if (std::isnan(v)) return std::numeric_limits<double>::quiet_NaN();
  const auto upper = values.begin() + count / 2;
  std::nth_element(values.begin(), upper, values.end());
  if (count % 2) return *upper;
  return (*std::max_element(values.begin(), upper) + *upper) / 2;
}

template <class T>
double median_rule_of(const T* d, const T* alignment, int64_t moving, int64_t repelling, int64_t groups,
                      double log_count, T* c, T* h, T* projection) {
  std::vector<double> sums(groups * moving), bandwidths(groups * repelling), kernel(moving * repelling * groups);
  std::atomic<bool> finite = true;  // an infinite distance alone would only make a kernel value 0
  const auto grain = std::max<int64_t>(1, 2048 / (moving * repelling));
  at::parallel_for(0, groups, grain, [&](int64_t from, int64_t to) {
    std::vector<double> column(moving);
    for (int64_t g = from; g < to; ++g)
      for (int64_t j = 0; j < repelling; ++j) {
        for (int64_t i = 0; i < moving; ++i) {
          column[i] = d[(i * repelling + j) * groups + g];
          if (!std::isfinite(column[i])) finite = false;
        }
        const double own = median(column) / log_count + 1e-12;
        bandwidths[g * repelling + j] = own;
        h[j * groups + g] = T(own);
        for (int64_t i = 0; i < moving; ++i) {
          const int64_t at = (i * repelling + j) * groups + g;
          kernel[at] = std::exp(-double(d[at]) / own);
          sums[g * moving + i] += kernel[at];
        }
      }
  });
  std::vector<double> rows(moving);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < moving; ++i) rows[i] += sums[g * moving + i];
  double value = finite ? 0 : std::numeric_limits<double>::quiet_NaN();
  for (double row : rows) value += std::log(row / groups) / groups;
  at::parallel_for(0, groups, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = 0; i < moving; ++i)
      for (int64_t g = from; g < to; ++g) {
        double aligned = 0;
        for (int64_t j = 0; j < repelling; ++j) {
          const int64_t at = (i * repelling + j) * groups + g;
          const double mixed = -2.0 / groups * kernel[at] / rows[i] / bandwidths[g * repelling + j];
          c[at] = d[at] == 0 ? T(0) : T(mixed);
          if (alignment) aligned += double(c[at]) * double(alignment[at]);
        }
        projection[i * groups + g] = T(aligned);
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
