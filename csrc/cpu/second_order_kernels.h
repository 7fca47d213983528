// The passes of second_order.h, written once with the compiler's own vectors of kBytes bytes: both are chosen by the
// file that includes this one. A pass is a struct whose `at` works on one vector, or on one number at the ends.
//
// Sums run in the tensors' type over at most kRun numbers of a channel and in double beyond.

template <class T>
using Vector __attribute__((vector_size(kBytes))) = T;
template <class T>
using Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)))) = T;
template <class T>
constexpr int64_t kWidth = kBytes / sizeof(T);

constexpr int64_t kRun = 64;     // numbers that are added to each lane of a sum
constexpr int64_t kMostSums = 3;

template <class X, class T>
inline X load(const T* from) {
  if constexpr (std::is_same_v<X, T>)
    return *from;
  else
    return X(*reinterpret_cast<const Unaligned<T>*>(from));
}

template <class X, class T>
inline void store(X value, T* to) {
  if constexpr (std::is_same_v<X, T>)
    *to = value;
  else
    *reinterpret_cast<Unaligned<T>*>(to) = value;
}

// What the passes share: x normalised, and g with the ReLU's mask, which lets NaN through as torch's does.
template <class T, int64_t Rows>
struct Pass {
  static constexpr int64_t kRows = Rows;
  const Part& p;
  const T *x = as(p.x), *residual = as(p.residual), *z = as(p.z), *g = as(p.g), *u = as(p.u), *u_residual = as(p.u_residual);
  T *out = static_cast<T*>(p.out), *second = static_cast<T*>(p.second);
  const bool relu = p.relu;

  explicit Pass(const Part& p) : p(p) {}
  static const T* as(const void* pointer) { return static_cast<const T*>(pointer); }

  template <class X>
  X normalised(int64_t i, const X* k) const {
    return (load<X>(x + i) - k[0]) * k[1];
  }

  template <class X>
  X masked(X value, X xhat, int64_t i, const X* k) const {
    if (!relu) return value;
    const X before = z ? load<X>(z + i) : xhat * k[2] + k[3];
    return before <= X{} ? X{} : value;
  }
};

template <class T>
struct Moments : Pass<T, 1> {
  using Pass<T, 1>::Pass;
  template <class X>
  void at(int64_t i, const X* k, X* sums) const {
    const X centred = load<X>(this->x + i) - k[0];
    sums[0] += centred;
    sums[1] += centred * centred;
  }
};

template <class T>
struct Forward : Pass<T, kCommon> {
  using Pass<T, kCommon>::Pass;
  template <class X>
  void at(int64_t i, const X* k) const {
    X y = this->normalised(i, k) * k[2] + k[3];
    if (this->residual) y += load<X>(this->residual + i);
    if (this->relu) y = y <= X{} ? X{} : y;
    store(y, this->out + i);
  }
};

template <class T>
struct BackwardSums : Pass<T, kCommon> {
  using Pass<T, kCommon>::Pass;
  template <class X>
  void at(int64_t i, const X* k, X* sums) const {
    const X xhat = this->normalised(i, k), g = this->masked(load<X>(this->g + i), xhat, i, k);
    sums[0] += g;
    sums[1] += g * xhat;
  }
};

template <class T>
struct Backward : Pass<T, kCommon + 3> {
  using Pass<T, kCommon + 3>::Pass;
  template <class X>
  void at(int64_t i, const X* k) const {
    const X xhat = this->normalised(i, k), g = this->masked(load<X>(this->g + i), xhat, i, k);
    store(k[4] + k[5] * xhat + k[6] * g, this->out + i);
    if (this->second) store(g, this->second + i);
  }
};

template <class T>
struct DoubleSums : Pass<T, kCommon> {
  using Pass<T, kCommon>::Pass;
  template <class X>
  void at(int64_t i, const X* k, X* sums) const {
    const X xhat = this->normalised(i, k), u = load<X>(this->u + i);
    const X g = this->masked(load<X>(this->g + i), xhat, i, k);
    sums[0] += u;
    sums[1] += u * xhat;
    sums[2] += u * g;
  }
};

template <class T>
struct DoubleBackward : Pass<T, kCommon + 7> {
  using Pass<T, kCommon + 7>::Pass;
  template <class X>
  void at(int64_t i, const X* k) const {
    const X xhat = this->normalised(i, k), u = load<X>(this->u + i);
    const X g = this->masked(load<X>(this->g + i), xhat, i, k);
    X dg = k[4] + k[5] * xhat + k[6] * u;
    if (this->u_residual) dg += load<X>(this->u_residual + i);
    store(this->masked(dg, xhat, i, k), this->out + i);
    store(k[7] + k[8] * xhat + k[9] * g + k[10] * u, this->second + i);
  }
};

