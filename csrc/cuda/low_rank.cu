// low_rank_kernel.h on a GPU: one cooperative launch.
#include "low_rank_launch.h"

#include "device_block.h"
#include "low_rank_kernel.h"

namespace forde_fast {
namespace {

template <int kRank>
__global__ void __launch_bounds__(kLowRankThreads, 1) low_rank(const LowRank f, const LowRankPlan p) {
#if __CUDA_ARCH__ >= 900  // no chip before has the memory
  extern __shared__ __align__(128) char memory[];
  const DeviceBlock block;
  LowRankKernel<kRank, DeviceBlock>{block, f, p, memory}.run();
#else
  __trap();  // compiled for another chip than the one at hand
#endif
}

}  // namespace

cudaError_t plan_low_rank(const LowRank& f, int device, LowRankPlan* p) {
  int processors = 0, shared_memory = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && shared_memory < kLowRankShared) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess) *p = plan(f, processors);
  return error;
}

cudaError_t launch_low_rank(LowRank f, LowRankPlan p, cudaStream_t stream) {
  const auto kernel = f.rank == 128 ? low_rank<128> : low_rank<256>;
  const int shared = kLowRankShared;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&f, &p};
  return cudaLaunchCooperativeKernel(kernel, p.blocks, kLowRankThreads, arguments, shared, stream);
}

}  // namespace forde_fast
