// The operations on CPU tensors. Their schemas are defined in forde_fast/operators.py.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "operations.h"

namespace forde_fast {

Tensor contrasts(const Tensor& particles, const OptionalTensor& others, bool normalize, double eps) {
  const Rows rows(particles, others, std::nullopt);
  Tensor z = at::empty({rows.rows - 1, rows.groups, rows.columns}, rows.options());
  const int64_t splits = rows.splits();
  const Norms norms(rows, splits, normalize, eps);
  rows.each(splits, [&](int64_t g, int64_t, int64_t begin, int64_t end) {
    Rows::Pointers pointers;
    Lengths own;
    norms.find(g, pointers, own);
    rows.kernels.contrasts(rows.sample(g, own.norm.data(), pointers), begin, end, Rows::point_at(z, g, pointers.out));
  });
  return z;
}

std::tuple<Tensor, Tensor, Tensor> pair_distances(const Tensor& particles, const OptionalTensor& others,
                                                  const OptionalTensor& product, bool normalize, double eps) {
  const Rows rows(particles, others, product);
  const auto options = rows.options();
  Tensor distances = at::empty({rows.moving, rows.repelling(), rows.groups}, options), alignment = at::empty_like(distances);
  Tensor norm = at::empty({rows.rows, rows.groups}, options);
  const int64_t splits = rows.splits(), pairs = rows.moving * rows.repelling(), sums = pairs + rows.rows;
  const Norms norms(rows, splits, normalize, eps);
  std::vector<double> partial(splits == 1 ? 0 : rows.groups * splits * sums);
  AT_DISPATCH_FLOATING_TYPES(rows.type, "pair_distances", [&] {
    const auto store = [&](int64_t g, const double* sum, const Lengths& own) {
      for (int64_t n = 0; n < rows.rows; ++n) norm.mutable_data_ptr<scalar_t>()[n * rows.groups + g] = scalar_t(own.norm[n]);
      store_pairs(rows, sum, own, distances.mutable_data_ptr<scalar_t>() + g, alignment.mutable_data_ptr<scalar_t>() + g, rows.groups);
    };
    rows.each(splits, [&](int64_t g, int64_t split, int64_t begin, int64_t end) {
      Rows::Pointers pointers;
      Lengths own;
      norms.find(g, pointers, own);
      std::vector<double> whole(splits == 1 ? sums : 0);
      double* sum = splits == 1 ? whole.data() : &partial[(g * splits + split) * sums];
      add_pairs(rows, rows.sample(g, own.norm.data(), pointers), begin, end, sum);
      if (splits == 1) store(g, sum, own);
    });
    for (int64_t g = 0; splits > 1 && g < rows.groups; ++g) {
      double* sum = &partial[g * splits * sums];
      for (int64_t at = sums; at < splits * sums; ++at) sum[at % sums] += sum[at];
      Rows::Pointers pointers;
      Lengths own;
      norms.find(g, pointers, own);
      store(g, sum, own);
    }
  });
  return {distances, alignment, norm};
}

Tensor combine(const Tensor& particles, const OptionalTensor& others, const OptionalTensor& product,
               const Tensor& norm, const Tensor& coefficients, const Tensor& projection) {
  const Rows rows(particles, others, product);
  check(norm, rows.type, {rows.rows, rows.groups}, "norm");
  check(coefficients, rows.type, {rows.moving, rows.repelling(), rows.groups}, "coefficients");
  check(projection, rows.type, {rows.moving, rows.groups}, "projection");
  const Tensor norms = norm.contiguous(), t = projection.contiguous();
  const Tensor c = coefficients.contiguous().view({-1, rows.groups});
  Tensor gradient = at::empty({rows.moving, rows.groups, rows.columns}, particles.options());
  rows.each(rows.splits(), [&](int64_t g, int64_t, int64_t begin, int64_t end) {
    Rows::Pointers pointers;
    const auto r = of_sample(norms, g), c_g = of_sample(c, g), t_g = of_sample(t, g);
    rows.kernels.combine(rows.sample(g, r.data(), pointers), begin, end, nullptr, c_g.data(), t_g.data(),
                         Rows::point_at(gradient, g, pointers.out));
  });
  return gradient;
}

namespace {

// Whether rows n and m of a sample are the same divided by their norms, which are found only where the rows have one
// direction: most differ in their first columns. Products of numbers in float are exact in double.
bool alike(const Rows& rows, const Norms& norms, int64_t g, int64_t n, int64_t m, Rows::Pointers& pointers, Lengths& own) {
  return AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.particles.scalar_type(), "alike", [&]() -> bool {
    const auto *x = static_cast<const scalar_t*>(pointers.values[n]), *y = static_cast<const scalar_t*>(pointers.values[m]);
    int64_t first = 0;
    while (first < rows.columns && x[first] == 0 && y[first] == 0) ++first;
    for (int64_t k = first; k < rows.columns; ++k)
      if (double(x[k]) * double(y[first]) != double(y[k]) * double(x[first])) return false;
    if (first == rows.columns) return true;
    if (own.norm.empty()) norms.find(g, pointers, own);
    return double(x[first]) * own.norm[m] == double(y[first]) * own.norm[n];
  });
}

}  // namespace

