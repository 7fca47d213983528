// Checks, memory and threads around the kernels of repulsion.h, for all operations on CPU tensors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../repulsion.h"
#include "capability.h"

namespace forde_fast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Up to so many columns `fused` computes in double, as forde_fast/repulsion.py has the other operations do.
constexpr int64_t kExactColumns = 256;

inline const Kernels& kernels_for(at::ScalarType type, bool wide) {
  const Input input = type == at::kFloat      ? Input::kFloat32
                      : type == at::kBFloat16 ? Input::kBFloat16
                                              : Input::kFloat64;
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) return avx512_kernels(input, wide);
  if (capability() == Capability::kAvx2) return avx2_kernels(input, wide);
#endif
  return portable_kernels(input, wide);
}

inline at::ScalarType computing_type(const Tensor& particles) { return particles.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The rows of a call: particles [Mi, G, D], others [Mj, G, D] or none, product [N - 1, G, D] or none.
struct Rows {
  Tensor particles, others, product;
  int64_t moving, rows, groups, columns;
  at::ScalarType type;  // that is computed in
  const Kernels& kernels;

  Rows(const Tensor& p, const OptionalTensor& o, const OptionalTensor& w, bool wide = false)
      : particles(dense(p)), others(o ? dense(*o) : Tensor()), product(w ? w->contiguous() : Tensor()),
        moving(p.size(0)), rows(moving + (o ? o->size(0) : 0)), groups(p.size(1)), columns(p.size(2)),
        type(wide ? at::kDouble : computing_type(p)), kernels(forde_fast::kernels_for(p.scalar_type(), wide)) {
    const auto input = p.scalar_type();
    TORCH_CHECK(input == at::kFloat || input == at::kBFloat16 || input == at::kDouble,
                "particles: expected float32, float64 or bfloat16, got ", input);
    if (o) {
      TORCH_CHECK(o->scalar_type() == input, "others: expected ", input, " as particles, got ", o->scalar_type());
      TORCH_CHECK(o->dim() == 3 && o->size(1) == groups && o->size(2) == columns,
                  "others: expected [N, G, D] with the particles' G and D, got ", o->sizes());
    }
    if (w) {
      TORCH_CHECK(w->scalar_type() == type, "product: expected ", type, ", got ", w->scalar_type());
      TORCH_CHECK(w->sizes() == at::IntArrayRef({rows - 1, groups, columns}),
                  "product: expected [N - 1, G, D], got ", w->sizes());
    }
  }

  static Tensor dense(const Tensor& t) {
    TORCH_CHECK(t.dim() == 3, "particles: expected [M, G, D], got ", t.sizes());
    return t.size(2) == 1 || t.stride(2) == 1 ? t : t.contiguous();
  }

  int64_t repelling() const { return others.defined() ? rows - moving : rows; }

  at::TensorOptions options() const { return particles.options().dtype(type); }  // of results in the computing type

  // The rows of a sample that a `Sample` points to.
  struct Pointers {
    std::vector<const void*> values, product;
  };

  Sample sample(int64_t g, const double* norm, Pointers& to) const {
    to.values.resize(rows);
    for (int64_t n = 0; n < rows; ++n) {
      const Tensor& source = n < moving ? particles : others;
      const int64_t row = n < moving ? n : n - moving;
      to.values[n] = static_cast<const char*>(source.const_data_ptr()) + (row * source.stride(0) + g * source.stride(1)) * source.element_size();
    }
    if (product.defined()) to.product = rows_of(product, g);
    return {rows, moving, to.values.data(), product.defined() ? to.product.data() : nullptr, norm};
  }

  // Pointers to the rows of sample g of a contiguous tensor [., G, D].
  static std::vector<const void*> rows_of(const Tensor& x, int64_t g) {
    std::vector<const void*> to(x.size(0));
    for (int64_t n = 0; n < x.size(0); ++n)
      to[n] = static_cast<const char*>(x.const_data_ptr()) + (n * x.size(1) + g) * x.size(2) * x.element_size();
    return to;
  }

  static std::vector<void*> rows_of(Tensor& x, int64_t g) {
    const auto to = rows_of(static_cast<const Tensor&>(x), g);
    std::vector<void*> out(to.size());
    std::transform(to.begin(), to.end(), out.begin(), [](const void* row) { return const_cast<void*>(row); });
    return out;
  }

  // Few samples are split into ranges of columns, so that all threads have work; a range is whole tiles.
  int64_t splits() const {
    const int64_t wanted = (4 * at::get_num_threads() + groups - 1) / groups;
    return groups >= 4 * at::get_num_threads() ? 1 : std::max<int64_t>(1, std::min(wanted, columns / 4096));
  }

  static constexpr int64_t kColumns = 512;  // a multiple of every kernel's tile

  template <class F>
  void each(int64_t splits, const F& f) const {  // f(g, split, begin, end)
    const int64_t step = ((columns + splits - 1) / splits + kColumns - 1) / kColumns * kColumns;
    at::parallel_for(0, groups * splits, 1, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t g = item / splits, split = item % splits;
        f(g, split, std::min(columns, split * step), std::min(columns, (split + 1) * step));
      }
    });
  }
};

