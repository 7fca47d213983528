// The instruction sets that the kernels are compiled for, and the one in use.
#pragma once

namespace forde_fast {

enum class Capability { kPortable, kAvx2, kAvx512 };

inline const char* name_of(Capability which) {
  const char* names[] = {"portable", "avx2", "avx512"};
  return names[int(which)];
}

inline bool runs_here(Capability which) {
#if defined(__x86_64__)
  if (which == Capability::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw");
  if (which == Capability::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return which == Capability::kPortable;
}

// The widest that runs here, until a test chooses another.
inline Capability& capability() {
  static Capability chosen = runs_here(Capability::kAvx512) ? Capability::kAvx512
                             : runs_here(Capability::kAvx2) ? Capability::kAvx2
                                                            : Capability::kPortable;
  return chosen;
}

}  // namespace forde_fast
