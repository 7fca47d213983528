// Launching the kernel of low_rank.h; without torch, whose headers nvcc need not read.
#pragma once

#include <cuda_runtime_api.h>

#include "low_rank.h"

namespace forde_fast {

// The plan for this device: at most one block for each of its multiprocessors. cudaErrorInvalidConfiguration if it is not
// Hopper, whose instructions the kernel is written in. f.workspace need not be set.
cudaError_t plan_low_rank(const LowRank& f, int device, LowRankPlan* p);

// One cooperative launch on the stream, without waiting. f.workspace: [p.at.size] bytes.
cudaError_t launch_low_rank(LowRank f, LowRankPlan p, cudaStream_t stream);

}  // namespace forde_fast
