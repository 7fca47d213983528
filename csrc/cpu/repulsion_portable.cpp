#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../repulsion.h"

namespace forde_fast {
namespace {
constexpr int64_t kBytes = 16;
constexpr bool kMultiplyAdds = false;
#include "vectors.h"
#include "tiles.h"
#include "repulsion_kernels.h"
#include "gram_kernels.h"
#include "mixing_kernels.h"
#include "rule_kernels.h"
}  // namespace

const Kernels& portable_kernels(Input input, bool wide) { return kernels_for(input, wide); }

}  // namespace forde_fast
