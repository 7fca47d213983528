#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "convolution.h"
#include "descent.h"
#include "second_order.h"

namespace forde_fast {
namespace {
#include "descent_kernels.h"
}  // namespace

void portable_descent(const Descent& d, bool wide) { descend(d, wide); }

}  // namespace forde_fast

namespace forde_fast::second_order {
namespace {
constexpr int64_t kBytes = 16;
#include "second_order_kernels.h"
#include "convolution_kernels.h"
}  // namespace

const Passes& portable_passes(bool wide) { return passes_for(wide); }
const Multiplier& portable_multiplier(bool wide) { return multiplier_for(wide); }

}  // namespace forde_fast::second_order
