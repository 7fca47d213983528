// The standard headers come before the pragma: their inline functions are shared with files compiled without AVX-512.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../repulsion.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,prefer-vector-width=512")
#endif

namespace forde_fast {
namespace {
constexpr int64_t kBytes = 64;
constexpr bool kMultiplyAdds = true;
#include "vectors.h"
#include "tiles.h"
#include "repulsion_kernels.h"
#include "gram_kernels.h"
#include "mixing_kernels.h"
#include "rule_kernels.h"
}  // namespace

const Kernels& avx512_kernels(Input input, bool wide) { return kernels_for(input, wide); }

}  // namespace forde_fast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
