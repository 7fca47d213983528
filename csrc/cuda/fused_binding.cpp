// The operation `fused` of forde_fast/operators.py on CUDA tensors: checks, memory, the launch. A module of its own, so
// that a failure to build it leaves the C++ backend.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "fused_launch.h"

namespace forde_fast {
namespace {

using at::Tensor;

Input input_of(const Tensor& particles) {
  switch (particles.scalar_type()) {
    case at::kFloat: return Input::kFloat32;
    case at::kBFloat16: return Input::kBFloat16;
    case at::kDouble: return Input::kFloat64;
    default: TORCH_CHECK(false, "particles: expected float32, float64 or bfloat16, got ", particles.scalar_type());
  }
}

// particles [M, G, D], product [M - 1, G, D] -> value [], gradient [M, G, D], bandwidth [M, G], distances [M, M, G]
std::tuple<Tensor, Tensor, Tensor, Tensor> fused(const Tensor& particles, const std::optional<Tensor>& product, bool normalize,
                                                 double eps, double log_count) {
  TORCH_CHECK(particles.dim() == 3 && particles.numel() > 0, "particles: expected [M, G, D], got ", particles.sizes());
  const int64_t members = particles.size(0), groups = particles.size(1), columns = particles.size(2);
  TORCH_CHECK(members <= kMostMembers, "particles: expected at most ", kMostMembers, ", got ", members);
  TORCH_CHECK(groups < 1 << 30 && columns < 1 << 30, "particles: expected G and D below 2^30, got ", particles.sizes());
  const Input input = input_of(particles);
  const auto wide = particles.options().dtype(input == Input::kFloat64 ? at::kDouble : at::kFloat);
  const c10::cuda::CUDAGuard guard(particles.device());
  const Tensor rows = columns == 1 || particles.stride(2) == 1 ? particles : particles.contiguous();
  Tensor weighed;
  if (product) {
    TORCH_CHECK(product->sizes() == at::IntArrayRef({members - 1, groups, columns}), "product: expected [M - 1, G, D], got ", product->sizes());
    TORCH_CHECK(product->dtype() == wide.dtype() && product->device() == particles.device(), "product: expected ", wide.dtype(),
                " on ", particles.device(), ", got ", product->dtype(), " on ", product->device());
    weighed = product->contiguous();
  }
  Tensor value = at::empty({}, wide), gradient = at::empty({members, groups, columns}, particles.options());
  Tensor bandwidth = at::empty({members, groups}, wide), distances = at::empty({members, members, groups}, wide);

  Fused f = {};
  f.particles = rows.const_data_ptr();
  f.product = weighed.defined() ? weighed.const_data_ptr() : nullptr;
  f.gradient = gradient.mutable_data_ptr();
  f.value = value.mutable_data_ptr();
  f.bandwidth = bandwidth.mutable_data_ptr();
  f.distances = distances.mutable_data_ptr();
  f.groups = groups;
  f.columns = columns;
  f.stride_m = rows.stride(0);
  f.stride_g = rows.stride(1);
  f.members = int(members);
  f.input = input;
  f.normalize = normalize;
  f.eps = eps;
  f.log_count = log_count;
  Plan p;
  C10_CUDA_CHECK(plan_fused(f, particles.get_device(), &p));
  const Tensor workspace = at::empty({workspace_size(f, p)}, particles.options().dtype(at::kDouble));
  f.workspace = workspace.mutable_data_ptr<double>();
  C10_CUDA_CHECK(launch_fused(f, p, c10::cuda::getCurrentCUDAStream().stream()));
  return {value, gradient, bandwidth, distances};
}

}  // namespace

TORCH_LIBRARY_IMPL(forde_fast, CUDA, m) { m.impl("fused", fused); }

}  // namespace forde_fast

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA C++ implementation of forde_fast's operation; importing it registers it";
#if defined(FORDE_FAST_LOW_RANK)  // of setup.py, where it compiles for sm_90a
  m.attr("has_low_rank") = true;
#else
  m.attr("has_low_rank") = false;
#endif
}
