// The operations of forde_fast/operators.py on CPU tensors.
#pragma once

#include "rows.h"

namespace forde_fast {

Tensor contrasts(const Tensor& particles, const OptionalTensor& others, bool normalize, double eps);
std::tuple<Tensor, Tensor, Tensor> pair_distances(const Tensor& particles, const OptionalTensor& others,
                                                  const OptionalTensor& product, bool normalize, double eps);
Tensor combine(const Tensor& particles, const OptionalTensor& others, const OptionalTensor& product, const Tensor& norm,
               const Tensor& coefficients, const Tensor& projection);
Tensor coordinates(const Tensor& particles, const OptionalTensor& others, const Tensor& product, bool normalize, double eps);
Tensor project(const Tensor& particles, const Tensor& mixed, const OptionalTensor& others, const OptionalTensor& coefficients,
               bool normalize, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> median_rule(const Tensor& distances, const OptionalTensor& alignment, double log_count);
std::tuple<Tensor, Tensor, Tensor, Tensor> fused(const Tensor& particles, const OptionalTensor& product, bool normalize, double eps,
                                                 double log_count);
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_by_factor(const Tensor& particles, const Tensor& factor, double tail, bool normalize,
                                                           double eps, double log_count);

}  // namespace forde_fast
