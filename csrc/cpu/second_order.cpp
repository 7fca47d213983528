// The operations of forde_fast/second_order on CPU tensors: layouts, coefficients and threads around the passes.
// Their schemas are defined in forde_fast/second_order/operators.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "capability.h"
#include "second_order.h"

namespace forde_fast::second_order {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const Passes& passes_for(at::ScalarType type) {
  const bool wide = type == at::kDouble;
#if defined(__x86_64__)
  const Capability here = capability();
  if (here == Capability::kAvx512) return avx512_passes(wide);
  if (here == Capability::kAvx2) return avx2_passes(wide);
#endif
  return portable_passes(wide);
}

// The tensors of a call as [outer, channels, inner], dense in the order of x: channels last is [N S, C, 1]. Where the
// batch is that of several members, one after another, each is normalised by itself and has coefficients of its own.
struct Call {
  Tensor x;
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
  int64_t members, outer, channels, inner;  // outer: of a member
  const Passes& passes;
  Part whole{};
  std::vector<Tensor> kept;  // what `whole` points to
  std::vector<double> rows;  // coefficients [rows, members channels]

  Call(const Tensor& given, int64_t members) : members(members), passes(passes_for(given.scalar_type())) {
    TORCH_CHECK(given.scalar_type() == at::kFloat || given.scalar_type() == at::kDouble,
                "x: expected float32 or float64, got ", given.scalar_type());
    TORCH_CHECK(given.dim() >= 2, "x: expected [N, C, ...], got ", given.sizes());
    TORCH_CHECK(members > 0 && given.size(0) % members == 0, "members: expected a divisor of ", given.size(0), ", got ", members);
    const auto last = given.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
    if (!given.is_contiguous() && given.dim() >= 4 && given.is_contiguous(last)) format = last;
    x = given.contiguous(format);
    channels = x.size(1);
    outer = x.size(0) / members;
    inner = channels == 0 || outer == 0 ? 1 : x.numel() / (members * outer * channels);
    if (format != at::MemoryFormat::Contiguous) outer *= inner, inner = 1;
    whole.outer = outer, whole.channels = channels, whole.inner = inner, whole.stride = width();
    whole.x = x.const_data_ptr();
  }

  Call(const Tensor& given, const Tensor& statistics)
      : Call(given, given.dim() < 2 || given.size(1) == 0 ? 1 : statistics.size(-1) / given.size(1)) {}

  int64_t width() const { return members * channels; }  // of a row of coefficients

  const void* input(const OptionalTensor& given, const char* name) {
    if (!given) return nullptr;
    TORCH_CHECK(given->sizes() == x.sizes() && given->scalar_type() == x.scalar_type(), name, ": expected ",
                x.scalar_type(), " ", x.sizes(), " as x, got ", given->scalar_type(), " ", given->sizes());
    kept.push_back(given->contiguous(format));
    return kept.back().const_data_ptr();
  }

  Tensor output() const { return at::empty_like(x, x.options(), format); }

  // A row of coefficients, one for each member and channel; `fallback` where there is none.
  void row(const OptionalTensor& given, double fallback) {
    double* to = new_row(fallback);
    if (!given) return;
    TORCH_CHECK(given->numel() == width(), "expected ", width(), " numbers, one for each channel, got ", given->sizes());
    const Tensor values = given->contiguous();
    if (values.scalar_type() == at::kFloat) {
      std::copy_n(values.const_data_ptr<float>(), width(), to);
    } else {
      const Tensor wide = values.to(at::kDouble);
      std::copy_n(wide.const_data_ptr<double>(), width(), to);
    }
  }

  double* new_row(double value = 0) {
    rows.resize(rows.size() + width(), value);
    return rows.data() + rows.size() - width();
  }

  // Rounds the coefficients to the tensors' type: nothing changes them afterwards.
  void finish() {
    Tensor rounded = at::empty({int64_t(rows.size())}, x.options());
    if (x.scalar_type() == at::kDouble)
      std::copy(rows.begin(), rows.end(), rounded.mutable_data_ptr<double>());
    else
      std::copy(rows.begin(), rows.end(), rounded.mutable_data_ptr<float>());
    kept.push_back(rounded);
    whole.coefficients = rounded.const_data_ptr();
  }

  // The rows begin to end of a member.
  Part part(int64_t member, int64_t begin, int64_t end) const {
    Part p = whole;
    p.outer = end - begin;
    const int64_t size = x.element_size(), bytes = (member * outer + begin) * channels * inner * size;
    for (const void** tensor : {&p.x, &p.residual, &p.z, &p.g, &p.u, &p.u_residual})
      if (*tensor) *tensor = static_cast<const char*>(*tensor) + bytes;
    for (void** tensor : {&p.out, &p.second})
      if (*tensor) *tensor = static_cast<char*>(*tensor) + bytes;
    p.coefficients = static_cast<const char*>(p.coefficients) + member * channels * size;
    return p;
  }

