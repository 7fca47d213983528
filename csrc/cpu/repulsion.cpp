// The operations on CPU tensors: checks, memory and threads around the kernels of repulsion.h.
// Their schemas are defined in forde_fast/operators.py.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../repulsion.h"
#include "capability.h"

namespace forde_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const Kernels& kernels_for(at::ScalarType type) {
  const Input input = type == at::kFloat      ? Input::kFloat32
                      : type == at::kBFloat16 ? Input::kBFloat16
                                              : Input::kFloat64;
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) return avx512_kernels(input);
  if (capability() == Capability::kAvx2) return avx2_kernels(input);
#endif
  return portable_kernels(input);
}

at::ScalarType computing_type(const Tensor& particles) { return particles.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The rows of a call: particles [Mi, G, D], others [Mj, G, D] or none, product [N - 1, G, D] or none.
struct Rows {
  Tensor particles, others, product;
  int64_t moving, rows, groups, columns;
  const Kernels& kernels;

  Rows(const Tensor& p, const OptionalTensor& o, const OptionalTensor& w)
      : particles(dense(p)), others(o ? dense(*o) : Tensor()), product(w ? w->contiguous() : Tensor()),
        moving(p.size(0)), rows(moving + (o ? o->size(0) : 0)), groups(p.size(1)), columns(p.size(2)),
        kernels(forde_fast::kernels_for(p.scalar_type())) {
    const auto type = p.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kDouble,
                "particles: expected float32, float64 or bfloat16, got ", type);
    if (o) {
      TORCH_CHECK(o->scalar_type() == type, "others: expected ", type, " as particles, got ", o->scalar_type());
      TORCH_CHECK(o->dim() == 3 && o->size(1) == groups && o->size(2) == columns,
                  "others: expected [N, G, D] with the particles' G and D, got ", o->sizes());
    }
    if (w) {
      TORCH_CHECK(w->scalar_type() == computing_type(p), "product: expected ", computing_type(p), ", got ", w->scalar_type());
      TORCH_CHECK(w->sizes() == at::IntArrayRef({rows - 1, groups, columns}),
                  "product: expected [N - 1, G, D], got ", w->sizes());
    }
  }

  static Tensor dense(const Tensor& t) {
    TORCH_CHECK(t.dim() == 3, "particles: expected [M, G, D], got ", t.sizes());
    return t.size(2) == 1 || t.stride(2) == 1 ? t : t.contiguous();
  }

  int64_t repelling() const { return others.defined() ? rows - moving : rows; }

  // Pointers to the rows of sample g; `at` also takes the norms.
  struct Pointers {
    std::vector<const void*> values, product, ahead;
  };

  std::vector<const void*> values(int64_t g) const {
    std::vector<const void*> to(rows);
    for (int64_t n = 0; n < rows; ++n) {
      const Tensor& source = n < moving ? particles : others;
      const int64_t row = n < moving ? n : n - moving;
      to[n] = static_cast<const char*>(source.const_data_ptr()) + (row * source.stride(0) + g * source.stride(1)) * source.element_size();
    }
    return to;
  }

  // g; `next`, where it is not negative, is the sample whose norms are found after it
  Sample sample(int64_t g, const double* norm, Pointers& to, int64_t next = -1) const {
    to.values = values(g);
    if (next >= 0) to.ahead = values(next);
    if (product.defined()) {
      to.product.resize(rows - 1);
      for (int64_t n = 0; n + 1 < rows; ++n)
        to.product[n] = static_cast<const char*>(product.const_data_ptr()) + (n * groups + g) * columns * product.element_size();
    }
    return {rows, moving, to.values.data(), product.defined() ? to.product.data() : nullptr, norm, next >= 0 ? to.ahead.data() : nullptr};
  }

  // Few samples are split into ranges of columns, so that all threads have work; a range is whole tiles.
  int64_t splits() const {
    const int64_t wanted = (4 * at::get_num_threads() + groups - 1) / groups;
    return groups >= 4 * at::get_num_threads() ? 1 : std::max<int64_t>(1, std::min(wanted, columns / 4096));
  }

  static constexpr int64_t kColumns = 512;  // a multiple of every kernel's tile

  template <class F>
  void each(int64_t splits, const F& f) const {  // f(g, split, begin, end, the sample after g or -1)
    const int64_t step = ((columns + splits - 1) / splits + kColumns - 1) / kColumns * kColumns;
    at::parallel_for(0, groups * splits, 1, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t g = item / splits, split = item % splits;
        f(g, split, std::min(columns, split * step), std::min(columns, (split + 1) * step), splits == 1 && g + 1 < to ? g + 1 : -1);
      }
    });
  }
};

