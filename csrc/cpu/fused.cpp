// The operations with the rule for the default bandwidth: the rule alone, and the whole operation between the particles.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include "operations.h"
#include "rule.h"

namespace forde_fast {
namespace {

// f(g, count) for up to kLanes samples at a time. Threads take the next ones as they get ready, fewer towards the end, so
// that all end together: a processor that others use too is slower at times.
template <class F>
void in_lanes(int64_t groups, bool backwards, const F& f) {
  const int64_t threads = std::min<int64_t>((groups + kLanes - 1) / kLanes, at::get_num_threads());
  std::atomic<int64_t> taken = 0;
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t from = 0; from < groups;) {
      const int64_t count = std::min(groups - from, std::clamp<int64_t>((groups - from) / (2 * threads) / 4 * 4, 4, kLanes));
      if (!taken.compare_exchange_weak(from, from + count)) continue;  // it now holds what is taken
      f(backwards ? groups - from - count : from, count);
      from += count;
    }
  });
}

template <class T>
MedianRule<T> make_rule(const Tensor& d, const Tensor& alignment, double log_count, Tensor& c, Tensor& h, Tensor& projection) {
  return {kernels_for(d.scalar_type(), false).exponentials, d.size(0), d.size(1), d.size(2), log_count, d.const_data_ptr<T>(),
          alignment.defined() ? alignment.const_data_ptr<T>() : nullptr, c.mutable_data_ptr<T>(), h.mutable_data_ptr<T>(),
          projection.mutable_data_ptr<T>()};
}

struct Whole {
  Tensor gradient, value, bandwidth, distances, coefficients;

  // The largest first: it then fits where the last call's was.
  explicit Whole(const Rows& rows, const Tensor& gradient)
      : gradient(gradient), value(at::empty({}, rows.options())), bandwidth(at::empty({rows.moving, rows.groups}, rows.options())),
        distances(at::empty({rows.moving, rows.moving, rows.groups}, rows.options())), coefficients(at::empty_like(distances)) {}
};

// Distances (to which `more` [M, M, G] is added), kernels, coefficients and gradient in two passes over the samples; the
// rows that the first one read last are the ones that the second one, going backwards, reads first.
template <class T>
void in_two_passes(const Rows& rows, const Tensor& more, bool normalize, double eps, double log_count, Whole& to) {
  Tensor alignment = at::empty_like(to.distances), projection = at::empty({rows.moving, rows.groups}, rows.options());
  auto* distances = to.distances.mutable_data_ptr<T>();
  auto rule = make_rule<T>(to.distances, alignment, log_count, to.coefficients, to.bandwidth, projection);
  const Norms norms(rows, 1, normalize, eps);
  std::vector<double> norm(rows.groups * rows.moving);
  std::vector<char> far(rows.groups);
  const int64_t pairs = rows.moving * rows.moving;
  in_lanes(rows.groups, false, [&](int64_t first, int64_t count) {
    Measured found;
    for (int64_t g = first; g < first + count; ++g) {
      found.measure(rows, norms, g);
      store_pairs(rows, g, found.sums.data(), found.lengths, distances, alignment.mutable_data_ptr<T>());
      std::copy(found.lengths.norm.begin(), found.lengths.norm.end(), &norm[g * rows.moving]);
      far[g] = found.far;
      for (int64_t p = 0; more.defined() && p < pairs; ++p) distances[p * rows.groups + g] += more.const_data_ptr<T>()[p * rows.groups + g];
    }
    rule.kernels(first, count);
  });
  *to.value.mutable_data_ptr<T>() = T(rule.value());
  const T *c = to.coefficients.const_data_ptr<T>(), *t = normalize ? projection.const_data_ptr<T>() : nullptr;
  const bool past_caches = int64_t(to.gradient.nbytes()) > kCached;
  in_lanes(rows.groups, true, [&](int64_t first, int64_t count) {
    rule.coefficients(first, count);
    Rows::Pointers pointers;
    Weights weights(rows.moving);
    for (int64_t g = first + count - 1; g >= first; --g) {
      const Sample sample = rows.sample(g, &norm[g * rows.moving], pointers);
      take_sample(c, pairs, rows.groups, g, weights.c);
      if (t) take_sample(t, rows.moving, rows.groups, g, weights.t);
      weights.combine_rows(rows, sample, far[g], nullptr, Rows::point_at(to.gradient, g, pointers.out), past_caches);
    }
  });
}

