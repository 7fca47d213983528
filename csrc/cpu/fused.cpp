// The operations with the rule for the default bandwidth: the rule alone, and the whole operation between the particles.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <memory>

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
MedianRule<T> make_rule(int64_t moving, int64_t repelling, int64_t groups, double log_count, Tensor& h) {
  return {kernels_for(h.scalar_type(), false), moving, repelling, groups, log_count, h.mutable_data_ptr<T>()};
}

// Memory that nothing is written to beforehand.
template <class T>
std::unique_ptr<T[]> room(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

struct Whole {
  Tensor gradient, value, bandwidth, distances;
  std::unique_ptr<double[]> coefficients;  // [G, M, M]: a sample's numbers next to one another

  // The largest first: it then fits where the last call's was.
  explicit Whole(const Rows& rows, const Tensor& gradient)
      : gradient(gradient), value(at::empty({}, rows.options())), bandwidth(at::empty({rows.moving, rows.groups}, rows.options())),
        distances(at::empty({rows.moving, rows.moving, rows.groups}, rows.options())),
        coefficients(room<double>(rows.groups * rows.moving * rows.moving)) {}
};

// The rule for the samples g .. g + count: d [G, pairs] -> slopes [G, pairs], distances [pairs, G].
template <class T>
void apply(MedianRule<T>& rule, int64_t g, int64_t count, int64_t pairs, int64_t groups, const T* d, double* slopes, T* distances) {
  Block<T> block(pairs);
  Block<double> found(pairs);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t p = 0; p < pairs; ++p) block[p][lane] = d[(g + lane) * pairs + p];
  rule.kernels(g, count, block, found);
  for (int64_t p = 0; p < pairs; ++p) std::copy_n(block[p], count, distances + p * groups + g);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t p = 0; p < pairs; ++p) slopes[(g + lane) * pairs + p] = found[p][lane];
}

// Distances (to which `more` [G, M, M] is added), kernels, coefficients and gradient in two passes over the samples; the
// rows that the first one read last are the ones that the second one, going backwards, reads first.
template <class T>
void in_two_passes(const Rows& rows, const T* more, bool normalize, double eps, double log_count, Whole& to) {
  const int64_t members = rows.moving, pairs = members * members;
  const auto d = room<T>(rows.groups * pairs), alignment = room<T>(rows.groups * pairs);
  const auto norm = room<double>(rows.groups * members);
  const auto far = room<bool>(rows.groups);
  auto rule = make_rule<T>(members, members, rows.groups, log_count, to.bandwidth);
  const Norms norms(rows, 1, normalize, eps);
  in_lanes(rows.groups, false, [&](int64_t first, int64_t count) {
    Measured found;
    for (int64_t g = first; g < first + count; ++g) {
      found.measure(rows, norms, g);
      store_pairs(rows, found.sums.data(), found.lengths, &d[g * pairs], &alignment[g * pairs], 1);
      std::copy(found.lengths.norm.begin(), found.lengths.norm.end(), &norm[g * members]);
      far[g] = found.far;
      for (int64_t p = g * pairs; more && p < (g + 1) * pairs; ++p) d[p] += more[p];
    }
    apply(rule, first, count, pairs, rows.groups, d.get(), to.coefficients.get(), to.distances.mutable_data_ptr<T>());
  });
  *to.value.mutable_data_ptr<T>() = T(rule.value());
  in_lanes(rows.groups, true, [&](int64_t first, int64_t count) {
    Rows::Pointers pointers;
    Weights weights(members);
    for (int64_t g = first + count - 1; g >= first; --g) {
      double* c = &to.coefficients[g * pairs];
      rule.scale_rows(c);
      weights.of_pairs(c, normalize ? &alignment[g * pairs] : nullptr);
      const Sample sample = rows.sample(g, &norm[g * members], pointers);
      weights.combine_rows(rows, sample, 0, rows.columns, far[g], nullptr, Rows::point_at(to.gradient, g, pointers.out));
    }
  });
}