// sqrt(|p|^2 + eps), and |s|^2 of the rows divided by it; or 1, and 0 for nothing that is needed. Norms are rounded to the
// type in which they are handed on: `combine` must divide by the very same numbers, or what it projects out is not what
// is there.
struct Lengths {
  std::vector<double> norm, square;

  explicit Lengths(int64_t rows) : norm(rows, 1.0), square(rows) {}
  Lengths(std::vector<double> squares, double eps, at::ScalarType type) : norm(squares.size()), square(std::move(squares)) {
    for (size_t n = 0; n < norm.size(); ++n) {
      const double exact = std::sqrt(square[n] + eps);
      norm[n] = type == at::kDouble ? exact : double(float(exact));
      square[n] /= norm[n] * norm[n];
    }
  }
};

// Lengths of the rows of a sample: where columns are split, of all samples beforehand; where they are not, each item
// finds its own just before it works on the same rows.
struct Norms {
  const Rows& rows;
  const bool normalize;
  const double eps;
  std::vector<Lengths> known;  // [G]

  Norms(const Rows& rows, int64_t splits, bool normalize, double eps) : rows(rows), normalize(normalize), eps(eps) {
    if (splits == 1 || !normalize) return;
    std::vector<double> partial(rows.groups * splits * rows.rows);
    rows.each(splits, [&](int64_t g, int64_t split, int64_t begin, int64_t end) {
      Rows::Pointers pointers;
      rows.kernels.squares(rows.sample(g, nullptr, pointers), begin, end, &partial[(g * splits + split) * rows.rows]);
    });
    for (int64_t g = 0; g < rows.groups; ++g) {
      std::vector<double> squares(rows.rows);
      for (int64_t split = 0; split < splits; ++split)
        for (int64_t n = 0; n < rows.rows; ++n) squares[n] += partial[(g * splits + split) * rows.rows + n];
      known.emplace_back(std::move(squares), eps, rows.type);
    }
  }

  Lengths of(int64_t g) const {
    if (!known.empty()) return known[g];
    std::vector<double> squares(rows.rows);
    if (!normalize) return given(squares);
    Rows::Pointers pointers;
    rows.kernels.squares(rows.sample(g, nullptr, pointers), 0, rows.columns, squares.data());
    return given(std::move(squares));
  }

  Lengths given(std::vector<double> squares) const { return normalize ? Lengths(std::move(squares), eps, rows.type) : Lengths(rows.rows); }
};

inline bool all_finite(const std::vector<double>& norm) {
  return std::all_of(norm.begin(), norm.end(), [](double x) { return std::isfinite(x); });
}

// Sums of the pairs of a sample, and behind them of the growth, which is known beforehand where C is the identity.
inline void add_pairs(const Rows& rows, const Sample& sample, int64_t begin, int64_t end, double* sums) {
  rows.kernels.pairs(sample, begin, end, sums, sample.product ? sums + rows.moving * rows.repelling() : nullptr);
}

// Where all rows of a sample are far apart, the sums of its pairs and its gradients come from products of the rows, as
// precise and half the operations: the squares of two rows, added, are at most kFar times that of their difference.
constexpr double kFar = 4;

struct Measured {
  Lengths lengths;
  std::vector<double> sums;  // of the pairs, and of the growth behind them, as add_pairs has them
  bool far = false;
};