// Rounded to the type that `norm` is handed on in: `combine` must divide by the very same numbers, or what it projects
// out is not what is there.
void to_norm(std::vector<double>& squares, double eps, at::ScalarType type) {
  for (double& x : squares) x = type == at::kDouble ? std::sqrt(x + eps) : double(float(std::sqrt(x + eps)));
}

// Norms of the rows of a sample: where columns are split, of all samples beforehand; where they are not, each item
// finds its own just before it works on the same rows.
struct Norms {
  const Rows& rows;
  const bool normalize;
  const double eps;
  std::vector<std::vector<double>> known;  // [G][N]

  Norms(const Rows& rows, int64_t splits, bool normalize, double eps) : rows(rows), normalize(normalize), eps(eps) {
    if (splits == 1 || !normalize) return;
    std::vector<double> partial(rows.groups * splits * rows.rows);
    rows.each(splits, [&](int64_t g, int64_t split, int64_t begin, int64_t end, int64_t) {
      Rows::Pointers pointers;
      rows.kernels.squares(rows.sample(g, nullptr, pointers), begin, end, &partial[(g * splits + split) * rows.rows]);
    });
    known.assign(rows.groups, std::vector<double>(rows.rows));
    for (int64_t g = 0; g < rows.groups; ++g) {
      for (int64_t split = 0; split < splits; ++split)
        for (int64_t n = 0; n < rows.rows; ++n) known[g][n] += partial[(g * splits + split) * rows.rows + n];
      to_norm(known[g], eps, computing_type(rows.particles));
    }
  }

  std::vector<double> of(int64_t g) const {
    if (!known.empty()) return known[g];
    if (!normalize) return std::vector<double>(rows.rows, 1.0);
    std::vector<double> own(rows.rows);
    Rows::Pointers pointers;
    rows.kernels.squares(rows.sample(g, nullptr, pointers), 0, rows.columns, own.data());
    to_norm(own, eps, computing_type(rows.particles));
    return own;
  }
};

Tensor contrasts(const Tensor& particles, const OptionalTensor& others, bool normalize, double eps) {
  const Rows rows(particles, others, std::nullopt);
  Tensor z = at::empty({rows.rows - 1, rows.groups, rows.columns}, particles.options().dtype(computing_type(particles)));
  const int64_t splits = rows.splits(), bytes = rows.columns * z.element_size();
  const Norms norms(rows, splits, normalize, eps);
  rows.each(splits, [&](int64_t g, int64_t, int64_t begin, int64_t end, int64_t next) {
    Rows::Pointers pointers;
    const auto norm = norms.of(g);
    std::vector<void*> out(rows.rows - 1);
    for (int64_t n = 0; n + 1 < rows.rows; ++n)
      out[n] = static_cast<char*>(z.mutable_data_ptr()) + (n * rows.groups + g) * bytes;
    rows.kernels.contrasts(rows.sample(g, norm.data(), pointers, normalize ? next : -1), begin, end, out.data());
  });
  return z;
}

// Sums over the columns of sample g, all NaN if a norm overflowed -> distances and alignment [Mi, Mj, G]. With C symmetric,
// (q_i - q_j) s_i = (d_ij + s_i^T C s_i - s_j^T C s_j) / 2: one sum for each row rather than for each pair.
template <class T>
void store_pairs(const Rows& rows, int64_t g, const double* d, const double* growth, bool finite, T* distances, T* alignment) {
  const int64_t first = rows.others.defined() ? rows.moving : 0, repelling = rows.repelling();
  for (int64_t i = 0; i < rows.moving; ++i)
    for (int64_t j = 0; j < repelling; ++j) {
      const double distance = d[first == 0 && j < i ? j * repelling + i : i * repelling + j];
      const int64_t to = (i * repelling + j) * rows.groups + g;
      distances[to] = T(!finite ? NAN : distance < 0 ? 0 : distance);  // NaN stays NaN
      alignment[to] = T((distance + growth[i] - growth[first + j]) / 2);
    }
}