// The same where samples are too few for all threads: their columns are split.
template <class T>
void in_split_passes(const Rows& rows, int64_t splits, bool normalize, double eps, double log_count, Whole& to) {
  const int64_t members = rows.moving, pairs = members * members, groups = rows.groups;
  const auto d = room<T>(groups * pairs), alignment = room<T>(groups * pairs);
  auto rule = make_rule<T>(members, members, groups, log_count, to.bandwidth);
  const Norms norms(rows, 1, normalize, eps);
  std::vector<Measured> found(groups);
  const auto measure = [&](auto kernel) {  // the sums of samples that are not known to be far
    const auto sums = rows.sums(splits, pairs, [&](int64_t g, int64_t begin, int64_t end, double* to) {
      Rows::Pointers pointers;
      if (!found[g].far) kernel(rows.sample(g, found[g].lengths.norm.data(), pointers), begin, end, to);
    });
    for (int64_t g = 0; g < groups; ++g)
      if (!found[g].far) found[g].sums.assign(&sums[g * pairs], &sums[g * pairs] + pairs);
  };
  measure(rows.kernels.gram);
  for (auto& own : found) own.take_products(rows, norms);
  if (!std::all_of(found.begin(), found.end(), [](const Measured& own) { return own.far; }))
    measure([&](const Sample& sample, int64_t begin, int64_t end, double* sums) { rows.kernels.pairs(sample, begin, end, sums, nullptr); });
  for (int64_t g = 0; g < groups; ++g) store_pairs(rows, found[g].sums.data(), found[g].lengths, &d[g * pairs], &alignment[g * pairs], 1);
  for (int64_t g = 0; g < groups; g += kLanes)
    apply(rule, g, std::min(kLanes, groups - g), pairs, groups, d.get(), to.coefficients.get(), to.distances.mutable_data_ptr<T>());
  *to.value.mutable_data_ptr<T>() = T(rule.value());
  for (int64_t g = 0; g < groups; ++g) rule.scale_rows(&to.coefficients[g * pairs]);
  rows.each(splits, [&](int64_t g, int64_t, int64_t begin, int64_t end) {
    Rows::Pointers pointers;
    Weights weights(members);
    weights.of_pairs(&to.coefficients[g * pairs], normalize ? &alignment[g * pairs] : nullptr);
    const Sample sample = rows.sample(g, found[g].lengths.norm.data(), pointers);
    weights.combine_rows(rows, sample, begin, end, found[g].far, nullptr, Rows::point_at(to.gradient, g, pointers.out));
  });
}

// C = F F^T + tail I, F [D, K]: what `in_two_passes` does, on the K columns x = S F, between two thin products. The
// contrasts, the gradient in those columns times F^T and the gradient itself have the same memory one after the other.
template <class T>
Whole by_factor(const Rows& rows, const Tensor& factor, double tail, bool normalize, double eps, double log_count) {
  Tensor work = at::empty(rows.particles.sizes(), rows.options());
  const int64_t members = rows.moving, pairs = members * members;
  const auto raw = room<T>(tail ? rows.groups * pairs : 0), alignment = room<T>(tail ? rows.groups * pairs : 0);
  const auto norm = room<double>(rows.groups * members);
  const auto far = room<bool>(rows.groups);
  Tensor z = work.narrow(0, 0, members - 1);
  const Norms norms(rows, 1, normalize, eps);
  std::atomic<bool> finite = true;
  in_lanes(rows.groups, false, [&](int64_t first, int64_t count) {
    Measured found;
    auto& pointers = found.pointers;
    auto& lengths = found.lengths;
    for (int64_t g = first; g < first + count; ++g) {
      if (tail) {
        found.measure(rows, norms, g);
        store_pairs(rows, found.sums.data(), lengths, &raw[g * pairs], &alignment[g * pairs], 1, tail);
      } else {
        norms.find(g, pointers, lengths);
      }
      far[g] = found.far;
      if (!all_finite(lengths.norm)) finite = false;
      std::copy(lengths.norm.begin(), lengths.norm.end(), &norm[g * members]);
      rows.kernels.contrasts(rows.sample(g, lengths.norm.data(), pointers), 0, rows.columns, Rows::point_at(z, g, pointers.out));
    }
  });
  const Tensor x = coordinates(rows.particles, std::nullopt, at::mm(z.view({-1, rows.columns}), factor).view({members - 1, rows.groups, -1}), normalize, eps);
  const Rows thin(x, std::nullopt, std::nullopt);
  Whole whole(thin, at::empty_like(x));
  in_two_passes<T>(thin, tail ? raw.get() : nullptr, false, eps, log_count, whole);
  Tensor products = work.view({-1, rows.columns});
  at::mm_out(products, whole.gradient.view({-1, x.size(2)}), factor.t());
  if (!finite) whole.value.fill_(std::numeric_limits<double>::quiet_NaN());

  const bool narrow = rows.particles.scalar_type() != rows.type;
  whole.gradient = narrow ? at::empty(rows.particles.sizes(), rows.particles.options()) : work;
  in_lanes(rows.groups, true, [&](int64_t first, int64_t count) {
    Rows::Pointers pointers;
    Weights weights(members);
    for (int64_t g = first + count - 1; g >= first; --g) {
      const Sample sample = rows.sample(g, &norm[g * members], pointers);
      const auto* mixed = Rows::point_at(work, g, pointers.mixed);
      if (tail) weights.of_pairs(&whole.coefficients[g * pairs], normalize ? &alignment[g * pairs] : nullptr, tail);
      else std::fill(weights.t.begin(), weights.t.end(), 0.0);
      if (normalize) rows.kernels.along(sample, 0, rows.columns, mixed, nullptr, weights.t.data());
      weights.combine_rows(rows, sample, 0, rows.columns, far[g], mixed, Rows::point_at(whole.gradient, g, pointers.out));
    }
  });
  return whole;
}

}  // namespace

