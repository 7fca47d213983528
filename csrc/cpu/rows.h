// Checks, memory and threads around the kernels of repulsion.h, for all operations on CPU tensors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
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
    TORCH_CHECK(t.dim() == 3 && t.numel() > 0, "particles, others: expected [M, G, D], all > 0, got ", t.sizes());
    return t.size(2) == 1 || t.stride(2) == 1 ? t : t.contiguous();
  }

  int64_t repelling() const { return others.defined() ? rows - moving : rows; }

  at::TensorOptions options() const { return particles.options().dtype(type); }  // of results in the computing type

  // The rows of a sample. Kept from one to the next: memory for so few numbers costs as much as what is done with them.
  struct Pointers {
    std::vector<const void*> values, product, mixed;
    std::vector<void*> out;
  };

  Sample sample(int64_t g, const double* norm, Pointers& to) const {
    point_at(particles, g, to.values);
    if (others.defined()) point_at(others, g, to.values, moving);
    if (product.defined()) point_at(product, g, to.product);
    return {rows, moving, to.values.data(), product.defined() ? to.product.data() : nullptr, norm};
  }

  // Pointers to the rows of sample g of a tensor [., G, D], after the first so many.
  template <class Pointer>
  static Pointer* point_at(const Tensor& x, int64_t g, std::vector<Pointer>& to, int64_t after = 0) {
    const auto* row = static_cast<const char*>(x.const_data_ptr()) + g * x.stride(1) * x.element_size();
    const int64_t step = x.stride(0) * x.element_size();
    to.resize(after + x.size(0));
    for (auto at = to.begin() + after; at < to.end(); ++at, row += step) *at = const_cast<char*>(row);
    return to.data();
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

  // Sums over all columns of each sample, [G, count]; f(g, begin, end, sums) adds those of a range of them.
  template <class F>
  std::vector<double> sums(int64_t splits, int64_t count, const F& f) const {
    std::vector<double> partial(groups * splits * count), whole(groups * count);
    each(splits, [&](int64_t g, int64_t split, int64_t begin, int64_t end) { f(g, begin, end, &partial[(g * splits + split) * count]); });
    for (int64_t item = 0; item < groups * splits; ++item)
      for (int64_t n = 0; n < count; ++n) whole[item / splits * count + n] += partial[item * count + n];
    return whole;
  }
};

// sqrt(|p|^2 + eps), and |s|^2 of the rows divided by it; or 1, and 0 for nothing that is needed. Norms are rounded to the
// type in which they are handed on: `combine` must divide by the very same numbers, or what it projects out is not what
// is there.
struct Lengths {
  std::vector<double> norm, square;

  void of_ones(int64_t rows) {
    norm.assign(rows, 1.0);
    square.assign(rows, 0.0);
  }

  // `square` has |p|^2 of the rows.
  void of_squares(double eps, at::ScalarType type) {
    norm.resize(square.size());
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
    const auto squares = rows.sums(splits, rows.rows, [&](int64_t g, int64_t begin, int64_t end, double* sums) {
      Rows::Pointers pointers;
      rows.kernels.squares(rows.sample(g, nullptr, pointers), begin, end, sums);
    });
    for (auto from = squares.begin(); from < squares.end(); from += rows.rows) {
      Lengths own;
      own.square.assign(from, from + rows.rows);
      own.of_squares(eps, rows.type);
      known.push_back(std::move(own));
    }
  }

  void find(int64_t g, Rows::Pointers& pointers, Lengths& to) const {
    if (!known.empty()) {
      to = known[g];
    } else if (!normalize) {
      to.of_ones(rows.rows);
    } else {
      to.square.assign(rows.rows, 0.0);
      rows.kernels.squares(rows.sample(g, nullptr, pointers), 0, rows.columns, to.square.data());
      to.of_squares(eps, rows.type);
    }
  }
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
// They divide by two norms at once and multiply rows as they are: squares not between this and its inverse leave the type's range.
inline double least_square(at::ScalarType type) { return type == at::kDouble ? 1e-280 : 1e-30; }

// What is known of a sample, and the memory for it: as with the pointers, kept from one to the next.
struct Measured {
  Rows::Pointers pointers;
  Lengths lengths;
  std::vector<double> sums;  // of the pairs, and of the growth behind them, as add_pairs has them
  bool far = false;

  void measure(const Rows& rows, const Norms& norms, int64_t g) {
    const int64_t count = rows.moving;
    sums.assign(count * count + count, 0.0);
    if (rows.product.defined()) {
      norms.find(g, pointers, lengths);
    } else {
      rows.kernels.gram(rows.sample(g, nullptr, pointers), 0, rows.columns, sums.data());
      take_products(rows, norms);
    }
    if (far) return;
    std::fill(sums.begin(), sums.end(), 0.0);
    add_pairs(rows, rows.sample(g, lengths.norm.data(), pointers), 0, rows.columns, sums.data());
  }