std::tuple<Tensor, Tensor, Tensor> pair_distances(const Tensor& particles, const OptionalTensor& others,
                                                  const OptionalTensor& product, bool normalize, double eps) {
  const Rows rows(particles, others, product);
  const auto options = particles.options().dtype(computing_type(particles));
  Tensor distances = at::empty({rows.moving, rows.repelling(), rows.groups}, options), alignment = at::empty_like(distances);
  Tensor norm = at::empty({rows.rows, rows.groups}, options);
  const int64_t splits = rows.splits(), pairs = rows.moving * rows.repelling(), sums = pairs + rows.rows;
  const Norms norms(rows, splits, normalize, eps);
  std::vector<double> partial(splits == 1 ? 0 : rows.groups * splits * sums);
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "pair_distances", [&] {
    auto* norm_data = norm.mutable_data_ptr<scalar_t>();
    const auto store = [&](int64_t g, const double* sum) {
      bool finite = true;
      for (int64_t n = 0; n < rows.rows; ++n) finite &= bool(std::isfinite(norm_data[n * rows.groups + g]));
      store_pairs(rows, g, sum, sum + pairs, finite, distances.mutable_data_ptr<scalar_t>(), alignment.mutable_data_ptr<scalar_t>());
    };
    rows.each(splits, [&](int64_t g, int64_t split, int64_t begin, int64_t end, int64_t next) {
      Rows::Pointers pointers;
      const auto own = norms.of(g);
      if (split == 0)
        for (int64_t n = 0; n < rows.rows; ++n) norm_data[n * rows.groups + g] = scalar_t(own[n]);
      std::vector<double> whole(splits == 1 ? sums : 0);
      double* sum = splits == 1 ? whole.data() : &partial[(g * splits + split) * sums];
      rows.kernels.pairs(rows.sample(g, own.data(), pointers, normalize ? next : -1), begin, end, sum, sum + pairs);
      if (splits == 1) store(g, sum);
    });
    for (int64_t g = 0; splits > 1 && g < rows.groups; ++g) {
      double* sum = &partial[g * splits * sums];
      for (int64_t at = sums; at < splits * sums; ++at) sum[at % sums] += sum[at];
      store(g, sum);
    }
  });
  return {distances, alignment, norm};
}

constexpr int64_t kCached = 1 << 22;  // bytes of a result that may still be in a cache when it is read

// x [R, G] -> [R] of sample g, in double
std::vector<double> of_sample(const Tensor& x, int64_t g) {
  std::vector<double> out(x.size(0));
  for (int64_t n = 0; n < x.size(0); ++n)
    out[n] = x.scalar_type() == at::kDouble ? x.const_data_ptr<double>()[n * x.size(1) + g]
                                            : double(x.const_data_ptr<float>()[n * x.size(1) + g]);
  return out;
}

void check(const Tensor& x, at::ScalarType type, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == type && x.sizes() == shape, name, ": expected ", type, " ", shape, ", got ", x.scalar_type(), " ", x.sizes());
}

Tensor combine(const Tensor& particles, const OptionalTensor& others, const OptionalTensor& product,
               const Tensor& norm, const Tensor& coefficients, const Tensor& projection) {
  const Rows rows(particles, others, product);
  const auto type = computing_type(particles);
  check(norm, type, {rows.rows, rows.groups}, "norm");
  check(coefficients, type, {rows.moving, rows.repelling(), rows.groups}, "coefficients");
  check(projection, type, {rows.moving, rows.groups}, "projection");
  const Tensor norms = norm.contiguous(), t = projection.contiguous();
  const Tensor c = coefficients.contiguous().view({-1, rows.groups});
  Tensor gradient = at::empty({rows.moving, rows.groups, rows.columns}, particles.options());
  const int64_t bytes = rows.columns * gradient.element_size();
  const bool past_caches = int64_t(gradient.nbytes()) > kCached;
  rows.each(rows.splits(), [&](int64_t g, int64_t, int64_t begin, int64_t end, int64_t) {
    Rows::Pointers pointers;
    const auto r = of_sample(norms, g), c_g = of_sample(c, g), t_g = of_sample(t, g);
    std::vector<void*> out(rows.moving);
    for (int64_t i = 0; i < rows.moving; ++i)
      out[i] = static_cast<char*>(gradient.mutable_data_ptr()) + (i * rows.groups + g) * bytes;
    rows.kernels.combine(rows.sample(g, r.data(), pointers), begin, end, nullptr, c_g.data(), t_g.data(), out.data(), past_caches);
  });
  return gradient;
}

