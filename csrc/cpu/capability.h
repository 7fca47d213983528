// The widest instruction set of this machine that the kernels are compiled for.
#pragma once

namespace forde_fast {

enum class Capability { kPortable, kAvx2, kAvx512 };

inline Capability capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Capability::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::kAvx2;
#endif
  return Capability::kPortable;
}

}  // namespace forde_fast