  static constexpr int64_t kGrain = 1 << 14;  // numbers that are worth a thread

  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, channels * inner)); }

  void apply(void (*pass)(const Part&)) {
    finish();
    at::parallel_for(0, members * outer, grain(), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t member = begin / outer, stop = std::min(end, (member + 1) * outer);
        pass(part(member, begin - member * outer, stop - member * outer));
        begin = stop;
      }
    });
  }

  // [count, members channels]; the same numbers whatever the number of threads.
  Tensor sum(void (*pass)(const Part&, double*), int64_t count) {
    finish();
    const int64_t step = std::max(grain(), (outer + 63) / 64), parts = (outer + step - 1) / step;
    Tensor total = at::zeros({count, width()}, x.options().dtype(at::kDouble));
    const int64_t own = count * channels;
    std::vector<double> partial(members * parts * own);
    at::parallel_for(0, members * parts, 1, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t member = item / parts, k = item % parts;
        pass(part(member, k * step, std::min(outer, (k + 1) * step)), &partial[item * own]);
      }
    });
    double* to = total.mutable_data_ptr<double>();
    for (int64_t item = 0; item < members * parts; ++item)
      for (int64_t row = 0; row < count; ++row)
        for (int64_t c = 0; c < channels; ++c)
          to[row * width() + item / parts * channels + c] += partial[item * own + row * channels + c];
    return total;
  }
};

const double* doubles(const Tensor& sums, int64_t rows, int64_t width, const char* name) {
  TORCH_CHECK(sums.scalar_type() == at::kDouble && sums.is_contiguous() && sums.dim() == 2 && sums.size(0) >= rows &&
                  sums.size(1) == width,
              name, ": expected float64 [", rows, ", ", width, "], got ", sums.scalar_type(), " ", sums.sizes());
  return sums.const_data_ptr<double>();
}

// statistics [4, C]: mean, inverse deviation, 1 / count (0: constants, evaluation mode), variance
void common(Call& call, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias, bool relu) {
  const double* s = doubles(statistics, 4, call.width(), "statistics");
  call.rows.assign(s, s + 2 * call.width());
  call.row(weight, 1);
  call.row(bias, 0);
  call.whole.relu = relu;
}

Tensor norm_statistics(const Tensor& x, double eps, int64_t members) {
  Call call(x, members);
  const double count = double(call.outer) * double(call.inner);
  // sums are taken of x minus one of its numbers: squares cancel less
  double* first = call.new_row();
  for (int64_t c = 0; c < call.width() && x.numel(); ++c) {
    const int64_t at = (c / call.channels * call.outer * call.channels + c % call.channels) * call.inner;
    first[c] = x.scalar_type() == at::kDouble ? static_cast<const double*>(call.whole.x)[at]
                                              : static_cast<const float*>(call.whole.x)[at];
  }
  const std::vector<double> shift = call.rows;
  const Tensor moments = call.sum(call.passes.moments, 2);
  Tensor statistics = at::empty({4, call.width()}, moments.options());
  const double* sums = moments.const_data_ptr<double>();
  double* to = statistics.mutable_data_ptr<double>();
  for (int64_t c = 0, C = call.width(); c < C; ++c) {
    const double mean = sums[c] / count, square = sums[C + c] / count - mean * mean;
    const double variance = square < 0 ? 0 : square;  // NaN stays NaN
    to[c] = shift[c] + mean;
    to[C + c] = 1 / std::sqrt(variance + eps);
    to[2 * C + c] = 1 / count;
    to[3 * C + c] = variance;
  }
  return statistics;
}

Tensor norm_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& statistics, const OptionalTensor& weight,
                    const OptionalTensor& bias, bool relu) {
  Call call(x, statistics);
  common(call, statistics, weight, bias, relu);
  call.whole.residual = call.input(residual, "residual");
  Tensor out = call.output();
  call.whole.out = out.mutable_data_ptr();
  call.apply(call.passes.forward);
  return out;
}

Tensor norm_backward_sums(const Tensor& g, const Tensor& x, const OptionalTensor& z, const Tensor& statistics,
                          const OptionalTensor& weight, const OptionalTensor& bias, bool relu) {
  Call call(x, statistics);
  common(call, statistics, weight, bias, relu);
  call.whole.g = call.input(g, "g");
  call.whole.z = call.input(z, "z");
  return call.sum(call.passes.backward_sums, 2);
}