// C = F F^T + tail I, F [D, K]: what `in_two_passes` does, on the K columns x = S F, between two thin products. The
// contrasts, the gradient in those columns times F^T and the gradient itself have the same memory one after the other.
template <class T>
Whole by_factor(const Rows& rows, const Tensor& factor, double tail, bool normalize, double eps, double log_count) {
  Tensor work = at::empty(rows.particles.sizes(), rows.options()), raw, alignment;
  if (tail) raw = at::empty({rows.moving, rows.moving, rows.groups}, rows.options()), alignment = at::empty_like(raw);
  const int64_t pairs = rows.moving * rows.moving;
  Tensor z = work.narrow(0, 0, rows.moving - 1);
  const Norms norms(rows, 1, normalize, eps);
  std::vector<double> norm(rows.groups * rows.moving);
  std::vector<char> far(rows.groups);
  std::atomic<bool> finite = true;
  in_lanes(rows.groups, false, [&](int64_t first, int64_t count) {
    Measured found;
    auto& pointers = found.pointers;
    auto& lengths = found.lengths;
    for (int64_t g = first; g < first + count; ++g) {
      if (tail) {
        found.measure(rows, norms, g);
        store_pairs(rows, g, found.sums.data(), lengths, raw.mutable_data_ptr<T>(), alignment.mutable_data_ptr<T>(), tail);
        far[g] = found.far;
      } else {
        norms.find(g, pointers, lengths);
      }
      if (!all_finite(lengths.norm)) finite = false;
      std::copy(lengths.norm.begin(), lengths.norm.end(), &norm[g * rows.moving]);
      rows.kernels.contrasts(rows.sample(g, lengths.norm.data(), pointers), 0, rows.columns, Rows::point_at(z, g, pointers.out));
    }
  });
  const Tensor x = coordinates(rows.particles, std::nullopt, at::mm(z.view({-1, rows.columns}), factor).view({rows.moving - 1, rows.groups, -1}));
  const Rows thin(x, std::nullopt, std::nullopt);
  Whole whole(thin, at::empty_like(x));
  in_two_passes<T>(thin, raw, false, eps, log_count, whole);
  Tensor products = work.view({-1, rows.columns});
  at::mm_out(products, whole.gradient.view({-1, x.size(2)}), factor.t());
  if (!finite) whole.value.fill_(std::numeric_limits<double>::quiet_NaN());

  const bool narrow = rows.particles.scalar_type() != rows.type;
  whole.gradient = narrow ? at::empty(rows.particles.sizes(), rows.particles.options()) : work;
  const T *c = whole.coefficients.template const_data_ptr<T>(), *a = tail ? alignment.const_data_ptr<T>() : nullptr;
  in_lanes(rows.groups, true, [&](int64_t first, int64_t count) {
    Rows::Pointers pointers;
    Weights weights(rows.moving);
    for (int64_t g = first + count - 1; g >= first; --g) {
      const Sample sample = rows.sample(g, &norm[g * rows.moving], pointers);
      const auto* mixed = Rows::point_at(work, g, pointers.mixed);
      if (tail) take_sample(c, pairs, rows.groups, g, weights.c);
      std::fill(weights.t.begin(), weights.t.end(), 0.0);
      for (int64_t p = 0; p < int64_t(weights.c.size()); ++p) {
        if (normalize) weights.t[p / rows.moving] += weights.c[p] * a[p * rows.groups + g];
        weights.c[p] *= tail;
      }
      if (normalize) rows.kernels.along(sample, 0, rows.columns, mixed, nullptr, weights.t.data());
      weights.combine_rows(rows, sample, far[g], mixed, Rows::point_at(whole.gradient, g, pointers.out), false);
    }
  });
  return whole;
}

}  // namespace

