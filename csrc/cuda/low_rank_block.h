// What low_rank_kernel.h asks of a block of threads beyond device_block.h: parts of a block that wait for each other,
// copies that no thread waits at, products by Hopper's matrix units.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device_block.h"
#include "half.h"

namespace forde_fast {

struct LowRankBlock : DeviceBlock {
  const CUtensorMap& rows;  // [D, M, G], in tiles of [kColumns, kLowRankMembers, kGroup]

  __device__ explicit LowRankBlock(const CUtensorMap& rows) : rows(rows) {}

  // Of all threads, wherever in the code they are.
  __device__ void sync() const { asm volatile("barrier.sync 0;" ::: "memory"); }
  static __device__ uint32_t in_shared(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
  // Barriers 1 to 15 are for so many threads, of which some only arrive and go on.
  __device__ void sync(int barrier, int threads) const { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
  __device__ void arrive(int barrier, int threads) const { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
  // x, which the compiler does not know.
  __device__ int anew(int x) const {
    asm volatile("" : "+r"(x));
    return x;
  }
  template <class T>
  __device__ T from_lane(T x, int lane) const {
    return __shfl_sync(0xffffffffu, x, lane);
  }

  // Copies to shared memory that no thread waits at: one asks for them and says how many bytes an arrival is to expect;
  // who waits, waits for one in every two of its phases.
  __device__ void init(Arrival* arrival) const { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(in_shared(arrival)) : "memory"); }
  __device__ void expect(Arrival* arrival, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(arrival)), "r"(bytes) : "memory");
  }
  __device__ void wait(Arrival* arrival, int phase) const {
    asm volatile(
        "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra arrived; bra again; arrived:}"
        ::"r"(in_shared(arrival)), "r"(phase) : "memory");
  }
  __device__ void copy(void* shared, const void* global, int bytes, Arrival* arrival) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(in_shared(shared)), "l"(global), "r"(bytes), "r"(in_shared(arrival)) : "memory");
  }
  // What describes `rows`, before a copy waits for it.
  __device__ void prefetch_rows() const { asm volatile("prefetch.tensormap [%0];" ::"l"(&rows)); }
  // The tile of `rows` from this column and sample on; zeros where there is nothing.
  __device__ void copy_rows(float* shared, int column, int sample, Arrival* arrival) const {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, 0, %4}], [%2];"
                 ::"r"(in_shared(shared)), "l"(&rows), "r"(in_shared(arrival)), "r"(column), "r"(sample) : "memory");
  }
  // What was written to shared memory may be read by products, and read or overwritten by copies, behind the next barrier.
  __device__ void fence() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  // Copies asked for behind this read what others have written to global memory before a barrier.
  __device__ void fence_of_global() const { asm volatile("fence.proxy.async.global;" ::: "memory"); }

  // So many registers for each thread of four warps from here on, more than they were launched with or fewer.
  template <int kCount>
  __device__ void take_registers() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
  }
  template <int kCount>
  __device__ void leave_registers() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
  }

  __device__ void start_products() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ void commit_products() const { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // For all products but the last kPending groups.
  template <int kPending>
  __device__ void wait_for_products_but() const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  }
  // And these are of none of the last: sums of products are not to be touched before.
  template <int kPending = 0>
  __device__ void wait_for_products(float (&c)[40]) const {
    wait_for_products_but<kPending>();
    for (int k = 0; k < 40; ++k) asm volatile("" : "+f"(c[k])::"memory");
  }
  // x, which is the same in all lanes, for the compiler to know it: a product follows two instructions after another, not
  // eleven, when descriptors are found in the registers of a warp.
  __device__ Operand uniform(const Operand& x) const {
    return {reinterpret_cast<const Half*>(__shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(x.at), 0)), x.along_rows, x.along_columns, x.offset};
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
    const uint32_t low = (in_shared(x.at) >> 4) + (uint32_t(x.along_columns) >> 4 << 16) + (x.offset >> 4);
    return low | uint64_t(x.along_rows >> 4) << 32;
  }
};

}  // namespace forde_fast