std::tuple<Tensor, Tensor> norm_backward(const Tensor& g, const Tensor& x, const OptionalTensor& z, const Tensor& statistics,
                                         const OptionalTensor& weight, const OptionalTensor& bias, bool relu,
                                         const Tensor& sums, bool residual) {
  Call call(x, statistics);
  common(call, statistics, weight, bias, relu);
  call.whole.g = call.input(g, "g");
  call.whole.z = call.input(z, "z");
  Tensor dx = call.output(), masked = residual ? call.output() : at::empty({0}, x.options());
  call.whole.out = dx.mutable_data_ptr();
  call.whole.second = residual ? masked.mutable_data_ptr() : nullptr;
  const int64_t C = call.width();
  const double *s = doubles(statistics, 4, C, "statistics"), *sum = doubles(sums, 2, C, "sums");
  for (int k = 0; k < 3; ++k) call.new_row();
  const double* weights = &call.rows[2 * C];
  double* k = &call.rows[kCommon * C];
  for (int64_t c = 0; c < C; ++c) {
    const double scale = weights[c] * s[C + c], share = s[2 * C + c];
    k[c] = -scale * share * sum[c];
    k[C + c] = -scale * share * sum[C + c];
    k[2 * C + c] = scale;
  }
  call.apply(call.passes.backward);
  return {dx, masked};
}

Tensor norm_double_sums(const Tensor& u, const Tensor& g, const Tensor& x, const OptionalTensor& z, const Tensor& statistics,
                        const OptionalTensor& weight, const OptionalTensor& bias, bool relu) {
  Call call(x, statistics);
  common(call, statistics, weight, bias, relu);
  call.whole.u = call.input(u, "u");
  call.whole.g = call.input(g, "g");
  call.whole.z = call.input(z, "z");
  return call.sum(call.passes.double_sums, 3);
}

std::tuple<Tensor, Tensor> norm_double_backward(const Tensor& u, const OptionalTensor& u_residual, const OptionalTensor& v,
                                                const Tensor& g, const Tensor& x, const OptionalTensor& z,
                                                const Tensor& statistics, const OptionalTensor& weight,
                                                const OptionalTensor& bias, bool relu, const Tensor& sums,
                                                const Tensor& double_sums) {
  Call call(x, statistics);
  common(call, statistics, weight, bias, relu);
  call.whole.u = call.input(u, "u");
  call.whole.u_residual = call.input(u_residual, "u_residual");
  call.whole.g = call.input(g, "g");
  call.whole.z = call.input(z, "z");
  Tensor dg = call.output(), dx = call.output();
  call.whole.out = dg.mutable_data_ptr();
  call.whole.second = dx.mutable_data_ptr();
  const int64_t C = call.width();
  const double *s = doubles(statistics, 4, C, "statistics"), *sum = doubles(sums, 2, C, "sums");
  const double* twice = doubles(double_sums, v ? 5 : 3, C, "double_sums");
  const double* dv = v ? doubles(*v, 2, C, "v") : nullptr;
  for (int row = 0; row < 7; ++row) call.new_row();
  const double* weights = &call.rows[2 * C];
  double* k = &call.rows[kCommon * C];
  for (int64_t c = 0; c < C; ++c) {
    const double r = s[C + c], share = s[2 * C + c], scale = weights[c] * r;
    const double g1 = sum[c] * share, gx = sum[C + c] * share;  // means of g and g xhat
    const double u1 = twice[c] * share, ux = twice[C + c] * share, ug = twice[2 * C + c] * share;
    const double inner = ug - u1 * g1 - ux * gx;
    const double db = v ? dv[c] : 0, dw = v ? dv[C + c] : 0;
    const double dwg = v ? twice[3 * C + c] * share : 0, dwgx = v ? twice[4 * C + c] * share : 0;
    k[c] = db - scale * u1;
    k[C + c] = dw - scale * ux;
    k[2 * C + c] = scale;
    k[3 * C + c] = scale * r * (ux * g1 + gx * u1) - r * dwg;
    k[4 * C + c] = -scale * r * (inner - 2 * ux * gx) - r * dwgx;
    k[5 * C + c] = -scale * r * ux + r * dw;
    k[6 * C + c] = -scale * r * gx;
  }
  call.apply(call.passes.double_backward);
  return {dg, dx};
}

}  // namespace

TORCH_LIBRARY_IMPL(forde_fast, CPU, m) {
  m.impl("norm_statistics", norm_statistics);
  m.impl("norm_forward", norm_forward);
  m.impl("norm_backward_sums", norm_backward_sums);
  m.impl("norm_backward", norm_backward);
  m.impl("norm_double_sums", norm_double_sums);
  m.impl("norm_double_backward", norm_double_backward);
}

}  // namespace forde_fast::second_order
