// Convolutions of few channels on CPU tensors, channels last, and their gradients with respect to input and weight.
// Schemas: forde_fast/second_order/operators.py. Where the batch is that of several members, one after another, the
// weight has their outputs one after another, too.
//
// A block of images goes into a frame of zeros, channels last, small enough for the caches. An output is then a sum
// over taps, numbers of the frame at fixed offsets from the output's own place, times the weights: no patches are
// formed. The input's gradient is the same sum over the output's cotangent, one for each residue of a position by the
// stride; the weight's has taps and places changed over. oneDNN is faster from some tens of channels on.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "capability.h"
#include "convolution.h"

namespace forde_fast::second_order {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Offsets = std::vector<int64_t>;

const Multiplier& multiplier(at::ScalarType type) {
  const bool wide = type == at::kDouble;
#if defined(__x86_64__)
  const Capability here = capability();
  if (here == Capability::kAvx512) return avx512_multiplier(wide);
  if (here == Capability::kAvx2) return avx2_multiplier(wide);
#endif
  return portable_multiplier(wide);
}

// Along one dimension of an image: result to[i] reads the frame at from[i] + tap[k] for the kernel's number kernel[k].
struct Axis {
  Offsets to, from, kernel, tap;
};

// And of the frame: its numbers are those of the image from -before on, zeros outside of it.
struct Extent {
  int64_t before = 0, size = 0;
};

struct Setting {
  int64_t size[2], kernel[2], stride[2], padding[2], dilation[2];  // size: of the convolution's input

  Setting(IntArrayRef x, IntArrayRef weight, IntArrayRef s, IntArrayRef p, IntArrayRef d) {
    TORCH_CHECK(s.size() == 2 && p.size() == 2 && d.size() == 2, "stride, padding, dilation: expected two numbers each");
    for (int a = 0; a < 2; ++a) {
      size[a] = x[a], kernel[a] = weight[a], stride[a] = s[a], padding[a] = p[a], dilation[a] = d[a];
      TORCH_CHECK(size[a] > 0 && kernel[a] > 0 && stride[a] > 0 && dilation[a] > 0 && padding[a] >= 0 && room(a) >= 0,
                  "expected a kernel that fits into the image, got ", weight, " for ", x);
    }
  }

  int64_t room(int a) const { return size[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1; }  // to move in
  int64_t result(int a) const { return room(a) / stride[a] + 1; }

  Axis forward(int a) const {
    Axis axis;
    for (int64_t i = 0; i < result(a); ++i) axis.to.push_back(i), axis.from.push_back(i * stride[a]);
    for (int64_t k = 0; k < kernel[a]; ++k) axis.kernel.push_back(k), axis.tap.push_back(k * dilation[a]);
    return axis;
  }
  Extent forward_extent(int a) const {
    return {padding[a], (result(a) - 1) * stride[a] + (kernel[a] - 1) * dilation[a] + 1};
  }

  // The input's positions of one residue. Position residue + t stride reads results t + (residue + padding - k dilation)
  // / stride, for those k where that is whole.
  Axis backward(int a, int64_t residue) const {
    Axis axis;
    const int64_t before = backward_extent(a).before;
    for (int64_t i = residue; i < size[a]; i += stride[a]) axis.to.push_back(i), axis.from.push_back(i / stride[a] + before);
    for (int64_t k = 0; k < kernel[a]; ++k) {
      const int64_t ahead = residue + padding[a] - k * dilation[a];
      if (ahead % stride[a] == 0) axis.kernel.push_back(k), axis.tap.push_back(ahead / stride[a]);
    }
    return axis;
  }
  Extent backward_extent(int a) const {
    const int64_t before = (kernel[a] - 1) * dilation[a] / stride[a];
    return {before, before + (size[a] - 1 + padding[a]) / stride[a] + 1};
  }
};

// Images [members B, groups channels, H, W] of any strides; a group's channels are looked at.
template <class T>
struct Images {
  const T* data;
  int64_t count, channels, height, width, strides[4];

  Images(const Tensor& x, int64_t groups)
      : data(x.const_data_ptr<T>()), count(x.size(0)), channels(x.size(1) / groups), height(x.size(2)), width(x.size(3)) {
    std::copy_n(x.strides().data(), 4, strides);
  }

  const T* pixel(int64_t n, int64_t group, int64_t h, int64_t w) const {
    return data + n * strides[0] + group * channels * strides[1] + h * strides[2] + w * strides[3];
  }

