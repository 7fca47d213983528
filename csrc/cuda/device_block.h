// What the kernels ask of a block of threads, on a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>

#include "half.h"

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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // A barrier after which products may read what was written to shared memory before.
  __device__ void sync_for_products() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }
  __device__ void start_products() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ void commit_products() const { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // Sums of products are not to be touched before.
  template <int kCount>
  __device__ void wait_for_products(float (&c)[kCount][40]) const {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int n = 0; n < kCount; ++n)
      for (int k = 0; k < 40; ++k) asm volatile("" : "+f"(c[n][k])::"memory");
  }
  // c += a [64, 16] b [80, 16]^T, in a group of four warps, without waiting. Warp w % 4 has rows 16 w and on; of a
  // piece of 16 rows and 8 columns a lane has four numbers: rows lane / 4 and 8 below, columns 2 (lane % 4) and the next.
  template <bool kTransposed>
  __device__ void multiply_add(float (&c)[40], const Operand& a, const Operand& b) const {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %42, 0; wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
        "%10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
        "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
        "}, %40, %41, add, 1, 1, %43, 0;}"
        :
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),
          "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
          "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),
          "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]),
          "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39])
        : "l"(descriptor(a)), "l"(descriptor(b)), "r"(1), "n"(int(kTransposed)));
  }

 private:
  static __device__ uint64_t descriptor(const Operand& x) {
    const uint64_t at = (__cvta_generic_to_shared(x.at) >> 4) & 0x3fff;
    return at | uint64_t(x.along_columns >> 4) << 16 | uint64_t(x.along_rows >> 4) << 32;
  }
#else
  __device__ void sync_for_products() const { __syncthreads(); }
  __device__ void start_products() const {}
  __device__ void commit_products() const {}
  template <int kCount>
  __device__ void wait_for_products(float (&)[kCount][40]) const {}

  template <bool kTransposed>
  __device__ void multiply_add(float (&c)[40], const Operand& a, const Operand& b) const {
    const int lane = threadIdx.x % 32, tile = lane / 8, row = lane % 8 * 16;
    uint32_t left[4], right[4];
    const char* own = reinterpret_cast<const char*>(a.at) + threadIdx.x / 32 % 4 * 2 * a.along_rows;
    load_tiles<kTransposed>(left, own + tile % 2 * a.along_rows + tile / 2 * a.along_columns + row);
    for (int n = 0; n < 10; n += 2) {
      load_tiles<false>(right, reinterpret_cast<const char*>(b.at) + (n + tile / 2) * b.along_rows + tile % 2 * b.along_columns + row);
      multiply_add_tiles(&c[4 * n], left, right[0], right[1]);
      multiply_add_tiles(&c[4 * n + 4], left, right[2], right[3]);
    }
  }

 private:
  // Four tiles of 8 rows of 8 numbers, lane 8 n + k giving where row k of tile n begins. The lane has numbers
  // 2 (lane % 4) and the next of row lane / 4 of each tile; transposed, of column lane / 4.
  template <bool kTransposed>
  static __device__ void load_tiles(uint32_t (&tiles)[4], const char* row) {
    const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
    if constexpr (kTransposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3]) : "r"(from) : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3]) : "r"(from) : "memory");
  }

  static __device__ void multiply_add_tiles(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
};

}  // namespace forde_fast
