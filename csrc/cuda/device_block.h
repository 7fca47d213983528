// What the kernels ask of a block of threads, on a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

namespace forde_fast {

struct DeviceBlock {
  __device__ int thread() const { return threadIdx.x; }
  __device__ int index() const { return blockIdx.x; }
  __device__ int blocks() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_grid() const { cooperative_groups::this_grid().sync(); }
  // Loads stay behind this: the compiler would take all coefficients of a loop into registers that are not there.
  __device__ void reload() const { asm volatile("" ::: "memory"); }
  template <class T>
  __device__ T shuffle(T x, int mask) const {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }

  // 16 bytes on their way to shared memory, zeros where there is nothing; then groups of such copies.
  __device__ void copy_16_bytes(void* shared, const void* global, bool there = true) const {
    __pipeline_memcpy_async(shared, global, 16, there ? 0 : 16);
  }
  __device__ void commit_copies() const { __pipeline_commit(); }
  template <int kPending>
  __device__ void wait_for_copies() const {
    __pipeline_wait_prior(kPending);
  }
};

}  // namespace forde_fast