// distances, alignment [Mi, Mj, G] or none -> value [] (NaN where a distance is not finite), coefficients [Mi, Mj, G],
// bandwidth [Mj, G], projection [Mi, G]
std::tuple<Tensor, Tensor, Tensor, Tensor> median_rule(const Tensor& distances, const OptionalTensor& alignment, double log_count) {
  TORCH_CHECK(distances.dim() == 3, "distances: expected [Mi, Mj, G], got ", distances.sizes());
  if (alignment)
    TORCH_CHECK(alignment->sizes() == distances.sizes() && alignment->scalar_type() == distances.scalar_type(), "alignment: expected ",
                distances.scalar_type(), " ", distances.sizes(), " as distances, got ", alignment->scalar_type(), " ", alignment->sizes());
  const Tensor d = distances.contiguous(), e = alignment ? alignment->contiguous() : Tensor();
  const int64_t moving = d.size(0), repelling = d.size(1), groups = d.size(2);
  Tensor c = at::empty_like(d), value = at::empty({}, d.options());
  Tensor h = at::empty({repelling, groups}, d.options()), projection = at::empty({moving, groups}, d.options());
  AT_DISPATCH_FLOATING_TYPES(d.scalar_type(), "median_rule", [&] {
    auto rule = make_rule<scalar_t>(d, e, log_count, c, h, projection);
    in_lanes(groups, false, [&](int64_t g, int64_t count) { rule.kernels(g, count); });
    *value.mutable_data_ptr<scalar_t>() = scalar_t(rule.value());
    in_lanes(groups, false, [&](int64_t g, int64_t count) { rule.coefficients(g, count); });
  });
  return {value, c, h, projection};
}

// particles [M, G, D], product [M - 1, G, D] or none -> value [], gradient [M, G, D], bandwidth [M, G], distances [M, M, G]
std::tuple<Tensor, Tensor, Tensor, Tensor> fused(const Tensor& particles, const OptionalTensor& product, bool normalize, double eps,
                                                 double log_count) {
  const bool wide = product ? product->scalar_type() == at::kDouble : particles.size(-1) <= kExactColumns;
  const Rows rows(particles, std::nullopt, product, wide);
  const auto type = computing_type(particles);
  if (rows.splits() > 1) {  // too few samples for all threads: stage by stage, each with its columns split
    const auto [d, alignment, norm] = pair_distances(particles, std::nullopt, product, normalize, eps);
    const auto [value, c, h, projection] = median_rule(d, alignment, log_count);
    return {value, combine(particles, std::nullopt, product, norm, c, normalize ? projection : at::zeros_like(projection)), h, d};
  }
  Whole whole(rows, at::empty(particles.sizes(), particles.options()));
  AT_DISPATCH_FLOATING_TYPES(rows.type, "fused", [&] { in_two_passes<scalar_t>(rows, Tensor(), normalize, eps, log_count, whole); });
  if (rows.type == type) return {whole.value, whole.gradient, whole.bandwidth, whole.distances};
  return {whole.value.to(type), whole.gradient, whole.bandwidth.to(type), whole.distances.to(type)};
}

// particles [M, G, D], factor [D, K] -> as `fused`
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_by_factor(const Tensor& particles, const Tensor& factor, double tail, bool normalize,
                                                           double eps, double log_count) {
  const Rows rows(particles, std::nullopt, std::nullopt);
  check(factor, rows.type, {rows.columns, factor.size(-1)}, "factor");
  TORCH_CHECK(rows.moving > 1, "particles: expected at least two, got ", particles.sizes());
  if (rows.splits() > 1) {  // stage by stage, as above
    const Tensor z = contrasts(particles, std::nullopt, normalize, eps);
    const Tensor x = coordinates(particles, std::nullopt, at::matmul(z, factor));
    auto [d, _, ones] = pair_distances(x, std::nullopt, std::nullopt, false, eps);
    if (tail) d.add_(std::get<0>(pair_distances(particles, std::nullopt, std::nullopt, normalize, eps)), tail);
    const auto [value, c, h, none] = median_rule(d, std::nullopt, log_count);
    const Tensor mixed = at::matmul(combine(x, std::nullopt, std::nullopt, ones, c, none), factor.t());
    return {value, project(particles, mixed, std::nullopt, tail ? OptionalTensor(c.mul(tail)) : std::nullopt, normalize, eps), h, d};
  }
  std::optional<Whole> whole;
  AT_DISPATCH_FLOATING_TYPES(rows.type, "fused_by_factor", [&] { whole = by_factor<scalar_t>(rows, factor, tail, normalize, eps, log_count); });
  return {whole->value, whole->gradient, whole->bandwidth, whole->distances};
}

}  // namespace forde_fast