  // So many channels of a pixel from the given one on.
  void copy(const T* from, int64_t channel, int64_t many, T* to) const {
    from += channel * strides[1];
    if (strides[1] == 1)
      for (int64_t c = 0; c < many; ++c) to[c] = from[c];  // a few: a call of memcpy would take longer
    else
      for (int64_t c = 0; c < many; ++c) to[c] = from[c * strides[1]];
  }

  // Image n into a frame [rows, columns, channels] whose zeros are there.
  void frame(int64_t n, int64_t group, const Extent& rows, const Extent& columns, T* to) const {
    for (int64_t h = 0; h < std::min(height, rows.size - rows.before); ++h)
      for (int64_t w = 0; w < std::min(width, columns.size - columns.before); ++w)
        copy(pixel(n, group, h, w), 0, channels, to + ((h + rows.before) * columns.size + w + columns.before) * channels);
  }
};

// Images in a block: enough places, few enough for the caches.
int64_t block_of(int64_t count, int64_t places, int64_t enough, int64_t bytes, int64_t cache) {
  return std::max<int64_t>(1, std::min({count, enough / places, cache / bytes}));
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Where output o of row d of a matrix in panels stands.
int64_t in_panels(int64_t d, int64_t o, int64_t depth, int64_t outputs, int64_t width) {
  const int64_t first = o / (2 * width) * 2 * width;
  return first * depth + d * std::min(2 * width, outputs - first) + o - first;
}

// The parts' weights as matrices of taps and outputs, one after another.
template <class T>
std::vector<T> in_panels_of(const Tensor& weight, const int64_t (&strides)[5], const Offsets& rows, const Offsets& columns,
                            int64_t channels, int64_t stored, int64_t width, int64_t parts) {
  const int64_t depth = rows.size() * columns.size() * channels, outputs = round_up(stored, width);
  const T* w = weight.const_data_ptr<T>();
  std::vector<T> matrices(parts * depth * outputs);
  const int64_t grain = 1 + (1 << 14) / (1 + depth * outputs);
  at::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t o = 0; o < stored; ++o) {
        int64_t d = 0;
        for (int64_t k : rows)
          for (int64_t l : columns)
            for (int64_t c = 0; c < channels; ++c, ++d)
              matrices[part * depth * outputs + in_panels(d, o, depth, outputs, width)] =
                  w[part * strides[0] + c * strides[1] + o * strides[2] + k * strides[3] + l * strides[4]];
      }
  });
  return matrices;
}

// Offsets of one block's places in frames and results, and of taps from a place.
struct Plan {
  Offsets place, target, tap;

  Plan(const Axis& rows, const Axis& columns, const Extent& height, const Extent& width, int64_t channels, int64_t block,
       int64_t image, int64_t pixel, int64_t row) {
    for (int64_t n = 0; n < block; ++n)
      for (size_t i = 0; i < rows.to.size(); ++i)
        for (size_t j = 0; j < columns.to.size(); ++j) {
          place.push_back(((n * height.size + rows.from[i]) * width.size + columns.from[j]) * channels);
          target.push_back(n * image + rows.to[i] * row + columns.to[j] * pixel);
        }
    for (int64_t k : rows.tap)
      for (int64_t l : columns.tap)
        for (int64_t c = 0; c < channels; ++c) tap.push_back((k * width.size + l) * channels + c);
  }
};

// How a batch and its channels come apart: each of members x groups has weights of its own.
struct Parts {
  int64_t members, groups;

  int64_t count() const { return members * groups; }
};

// from [members B, groups in, ...] -> out [members B, groups outputs, ...], channels last: sums over taps in the given
// phases. strides: of the weight, from part to part, along in and outputs, and of the kernel's rows and columns.
template <class T>
void correlate(const Tensor& from, const std::vector<std::pair<Axis, Axis>>& phases, const Extent& height,
               const Extent& width, const Tensor& weight, const int64_t (&strides)[5], Parts parts,
               const OptionalTensor& bias, Tensor& out) {
  const Multiplier& vectors = multiplier(from.scalar_type());
  const Images<T> images(from, parts.groups);
  const int64_t stored = out.size(1) / parts.groups, outputs = round_up(stored, vectors.width);
  const int64_t B = images.count / parts.members;
  const int64_t frame = height.size * width.size * images.channels;
  const int64_t block = block_of(B, out.size(2) * out.size(3), 96, frame * sizeof(T), 1 << 15);
  const int64_t pixel = out.size(1), row = pixel * out.size(3), image = row * out.size(2);

  std::vector<Plan> plans;
  std::vector<std::vector<T>> matrices;  // of each phase, for all parts
  for (const auto& [rows, columns] : phases) {
    plans.emplace_back(rows, columns, height, width, images.channels, block, image, pixel, row);
    matrices.push_back(in_panels_of<T>(weight, strides, rows.kernel, columns.kernel, images.channels, stored, vectors.width,
                                       parts.count()));
  }
  std::vector<T> start;
  if (bias) {
    const Tensor values = bias->contiguous();
    start.resize(parts.count() * outputs);
    for (int64_t part = 0; part < parts.count(); ++part)
      std::copy_n(values.const_data_ptr<T>() + part * stored, stored, &start[part * outputs]);
  }

  const int64_t blocks = (B + block - 1) / block;
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, parts.count() * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> frames(block * frame);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / blocks, group = part % parts.groups;
      const int64_t at = item % blocks * block, count = std::min(block, B - at), first = part / parts.groups * B + at;
      for (int64_t n = 0; n < count; ++n) images.frame(first + n, group, height, width, &frames[n * frame]);
      for (size_t k = 0; k < plans.size(); ++k) {
        const Plan& plan = plans[k];
        const int64_t depth = plan.tap.size(), places = plan.place.size() / block;
        vectors.multiply({count * places, depth, stored, plan.place.data(), plan.tap.data(), plan.target.data(),
                          frames.data(), matrices[k].data() + part * depth * outputs,
                          bias ? &start[part * outputs] : nullptr, false, to + first * image + group * stored});
      }
    }
  });
}

