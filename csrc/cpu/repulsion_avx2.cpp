// The standard headers come before the pragma: their inline functions are shared with files compiled without AVX2.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../repulsion.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace forde_fast {
namespace {
constexpr int64_t kBytes = 32;
constexpr bool kMultiplyAdds = true;
#include "vectors.h"
#include "tiles.h"
#include "repulsion_kernels.h"
#include "gram_kernels.h"
#include "mixing_kernels.h"
#include "rule_kernels.h"
}  // namespace

const Kernels& avx2_kernels(Input input, bool wide) { return kernels_for(input, wide); }

}  // namespace forde_fast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