// distances, alignment [Mi, Mj, G] or none -> value [] (NaN where a distance is not finite), coefficients [Mi, Mj, G],
// bandwidth [Mj, G], projection [Mi, G]
std::tuple<Tensor, Tensor, Tensor, Tensor> median_rule(const Tensor& distances, const OptionalTensor& alignment, double log_count) {
  TORCH_CHECK(distances.dim() == 3 && distances.numel() > 0, "distances: expected [Mi, Mj, G], all > 0, got ", distances.sizes());
  if (alignment)
    TORCH_CHECK(alignment->sizes() == distances.sizes() && alignment->scalar_type() == distances.scalar_type(), "alignment: expected ",
                distances.scalar_type(), " ", distances.sizes(), " as distances, got ", alignment->scalar_type(), " ", alignment->sizes());
  const Tensor d = distances.contiguous(), e = alignment ? alignment->contiguous() : Tensor();
  const int64_t moving = d.size(0), repelling = d.size(1), groups = d.size(2);
  const int64_t pairs = moving * repelling;
  Tensor c = at::empty_like(d), value = at::empty({}, d.options());
  Tensor h = at::empty({repelling, groups}, d.options()), projection = at::empty({moving, groups}, d.options());
  AT_DISPATCH_FLOATING_TYPES(d.scalar_type(), "median_rule", [&] {
    auto rule = make_rule<scalar_t>(moving, repelling, groups, log_count, h);
    const auto slopes = room<double>(pairs * groups);
    in_lanes(groups, false, [&](int64_t g, int64_t count) {
      Block<scalar_t> block(pairs);
      Block<double> found(pairs);
      for (int64_t p = 0; p < pairs; ++p) std::copy_n(d.const_data_ptr<scalar_t>() + p * groups + g, count, block[p]);
      rule.kernels(g, count, block, found);
      for (int64_t p = 0; p < pairs; ++p) std::copy_n(found[p], count, &slopes[p * groups + g]);
    });
    *value.mutable_data_ptr<scalar_t>() = scalar_t(rule.value());
    const auto* aligned = alignment ? e.const_data_ptr<scalar_t>() : nullptr;
    auto *all = c.mutable_data_ptr<scalar_t>(), *along = projection.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, moving, 1, [&](int64_t from, int64_t to) {
      std::vector<double> total(groups);
      for (int64_t i = from; i < to; ++i) {
        const double scale = rule.scale(i);
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t at = i * repelling * groups; at < (i + 1) * repelling * groups; at += groups)
          for (int64_t g = 0; g < groups; ++g) {
            all[at + g] = scalar_t(scale * slopes[at + g]);
            if (aligned) total[g] += double(all[at + g]) * double(aligned[at + g]);
          }
        std::copy(total.begin(), total.end(), along + i * groups);
      }
    });
  });
  return {value, c, h, projection};
}

// particles [M, G, D], product [M - 1, G, D] or none -> value [], gradient [M, G, D], bandwidth [M, G], distances [M, M, G]
std::tuple<Tensor, Tensor, Tensor, Tensor> fused(const Tensor& particles, const OptionalTensor& product, bool normalize, double eps,
                                                 double log_count) {
  const bool wide = product ? product->scalar_type() == at::kDouble : particles.size(-1) <= kExactColumns;
  const Rows rows(particles, std::nullopt, product, wide);
  const auto type = computing_type(particles);
  const int64_t splits = rows.splits();
  if (splits > 1 && product) {  // too few samples for all threads: stage by stage, each with its columns split
    const auto [d, alignment, norm] = pair_distances(particles, std::nullopt, product, normalize, eps);
    const auto [value, c, h, projection] = median_rule(d, alignment, log_count);
    return {value, combine(particles, std::nullopt, product, norm, c, normalize ? projection : at::zeros_like(projection)), h, d};
  }
  Whole whole(rows, at::empty(particles.sizes(), particles.options()));
  AT_DISPATCH_FLOATING_TYPES(rows.type, "fused", [&] {
    splits > 1 ? in_split_passes<scalar_t>(rows, splits, normalize, eps, log_count, whole)
               : in_two_passes<scalar_t>(rows, nullptr, normalize, eps, log_count, whole);
  });
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
    const Tensor x = coordinates(particles, std::nullopt, at::matmul(z, factor), normalize, eps);
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