// g [members B, groups outputs, ...], x -> the weight's gradient [members groups outputs, channels, kernel].
template <class T>
void correlate_weight(const Tensor& g, const Tensor& x, const Setting& setting, Parts parts, Tensor& out) {
  const Multiplier& vectors = multiplier(x.scalar_type());
  const int64_t B = x.size(0) / parts.members;
  const Images<T> images(x, parts.groups), cotangents(g, parts.groups);
  const int64_t stored = cotangents.channels, outputs = round_up(stored, vectors.width);
  const Extent height = setting.forward_extent(0), width = setting.forward_extent(1);
  const int64_t frame = height.size * width.size * images.channels, places = g.size(2) * g.size(3);
  const int64_t block = block_of(B, places, 256, frame * sizeof(T), 1 << 17);
  const Plan plan(setting.forward(0), setting.forward(1), height, width, images.channels, block, 0, 0, 0);
  const int64_t taps = plan.tap.size();
  Offsets target;
  for (int64_t k = 0; k < taps; ++k) target.push_back(k * outputs);

  const int64_t blocks = (B + block - 1) / block;
  // sums over so many runs of blocks are added up in double, whatever the number of threads
  const int64_t runs = std::min<int64_t>(blocks, std::max<int64_t>(1, 16 / parts.count()));
  std::vector<T> sums(parts.count() * runs * taps * outputs);
  at::parallel_for(0, parts.count() * runs, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> frames(block * frame), matrix(block * places * outputs);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / runs, run = item % runs, group = part % parts.groups;
      for (int64_t k = run * blocks / runs; k < (run + 1) * blocks / runs; ++k) {
        const int64_t at = k * block, count = std::min(block, B - at), depth = count * places;
        for (int64_t n = 0, d = 0; n < count; ++n) {
          const int64_t image = part / parts.groups * B + at + n;
          images.frame(image, group, height, width, &frames[n * frame]);
          for (int64_t h = 0; h < g.size(2); ++h)
            for (int64_t v = 0; v < g.size(3); ++v, ++d)
              for (int64_t o = 0; o < stored; o += 2 * vectors.width)
                cotangents.copy(cotangents.pixel(image, group, h, v), o, std::min(2 * vectors.width, stored - o),
                                &matrix[in_panels(d, o, depth, outputs, vectors.width)]);
        }
        vectors.multiply({taps, depth, outputs, plan.tap.data(), plan.place.data(), target.data(), frames.data(),
                          matrix.data(), nullptr, true, &sums[item * taps * outputs]});
      }
    }
  });
  T* to = out.mutable_data_ptr<T>();
  const int64_t kernel = setting.kernel[0] * setting.kernel[1], grain = 1 + (1 << 14) / (1 + runs * outputs);
  at::parallel_for(0, parts.count() * taps, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> row(outputs);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / taps, tap = item % taps, k = tap / images.channels, c = tap % images.channels;
      std::fill(row.begin(), row.end(), 0);
      for (int64_t run = 0; run < runs; ++run) {
        const T* from = &sums[((part * runs + run) * taps + tap) * outputs];
        for (int64_t o = 0; o < outputs; ++o) row[o] += from[o];
      }
      for (int64_t o = 0; o < stored; ++o) to[((part * stored + o) * images.channels + c) * kernel + k] = T(row[o]);
    }
  });
}