// product [N - 1, G, K] -> [N, G, K]; see operators.py
Tensor coordinates(const Tensor& particles, const OptionalTensor& others, const Tensor& product) {
  const Rows rows(particles, others, std::nullopt);
  check(product, computing_type(particles), {rows.rows - 1, rows.groups, product.size(-1)}, "product");
  const Tensor dense = product.contiguous();
  const int64_t size = product.size(2), bytes = rows.columns * particles.element_size();
  Tensor x = at::empty({rows.rows, rows.groups, size}, product.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "coordinates", [&] {
    const scalar_t scale = scalar_t(1 / (std::sqrt(double(rows.rows)) - 1));
    at::parallel_for(0, rows.groups, 1, [&](int64_t from, int64_t to) {
      for (int64_t g = from; g < to; ++g) {
        const auto x_row = [&](int64_t n) { return x.mutable_data_ptr<scalar_t>() + (n * rows.groups + g) * size; };
        Rows::Pointers pointers;
        rows.sample(g, nullptr, pointers);
        std::fill_n(x_row(0), size, scalar_t(0));
        for (int64_t n = 1; n < rows.rows; ++n) {
          const scalar_t* row = dense.const_data_ptr<scalar_t>() + ((n - 1) * rows.groups + g) * size;
          std::copy_n(row, size, x_row(n));
          for (int64_t k = 0; k < size; ++k) x_row(0)[k] += row[k];
        }
        for (int64_t k = 0; k < size; ++k) x_row(0)[k] *= scale;
        for (int64_t n = 1; n < rows.rows; ++n)
          for (int64_t m = 0; m < n; ++m)
            if (std::memcmp(pointers.values[n], pointers.values[m], bytes) == 0) {
              std::copy_n(x_row(m), size, x_row(n));
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
  const auto type = computing_type(particles);
  check(mixed, type, particles.sizes(), "mixed");
  if (coefficients) check(*coefficients, type, {rows.moving, rows.repelling(), rows.groups}, "coefficients");
  const Tensor dense = mixed.contiguous();
  const Tensor c = coefficients ? coefficients->contiguous().view({-1, rows.groups}) : at::empty({0, rows.groups}, mixed.options());
  Tensor gradient = at::empty({rows.moving, rows.groups, rows.columns}, particles.options());
  const bool past_caches = int64_t(gradient.nbytes()) > kCached;
  const int64_t splits = rows.splits();
  const Norms norms(rows, splits, normalize, eps);
  const auto pointers_to = [&](const Tensor& x, int64_t g) {
    std::vector<void*> to(rows.moving);
    for (int64_t i = 0; i < rows.moving; ++i)
      to[i] = static_cast<char*>(x.data_ptr()) + (i * rows.groups + g) * rows.columns * x.element_size();
    return to;
  };
  // The component along s_i is a sum over all columns: known only when all of them were seen once.
  std::vector<double> partial(rows.groups * splits * rows.moving);
  const auto work = [&](int64_t g, int64_t begin, int64_t end, double* measure, const double* t) {
    Rows::Pointers pointers;
    const auto norm = norms.of(g), c_g = of_sample(c, g);
    const auto in = pointers_to(dense, g), out = pointers_to(gradient, g);
    const double* weights = coefficients ? c_g.data() : nullptr;
    const Sample sample = rows.sample(g, norm.data(), pointers);
    if (measure && normalize) rows.kernels.along(sample, begin, end, in.data(), weights, measure);
    if (t) rows.kernels.combine(sample, begin, end, in.data(), weights, t, out.data(), past_caches);
  };
  rows.each(splits, [&](int64_t g, int64_t split, int64_t begin, int64_t end, int64_t) {
    double* t = &partial[(g * splits + split) * rows.moving];
    work(g, begin, end, t, splits == 1 ? t : nullptr);
  });
  if (splits == 1) return gradient;
  for (int64_t g = 0; g < rows.groups; ++g)
    for (int64_t at = rows.moving; at < splits * rows.moving; ++at)
      partial[g * splits * rows.moving + at % rows.moving] += partial[g * splits * rows.moving + at];
  rows.each(splits, [&](int64_t g, int64_t, int64_t begin, int64_t end, int64_t) {
    work(g, begin, end, nullptr, &partial[g * splits * rows.moving]);
  });
  return gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(forde_fast, CPU, m) {
  m.impl("contrasts", contrasts);
  m.impl("pair_distances", pair_distances);
  m.impl("combine", combine);
  m.impl("coordinates", coordinates);
  m.impl("project", project);
}

}  // namespace forde_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ implementations of forde_fast's operations; importing it registers them";
  m.def("cpu_capability", [] { return forde_fast::name_of(forde_fast::capability()); });
  m.def("use_cpu_capability", [](const std::string& name) {
    using forde_fast::Capability;
    for (Capability which : {Capability::kPortable, Capability::kAvx2, Capability::kAvx512})
      if (name == forde_fast::name_of(which) && forde_fast::runs_here(which)) {
        forde_fast::capability() = which;
        return;
      }
    throw std::invalid_argument("name: expected portable, avx2 or avx512, as this machine can run, got " + name);
  }, "For tests: the instruction set that the kernels use from now on, in place of the widest.");
}