// product [N - 1, G, K] -> [N, G, K]; see operators.py
Tensor coordinates(const Tensor& particles, const OptionalTensor& others, const Tensor& product, bool normalize, double eps) {
  const Rows rows(particles, others, std::nullopt);
  const Norms norms(rows, 1, normalize, eps);
  check(product, computing_type(particles), {rows.rows - 1, rows.groups, product.size(-1)}, "product");
  const Tensor dense = product.contiguous();
  const int64_t size = product.size(2);
  Tensor x = at::empty({rows.rows, rows.groups, size}, product.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "coordinates", [&] {
    const scalar_t scale = scalar_t(1 / (std::sqrt(double(rows.rows)) - 1));
    at::parallel_for(0, rows.groups, 1, [&](int64_t from, int64_t to) {
      for (int64_t g = from; g < to; ++g) {
        Rows::Pointers pointers;
        Lengths own;
        rows.sample(g, nullptr, pointers);
        const auto* from = Rows::point_at(dense, g, pointers.mixed);
        const auto* to = Rows::point_at(x, g, pointers.out);
        auto* __restrict__ first = static_cast<scalar_t*>(to[0]);
        std::fill_n(first, size, scalar_t(0));
        for (int64_t n = 1; n < rows.rows; ++n) {
          const auto* row = static_cast<const scalar_t*>(from[n - 1]);
          std::copy_n(row, size, static_cast<scalar_t*>(to[n]));
          for (int64_t k = 0; k < size; ++k) first[k] += row[k];
        }
        for (int64_t k = 0; k < size; ++k) first[k] *= scale;
        for (int64_t n = 1; n < rows.rows; ++n)
          for (int64_t m = 0; m < n; ++m)
            if (alike(rows, norms, g, n, m, pointers, own)) {
              std::memcpy(to[n], to[m], size * sizeof(scalar_t));
              break;
            }
      }
    });
  });
  return x;
}

Tensor project(const Tensor& particles, const Tensor& mixed, const OptionalTensor& others, const OptionalTensor& coefficients,
               bool normalize, double eps) {
  const Rows rows(particles, coefficients ? others : std::nullopt, std::nullopt);
  check(mixed, rows.type, particles.sizes(), "mixed");
  if (coefficients) check(*coefficients, rows.type, {rows.moving, rows.repelling(), rows.groups}, "coefficients");
  const Tensor dense = mixed.contiguous();
  const Tensor c = coefficients ? coefficients->contiguous().view({-1, rows.groups}) : at::empty({0, rows.groups}, mixed.options());
  Tensor gradient = at::empty({rows.moving, rows.groups, rows.columns}, particles.options());
  const int64_t splits = rows.splits();
  const Norms norms(rows, splits, normalize, eps);
  // The component along s_i is a sum over all columns: known only when all of them were seen once.
  std::vector<double> partial(rows.groups * splits * rows.moving);
  const auto work = [&](int64_t g, int64_t begin, int64_t end, double* measure, const double* t) {
    Rows::Pointers pointers;
    Lengths own;
    norms.find(g, pointers, own);
    const auto c_g = of_sample(c, g);
    const auto* in = Rows::point_at(dense, g, pointers.mixed);
    const double* weights = coefficients ? c_g.data() : nullptr;
    const Sample sample = rows.sample(g, own.norm.data(), pointers);
    if (measure && normalize) rows.kernels.along(sample, begin, end, in, weights, measure);
    if (t) rows.kernels.combine(sample, begin, end, in, weights, t, Rows::point_at(gradient, g, pointers.out));
  };
  rows.each(splits, [&](int64_t g, int64_t split, int64_t begin, int64_t end) {
    double* t = &partial[(g * splits + split) * rows.moving];
    work(g, begin, end, t, splits == 1 ? t : nullptr);
  });
  if (splits == 1) return gradient;
  for (int64_t g = 0; g < rows.groups; ++g)
    for (int64_t at = rows.moving; at < splits * rows.moving; ++at)
      partial[g * splits * rows.moving + at % rows.moving] += partial[g * splits * rows.moving + at];
  rows.each(splits, [&](int64_t g, int64_t, int64_t begin, int64_t end) {
    work(g, begin, end, nullptr, &partial[g * splits * rows.moving]);
  });
  return gradient;
}

TORCH_LIBRARY_IMPL(forde_fast, CPU, m) {
  m.impl("contrasts", contrasts);
  m.impl("pair_distances", pair_distances);
  m.impl("combine", combine);
  m.impl("coordinates", coordinates);
  m.impl("project", project);
  m.impl("fused", fused);
  m.impl("fused_by_factor", fused_by_factor);
  m.impl("median_rule", median_rule);
}

}  // namespace forde_fast