template <class Call>
void of_type(const Tensor& x, Call call) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "expected float32 or float64, got ",
              x.scalar_type());
  if (x.scalar_type() == at::kDouble)
    call(double());
  else
    call(float());
}

// images: x or g; outputs: of all members' weights.
void check(const Tensor& images, const Tensor& other, int64_t channels, int64_t outputs, Parts parts) {
  TORCH_CHECK(images.dim() == 4 && other.dim() == 4 && images.scalar_type() == other.scalar_type(),
              "expected four dimensions and one type, got ", images.scalar_type(), " ", images.sizes(), " and ",
              other.scalar_type(), " ", other.sizes());
  TORCH_CHECK(parts.members > 0 && parts.groups > 0 && images.size(0) % parts.members == 0 && outputs % parts.count() == 0 &&
                  channels > 0 && channels % parts.groups == 0,
              "members, groups: expected divisors of ", images.size(0), " samples, ", channels, " channels and ", outputs,
              " outputs, got ", parts.members, ", ", parts.groups);
}

void check_result(const Tensor& g, const Setting& setting, int64_t images, int64_t channels) {
  TORCH_CHECK(g.size(0) == images && g.size(1) == channels && g.size(2) == setting.result(0) && g.size(3) == setting.result(1),
              "g: expected [", images, ", ", channels, ", ", setting.result(0), ", ", setting.result(1), "], got ", g.sizes());
}

Tensor images_like(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
  return at::empty({x.size(0), channels, height, width}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

Tensor convolve(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                IntArrayRef dilation, int64_t groups, int64_t members) {
  const Parts parts{members, groups};
  check(x, weight, x.size(1), weight.size(0), parts);
  TORCH_CHECK(x.size(1) == groups * weight.size(1), "x: expected ", groups * weight.size(1), " channels, got ", x.size(1));
  TORCH_CHECK(!bias || (bias->numel() == weight.size(0) && bias->scalar_type() == x.scalar_type()), "bias: expected ",
              weight.size(0), " numbers of ", x.scalar_type());
  const Setting setting(x.sizes().slice(2), weight.sizes().slice(2), stride, padding, dilation);
  const int64_t outputs = weight.size(0) / parts.count();
  Tensor out = images_like(x, outputs * groups, setting.result(0), setting.result(1));
  const int64_t s[5]{outputs * weight.stride(0), weight.stride(1), weight.stride(0), weight.stride(2), weight.stride(3)};
  of_type(x, [&](auto zero) {
    correlate<decltype(zero)>(x, {{setting.forward(0), setting.forward(1)}}, setting.forward_extent(0),
                              setting.forward_extent(1), weight, s, parts, bias, out);
  });
  return out;
}

Tensor convolve_input(const Tensor& g, const Tensor& weight, IntArrayRef size, IntArrayRef stride, IntArrayRef padding,
                      IntArrayRef dilation, int64_t groups, int64_t members) {
  const Parts parts{members, groups};
  check(g, weight, g.size(1), weight.size(0), parts);
  const Setting setting(size, weight.sizes().slice(2), stride, padding, dilation);
  check_result(g, setting, g.size(0), weight.size(0) / members);
  Tensor out = images_like(g, groups * weight.size(1), size[0], size[1]);
  const int64_t s[5]{weight.size(0) / parts.count() * weight.stride(0), weight.stride(0), weight.stride(1), weight.stride(2),
                     weight.stride(3)};
  std::vector<std::pair<Axis, Axis>> phases;
  for (int64_t r = 0; r < stride[0]; ++r)
    for (int64_t q = 0; q < stride[1]; ++q) phases.emplace_back(setting.backward(0, r), setting.backward(1, q));
  of_type(g, [&](auto zero) {
    correlate<decltype(zero)>(g, phases, setting.backward_extent(0), setting.backward_extent(1), weight, s, parts,
                              std::nullopt, out);
  });
  return out;
}

Tensor convolve_weight(const Tensor& g, const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                       IntArrayRef dilation, int64_t groups, int64_t members) {
  const Parts parts{members, groups};
  check(x, g, x.size(1), members * g.size(1), parts);
  const Setting setting(x.sizes().slice(2), kernel, stride, padding, dilation);
  check_result(g, setting, x.size(0), g.size(1));
  Tensor out = at::empty({members * g.size(1), x.size(1) / groups, kernel[0], kernel[1]}, x.options());
  of_type(x, [&](auto zero) { correlate_weight<decltype(zero)>(g, x, setting, parts, out); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(forde_fast, CPU, m) {
  m.impl("convolve", convolve);
  m.impl("convolve_input", convolve_input);
  m.impl("convolve_weight", convolve_weight);
}

}  // namespace forde_fast::second_order