  // From the products of rows in `sums`: their lengths, and whether all are far apart. If they are, `sums` become those of
  // the pairs.
  void take_products(const Rows& rows, const Norms& norms) {
    const int64_t count = rows.moving;
    lengths.square.resize(count);
    for (int64_t n = 0; n < count; ++n) lengths.square[n] = std::exchange(sums[n * count + n], 0.0);
    squares = lengths.square;
    const double least = least_square(rows.type);
    far = std::all_of(squares.begin(), squares.end(), [&](double square) { return square >= least && square <= 1 / least; });
    norms.normalize ? lengths.of_squares(norms.eps, rows.type) : lengths.of_ones(count);
    const auto& norm = lengths.norm;
    for (int64_t n = 0; n < count; ++n) squares[n] /= norm[n] * norm[n];
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = i + 1; j < count; ++j) {
        double& sum = sums[i * count + j];
        const double both = squares[i] + squares[j];
        sum = both - 2 * sum / (norm[i] * norm[j]);
        far = far && kFar * sum >= both;  // not with NaN
      }
  }

 private:
  std::vector<double> squares;
};

// Where gradients come from: as `combine` and `mix` of Kernels have it, c and t of one sample.
struct Weights {
  std::vector<double> c, t;  // [M, M], or empty for none, and [M]

  explicit Weights(int64_t members) : t(members) {}

  // `weight` times coefficients [M, M], and t what they make of the alignment [M, M], or 0 for none.
  template <class T>
  void of_pairs(const double* coefficients, const T* alignment, double weight = 1) {
    const int64_t members = t.size();
    c.resize(members * members);
    for (int64_t i = 0; i < members; ++i) {
      double along = 0;
      for (int64_t p = i * members; p < (i + 1) * members; ++p) {
        c[p] = weight * coefficients[p];
        if (alignment) along += coefficients[p] * alignment[p];
      }
      t[i] = along;
    }
  }

  // out = mixed and c and t combined, for the columns begin .. end, by the way that is right.
  void combine_rows(const Rows& rows, const Sample& sample, int64_t begin, int64_t end, bool far, const void* const* mixed,
                    void* const* out) {
    if (!far) return rows.kernels.combine(sample, begin, end, mixed, c.empty() ? nullptr : c.data(), t.data(), out);
    of_rows_as_they_are(sample.norm);
    rows.kernels.mix(sample, begin, end, mixed, w.data(), out);
  }

 private:
  std::vector<double> w, by;

  void of_rows_as_they_are(const double* norm) {
    const int64_t count = t.size();
    w.assign(count * count, 0.0);
    by.resize(count);
    for (int64_t i = 0; i < count; ++i) by[i] = 1 / norm[i];
    for (int64_t i = 0; i < count; ++i) {
      double own = -t[i];
      for (int64_t j = 0; j < count; ++j) own += c[i * count + j], w[i * count + j] = -c[i * count + j] * by[i] * by[j];
      w[i * count + i] += own * by[i] * by[i];
    }
  }
};

// `weight` times the sums of a sample by add_pairs -> its distances and alignment [Mi, Mj], each number `step` from the
// one before. With C symmetric, (q_i - q_j) s_i = (d_ij + s_i^T C s_i - s_j^T C s_j) / 2: one sum for each row rather than
// for each pair.
template <class T>
void store_pairs(const Rows& rows, const double* d, const Lengths& lengths, T* distances, T* alignment, int64_t step, double weight = 1) {
  const int64_t first = rows.others.defined() ? rows.moving : 0, repelling = rows.repelling();
  const double* growth = rows.product.defined() ? d + rows.moving * repelling : lengths.square.data();
  const bool finite = all_finite(lengths.norm);
  for (int64_t i = 0; i < rows.moving; ++i)
    for (int64_t j = 0; j < repelling; ++j) {
      const double distance = d[first == 0 && j < i ? j * repelling + i : i * repelling + j];
      const int64_t to = (i * repelling + j) * step;
      distances[to] = T(!finite ? NAN : distance < 0 ? 0 : weight * distance);  // NaN stays NaN
      alignment[to] = T(weight * (distance + growth[i] - growth[first + j]) / 2);
    }
}

// x [R, G] -> [R] of sample g, in double
inline std::vector<double> of_sample(const Tensor& x, int64_t g) {
  std::vector<double> to(x.size(0));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "of_sample", [&] {
    const auto* from = x.const_data_ptr<scalar_t>() + g;
    for (size_t n = 0; n < to.size(); ++n) to[n] = from[n * x.size(1)];
  });
  return to;
}

inline void check(const Tensor& x, at::ScalarType type, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == type && x.sizes() == shape, name, ": expected ", type, " ", shape, ", got ", x.scalar_type(), " ", x.sizes());
}

}  // namespace forde_fast