// Coefficients of the channel c, or of the vector of channels from c on.
template <class P, class T, class X>
inline void coefficients(const Part& p, int64_t c, X* k) {
  const T* from = static_cast<const T*>(p.coefficients) + c;
  for (int64_t row = 0; row < P::kRows; ++row) k[row] = load<X>(from + row * p.stride);
}

template <template <class> class P, class T>
void apply(const Part& p) {
  using V = Vector<T>;
  constexpr int64_t W = kWidth<T>;
  const P<T> pass(p);
  if (p.inner == 1) {  // vectors of channels
    for (int64_t n = 0; n < p.outer; ++n) {
      int64_t c = 0;
      V k[P<T>::kRows];
      for (; c + W <= p.channels; c += W) {
        coefficients<P<T>, T>(p, c, k);
        pass.at(n * p.channels + c, k);
      }
      T one[P<T>::kRows];
      for (; c < p.channels; ++c) {
        coefficients<P<T>, T>(p, c, one);
        pass.at(n * p.channels + c, one);
      }
    }
    return;
  }
  for (int64_t n = 0; n < p.outer; ++n)
    for (int64_t c = 0; c < p.channels; ++c) {
      T one[P<T>::kRows];
      V k[P<T>::kRows];
      coefficients<P<T>, T>(p, c, one);
      for (int64_t row = 0; row < P<T>::kRows; ++row) k[row] = one[row] + V{};
      const int64_t begin = (n * p.channels + c) * p.inner;
      int64_t s = 0;
      for (; s + W <= p.inner; s += W) pass.at(begin + s, k);
      for (; s < p.inner; ++s) pass.at(begin + s, one);
    }
}

template <template <class> class P, class T, int64_t Sums>
void sum_rows(const Part& p, double* sums) {  // inner == 1: vectors of channels
  using V = Vector<T>;
  constexpr int64_t W = kWidth<T>;
  static_assert(Sums <= kMostSums);
  const P<T> pass(p);
  std::vector<T> partial(Sums * p.channels);
  for (int64_t first = 0; first < p.outer; first += kRun) {
    std::fill(partial.begin(), partial.end(), T(0));
    for (int64_t n = first; n < std::min(p.outer, first + kRun); ++n) {
      int64_t c = 0;
      for (; c + W <= p.channels; c += W) {
        V k[P<T>::kRows], own[Sums];
        coefficients<P<T>, T>(p, c, k);
        for (int64_t row = 0; row < Sums; ++row) own[row] = load<V>(&partial[row * p.channels + c]);
        pass.at(n * p.channels + c, k, own);
        for (int64_t row = 0; row < Sums; ++row) store(own[row], &partial[row * p.channels + c]);
      }
      for (; c < p.channels; ++c) {
        T k[P<T>::kRows], own[Sums];
        coefficients<P<T>, T>(p, c, k);
        for (int64_t row = 0; row < Sums; ++row) own[row] = partial[row * p.channels + c];
        pass.at(n * p.channels + c, k, own);
        for (int64_t row = 0; row < Sums; ++row) partial[row * p.channels + c] = own[row];
      }
    }
    for (int64_t at = 0; at < Sums * p.channels; ++at) sums[at] += partial[at];
  }
}

template <template <class> class P, class T, int64_t Sums>
void sum_planes(const Part& p, double* sums) {  // vectors of neighbours in a channel
  using V = Vector<T>;
  constexpr int64_t W = kWidth<T>;
  const P<T> pass(p);
  for (int64_t n = 0; n < p.outer; ++n)
    for (int64_t c = 0; c < p.channels; ++c) {
      T one[P<T>::kRows];
      V k[P<T>::kRows];
      coefficients<P<T>, T>(p, c, one);
      for (int64_t row = 0; row < P<T>::kRows; ++row) k[row] = one[row] + V{};
      const int64_t begin = (n * p.channels + c) * p.inner;
      int64_t s = 0;
      while (s < p.inner) {
        V lanes[Sums] = {};
        T rest[Sums] = {};
        const int64_t end = std::min(p.inner, s + kRun * W);
        for (; s + W <= end; s += W) pass.at(begin + s, k, lanes);
        for (; s < end; ++s) pass.at(begin + s, one, rest);
        for (int64_t row = 0; row < Sums; ++row) {
          double total = rest[row];
          for (int64_t lane = 0; lane < W; ++lane) total += lanes[row][lane];
          sums[row * p.channels + c] += total;
        }
      }
    }
}

template <template <class> class P, class T, int64_t Sums>
void sum(const Part& p, double* sums) {
  p.inner == 1 ? sum_rows<P, T, Sums>(p, sums) : sum_planes<P, T, Sums>(p, sums);
}

template <class T>
const Passes& passes_for() {
  static const Passes passes{sum<Moments, T, 2>, apply<Forward, T>,       sum<BackwardSums, T, 2>,
                             apply<Backward, T>, sum<DoubleSums, T, 3>, apply<DoubleBackward, T>};
  return passes;
}

inline const Passes& passes_for(bool wide) { return wide ? passes_for<double>() : passes_for<float>(); }
