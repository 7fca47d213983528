#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../repulsion.h"

namespace forde_fast {
namespace {
#include "repulsion_kernels.h"
}

const Kernels& portable_kernels(Input input) { return kernels_for(input); }

}  // namespace forde_fast
