// The standard headers come before the pragma: their inline functions are shared with files compiled without AVX-512.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "convolution.h"
#include "descent.h"
#include "second_order.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,prefer-vector-width=512")
#endif

namespace forde_fast {
namespace {
#include "descent_kernels.h"
}  // namespace

void avx512_descent(const Descent& d, bool wide) { descend(d, wide); }

}  // namespace forde_fast

namespace forde_fast::second_order {
namespace {
constexpr int64_t kBytes = 64;
#include "second_order_kernels.h"
#include "convolution_kernels.h"
}  // namespace

const Passes& avx512_passes(bool wide) { return passes_for(wide); }
const Multiplier& avx512_multiplier(bool wide) { return multiplier_for(wide); }

}  // namespace forde_fast::second_order

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
