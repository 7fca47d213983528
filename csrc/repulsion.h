// What the C++ backend's kernels are: passes over one sample's rows, a range of columns at a time.
//
// One sample has N rows of D input values: those of the particles that move, then those of the others where these
// are given. s_n = p_n / norm_n are the normalised rows; q_n = s_n C up to a vector that all of them share, as only
// differences of q are used. Sums leave a kernel in double.
#pragma once

#include <cstdint>

namespace forde_fast {

enum class Input { kFloat32, kBFloat16, kFloat64 };  // computed in float, float, double

struct Sample {
  int64_t rows;               // N
  int64_t moving;             // the first of them, which get a gradient
  const void* const* values;  // [N] -> [D] of the input type
  const void* const* product; // [N-1] -> [D] of the computing type: contrasts times C; null: C is the identity
  const double* norm;         // [N], sqrt(|p|^2 + eps), or 1
};

constexpr int64_t kLanes = 16;  // samples whose small numbers are worked on together

struct Kernels {
  // out[n] += sum_k p_n[k]^2
  void (*squares)(const Sample&, int64_t begin, int64_t end, double* out);
  // out[n-1] = e_n - sum_m e_m / (N - sqrt N), e_n = s_n - s_0: orthonormal (Householder) contrasts, from differences
  void (*contrasts)(const Sample&, int64_t begin, int64_t end, void* const* out);
  // d[i,j] += sum_k (q_i - q_j)(s_i - s_j), [moving, repelling], only j > i where the particles repel each other;
  // growth[n] += sum_k (q_n - q_0)(s_n + s_0), that is s_n^T C s_n - s_0^T C s_0, or null
  void (*pairs)(const Sample&, int64_t begin, int64_t end, double* d, double* growth);
  // out[i][k] = (mixed_i[k] + sum_j c[i,j] (q_i - q_j)[k] - t[i] s_i[k]) / norm_i, mixed [moving] -> [D] of the
  // computing type, c [moving, repelling], either null for none
  void (*combine)(const Sample&, int64_t begin, int64_t end, const void* const* mixed, const double* c, const double* t,
                  void* const* out);
  // out[i,j] += sum_k p_i[k] p_j[k], [rows, rows], only j >= i: the rows as they are
  void (*gram)(const Sample&, int64_t begin, int64_t end, double* out);
  // out[i][k] = mixed_i[k] / norm_i + sum_j w[i,j] p_j[k], w [rows, rows]: the rows as they are; else as combine
  void (*mix)(const Sample&, int64_t begin, int64_t end, const void* const* mixed, const double* w, void* const* out);
  // t[i] += sum_k s_i[k] times what combine sums there before it takes t away
  void (*along)(const Sample&, int64_t begin, int64_t end, const void* const* mixed, const double* c, double* t);
  // The first half of rule.h for kLanes samples: d [moving, repelling, kLanes] of the computing type -> bandwidth
  // [repelling, kLanes]; slopes, the kernel values divided by it, 0 where a distance is, as d; sums of the values
  // [moving, kLanes]. False where a distance is not finite.
  bool (*rule)(int64_t moving, int64_t repelling, double log_count, const void* d, double* bandwidth, double* slopes, double* sums);
};

// The same kernels, compiled for several instruction sets; `wide` computes in double whatever the input is.
const Kernels& portable_kernels(Input input, bool wide);
#if defined(__x86_64__)
const Kernels& avx2_kernels(Input input, bool wide);
const Kernels& avx512_kernels(Input input, bool wide);
#endif

}  // namespace forde_fast
