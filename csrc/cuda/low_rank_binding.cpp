// The operation `fused_low_rank` of forde_fast/operators.py on CUDA tensors: checks, memory, the launch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "low_rank_launch.h"

namespace forde_fast {
namespace {

using at::Tensor;

// Rows that lie apart and begin at multiples of 16 bytes.
Tensor aligned(const Tensor& rows) {
  const auto apart = [](int64_t stride) { return stride > 0 && stride % 4 == 0; };
  const bool fits = rows.stride(2) == 1 && apart(rows.stride(0)) && apart(rows.stride(1));
  return fits && reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

// particles [M, G, D], factor [D / 8, K / 8, 8, 8] -> value [], gradient [M, G, D], bandwidth [M, G], distances [M, M, G]
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_low_rank(const Tensor& particles, const Tensor& factor, double unit, double tail,
                                                          double eps, double log_count) {
  TORCH_CHECK(particles.dim() == 3 && particles.numel() > 0, "particles: expected [M, G, D], got ", particles.sizes());
  const int64_t members = particles.size(0), groups = particles.size(1), columns = particles.size(2);
  TORCH_CHECK(particles.scalar_type() == at::kFloat, "particles: expected float32, got ", particles.scalar_type());
  TORCH_CHECK(members >= 2 && members <= kLowRankMembers, "particles: expected 2 to ", kLowRankMembers, ", got ", members);
  TORCH_CHECK(groups < 1 << 24 && columns < 1 << 30 && columns % 4 == 0, "particles: expected G below 2^24 and D below 2^30, a multiple of 4, got ",
              particles.sizes());
  const int64_t tiles = up(columns, kFactorRows) * kFactorRows / 8, rank = factor.dim() == 4 ? factor.size(1) * 8 : 0;
  TORCH_CHECK((rank == 128 || rank == 256) && factor.sizes() == at::IntArrayRef({tiles, rank / 8, 8, 8}) && factor.is_contiguous() &&
                  reinterpret_cast<uintptr_t>(factor.const_data_ptr()) % 16 == 0,
              "factor: expected [", tiles, ", 16 or 32, 8, 8], contiguous and aligned to 16 bytes, got ", factor.sizes());
  TORCH_CHECK(factor.scalar_type() == at::kHalf && factor.device() == particles.device(), "factor: expected float16 on ",
              particles.device(), ", got ", factor.scalar_type(), " on ", factor.device());
  const c10::cuda::CUDAGuard guard(particles.device());
  const Tensor rows = aligned(particles);
  Tensor value = at::empty({}, rows.options()), gradient = at::empty({members, groups, columns}, rows.options());
  Tensor bandwidth = at::empty({members, groups}, rows.options()), distances = at::empty({members, members, groups}, rows.options());

  LowRank f = {};
  f.particles = rows.const_data_ptr<float>();
  f.factor = factor.const_data_ptr();
  f.gradient = gradient.mutable_data_ptr<float>();
  f.value = value.mutable_data_ptr<float>();
  f.bandwidth = bandwidth.mutable_data_ptr<float>();
  f.distances = distances.mutable_data_ptr<float>();
  f.groups = groups;
  f.columns = columns;
  f.stride_m = rows.stride(0);
  f.stride_g = rows.stride(1);
  f.members = int(members);
  f.rank = int(rank);
  f.unit = unit;
  f.tail = tail;
  f.eps = eps;
  f.log_count = log_count;
  LowRankPlan p;
  C10_CUDA_CHECK(plan_low_rank(f, particles.get_device(), &p));
  const Tensor workspace = at::empty({p.at.size}, rows.options().dtype(at::kByte));
  f.workspace = static_cast<char*>(workspace.mutable_data_ptr());
  C10_CUDA_CHECK(launch_low_rank(f, p, c10::cuda::getCurrentCUDAStream().stream()));
  return {value, gradient, bandwidth, distances};
}

}  // namespace

TORCH_LIBRARY_IMPL(forde_fast, CUDA, m) { m.impl("fused_low_rank", fused_low_rank); }

}  // namespace forde_fast
