// Launching the kernel of fused.h; without torch, whose headers nvcc need not read.
#pragma once

#include <cuda_runtime_api.h>

#include "fused.h"

namespace forde_fast {

// The plan for this device: one block for each of its multiprocessors. f.workspace need not be set.
cudaError_t plan_fused(const Fused& f, int device, Plan* p);

// One cooperative launch on the stream, without waiting. f.workspace: [workspace_size(f, p)].
cudaError_t launch_fused(Fused f, Plan p, cudaStream_t stream);

}  // namespace forde_fast