inline Measured measure(const Rows& rows, const Norms& norms, int64_t g) {
  const int64_t count = rows.moving;
  Measured found = {Lengths(count), std::vector<double>(count * count + count)};
  Rows::Pointers pointers;
  if (!rows.product.defined()) {
    std::vector<double> products(count * count), squares(count);
    rows.kernels.gram(rows.sample(g, nullptr, pointers), 0, rows.columns, products.data());
    for (int64_t n = 0; n < count; ++n) squares[n] = products[n * count + n];
    found.lengths = norms.given(squares);
    const auto& norm = found.lengths.norm;
    for (int64_t n = 0; n < count; ++n) squares[n] /= norm[n] * norm[n];
    found.far = true;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = i + 1; j < count; ++j) {
        const double both = squares[i] + squares[j], distance = both - 2 * products[i * count + j] / (norm[i] * norm[j]);
        found.sums[i * count + j] = distance;
        found.far = found.far && kFar * distance >= both;  // not with NaN
      }
    if (found.far) return found;
    std::fill(found.sums.begin(), found.sums.end(), 0.0);
  } else {
    found.lengths = norms.of(g);
  }
  add_pairs(rows, rows.sample(g, found.lengths.norm.data(), pointers), 0, rows.columns, found.sums.data());
  return found;
}

// The weights of the rows as they are in what `combine` sums of them, w [M, M] of Kernels::mix.
inline std::vector<double> mixing_weights(const std::vector<double>& c, const std::vector<double>& t, const std::vector<double>& norm) {
  const int64_t count = norm.size();
  std::vector<double> w(count * count), by(count);
  for (int64_t i = 0; i < count; ++i) by[i] = 1 / norm[i];
  for (int64_t i = 0; i < count; ++i) {
    double own = -t[i];
    for (int64_t j = 0; j < count; ++j) own += c[i * count + j], w[i * count + j] = -c[i * count + j] * by[i] * by[j];
    w[i * count + i] += own * by[i] * by[i];
  }
  return w;
}

// The gradient's rows of one sample: what Kernels::combine has of mixed, c (empty for none) and t, by the way that is right.
inline void combine_rows(const Kernels& kernels, const Sample& sample, int64_t columns, bool far, const void* const* mixed,
                         const std::vector<double>& c, const std::vector<double>& t, void* const* out, bool past_caches) {
  if (!far) return kernels.combine(sample, 0, columns, mixed, c.empty() ? nullptr : c.data(), t.data(), out, past_caches);
  const std::vector<double> norm(sample.norm, sample.norm + sample.rows);
  kernels.mix(sample, 0, columns, mixed, mixing_weights(c, t, norm).data(), out, past_caches);
}

// `weight` times the sums of sample g by add_pairs ->  distances and alignment [Mi, Mj, G]. With C symmetric,
// (q_i - q_j) s_i = (d_ij + s_i^T C s_i - s_j^T C s_j) / 2: one sum for each row rather than for each pair.
template <class T>
void store_pairs(const Rows& rows, int64_t g, const double* d, const Lengths& lengths, T* distances, T* alignment, double weight = 1) {
  const int64_t first = rows.others.defined() ? rows.moving : 0, repelling = rows.repelling();
  const double* growth = rows.product.defined() ? d + rows.moving * repelling : lengths.square.data();
  const bool finite = all_finite(lengths.norm);
  for (int64_t i = 0; i < rows.moving; ++i)
    for (int64_t j = 0; j < repelling; ++j) {
      const double distance = d[first == 0 && j < i ? j * repelling + i : i * repelling + j];
      const int64_t to = (i * repelling + j) * rows.groups + g;
      distances[to] = T(!finite ? NAN : distance < 0 ? 0 : weight * distance);  // NaN stays NaN
      alignment[to] = T(weight * (distance + growth[i] - growth[first + j]) / 2);
    }
}

constexpr int64_t kCached = 1 << 22;  // bytes of a result that may still be in a cache when it is read

// x [R, G] -> [R] of sample g, in double
template <class T>
std::vector<double> of_sample(const T* x, int64_t rows, int64_t groups, int64_t g) {
  std::vector<double> out(rows);
  for (int64_t n = 0; n < rows; ++n) out[n] = x[n * groups + g];
  return out;
}

inline std::vector<double> of_sample(const Tensor& x, int64_t g) {
  return x.scalar_type() == at::kDouble ? of_sample(x.const_data_ptr<double>(), x.size(0), x.size(1), g)
                                        : of_sample(x.const_data_ptr<float>(), x.size(0), x.size(1), g);
}

inline void check(const Tensor& x, at::ScalarType type, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == type && x.sizes() == shape, name, ": expected ", type, " ", shape, ", got ", x.scalar_type(), " ", x.sizes());
}

}  // namespace forde_fast
