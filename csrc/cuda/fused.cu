// fused_kernel.h on a GPU: one cooperative launch.
#include "fused_launch.h"

#include "device_block.h"
#include "fused_kernel.h"

namespace forde_fast {
namespace {

template <class In, int kRows, bool kProduct>
__global__ void __launch_bounds__(fused_threads(kRows), 1) fused(const Fused f, const Plan p) {
  extern __shared__ __align__(16) unsigned char memory[];
  using Small = Small<decltype(widen(In{}))>;
  const DeviceBlock block;
  FusedKernel<In, kRows, kProduct, fused_threads(kRows), DeviceBlock>{
      block, f, p, *reinterpret_cast<Small*>(memory), reinterpret_cast<In*>(memory + kSmallShared)}.run();
}

using Kernel = void (*)(Fused, Plan);

template <class In, int kRows>
Kernel with_or_without_product(const Fused& f) {
  return f.product ? fused<In, kRows, true> : fused<In, kRows, false>;
}

Kernel kernel_for(const Fused& f) {
  const bool few = rows_in_registers(f.input, f.members) == 10;
  switch (f.input) {
    case Input::kFloat32: return few ? with_or_without_product<float, 10>(f) : with_or_without_product<float, 16>(f);
    case Input::kBFloat16: return few ? with_or_without_product<bfloat16, 10>(f) : with_or_without_product<bfloat16, 16>(f);
    default: return with_or_without_product<double, 16>(f);
  }
}

int threads_for(const Fused& f) { return fused_threads(rows_in_registers(f.input, f.members)); }

}  // namespace

cudaError_t plan_fused(const Fused& f, int device, Plan* p) {
  int processors = 0, shared_memory = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) *p = plan(f, threads_for(f), processors, shared_memory);
  return error;
}

cudaError_t launch_fused(Fused f, Plan p, cudaStream_t stream) {
  const Kernel kernel = kernel_for(f);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(p.shared));
  if (error != cudaSuccess) return error;
  void* arguments[] = {&f, &p};
  return cudaLaunchCooperativeKernel(kernel, p.blocks, threads_for(f), arguments, p.shared, stream);
}

}  // namespace forde_fast
