// low_rank_kernel.h on a GPU: one cooperative launch.
#include "low_rank_launch.h"

#include "low_rank_block.h"
#include "low_rank_kernel.h"

namespace forde_fast {
namespace {

template <int kRank>
__global__ void __launch_bounds__(kLowRankThreads, 1) low_rank(const LowRank f, const LowRankPlan p, const __grid_constant__ CUtensorMap rows) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) char memory[];
  const LowRankBlock block(rows);
  LowRankKernel<kRank, LowRankBlock>{block, f, p, memory}.run();
#else
  __trap();  // compiled for another chip than the one at hand
#endif
}

// The particles in tiles, for copies of them. The driver's function is looked up, as nothing else needs its library.
cudaError_t describe_rows(const LowRank& f, CUtensorMap* rows) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {cuuint64_t(f.columns), cuuint64_t(f.members), cuuint64_t(f.groups)};
  const cuuint64_t strides[] = {cuuint64_t(f.stride_m) * 4, cuuint64_t(f.stride_g) * 4};
  const cuuint32_t tile[] = {kColumns, kLowRankMembers, kGroup}, steps[] = {1, 1, 1};
  const CUresult done = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      rows, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 3, const_cast<float*>(f.particles), sizes, strides, tile, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return done == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t plan_low_rank(const LowRank& f, int device, LowRankPlan* p) {
  int processors = 0, generation = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess && generation != 9) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess) *p = plan(f, processors);
  return error;
}

cudaError_t launch_low_rank(LowRank f, LowRankPlan p, cudaStream_t stream) {
  CUtensorMap rows;
  cudaError_t error = describe_rows(f, &rows);
  if (error != cudaSuccess) return error;
  const auto kernel = f.rank == 128 ? low_rank<128> : low_rank<256>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kLowRankShared);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&f, &p, &rows};
  return cudaLaunchCooperativeKernel(kernel, p.blocks, kLowRankThreads, arguments, kLowRankShared, stream);
}

}  // namespace forde_fast
