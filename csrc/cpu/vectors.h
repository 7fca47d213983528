// The compiler's own vectors of kBytes bytes, a width that the file which includes this one defines beforehand along
// with the instruction set; and how numbers of the input types come into them and go out again.

template <class T>
using Vector __attribute__((vector_size(kBytes))) = T;
template <class T>
using Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)))) = T;
template <class T>
constexpr int64_t kWidth = kBytes / sizeof(T);

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <class T>
inline void narrow(T x, float* y) { *y = float(x); }
inline void narrow(double x, double* y) { *y = x; }
template <class T>
inline void narrow(T wide, bfloat16* y) {  // round to nearest even; NaN stays NaN
  const float x = float(wide);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// kWidth<T> numbers of the input type.
template <class T, class In>
inline Vector<T> get(const In* from) {
  if constexpr (std::is_same_v<In, T>) {
    return *reinterpret_cast<const Unaligned<T>*>(from);
  } else {  // written so that the compiler makes vector instructions of it
    T lanes[kWidth<T>];
    for (int64_t k = 0; k < kWidth<T>; ++k) lanes[k] = widen(from[k]);
    Vector<T> v;
    std::memcpy(&v, lanes, sizeof v);
    return v;
  }
}

template <class T, class In>
inline void put(Vector<T> v, In* to) {
  if constexpr (std::is_same_v<In, T>) {
    *reinterpret_cast<Unaligned<T>*>(to) = v;
  } else {
    for (int64_t k = 0; k < kWidth<T>; ++k) narrow(v[k], to + k);
  }
}

// The first `count` numbers of a vector; the others are 0 or lost.
template <class T, class In>
inline Vector<T> get_some(const In* from, int64_t count) {
  T lanes[kWidth<T>] = {};
  for (int64_t k = 0; k < count; ++k) lanes[k] = widen(from[k]);
  Vector<T> v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
}

template <class T, class In>
inline void put_some(Vector<T> v, In* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) narrow(v[k], to + k);
}

template <class T>
using Part __attribute__((vector_size(16))) = T;

// Half by half, down to a part in a register that every processor has.
template <class T>
inline double sum(Vector<T> v) {
  Part<T> parts[kBytes / 16];
  std::memcpy(parts, &v, sizeof v);
#pragma GCC unroll 2
  for (int64_t width = kBytes / 32; width > 0; width /= 2)
#pragma GCC unroll 2
    for (int64_t k = 0; k < width; ++k) parts[k] += parts[k + width];
  const Part<T> last = parts[0];
  if constexpr (sizeof(T) == 8) return last[0] + last[1];
  else return (last[0] + last[2]) + (last[1] + last[3]);
}

// The division by a number. With multiply-adds, by its reciprocal in two parts: equal numbers have the quotient 1 exactly,
// so that in one dimension the distance between two rows is exactly 0.
template <class T>
struct Divisor {
  T number, high, low;

  explicit Divisor(double x) : number(T(x)), high(T(1 / (long double)(x))), low(T(1 / (long double)(x) - high)) {}
  Vector<T> operator()(Vector<T> p) const {
    if constexpr (!kMultiplyAdds) return p / number;
    return p * high + p * low;
  }
};

// Memory of this thread for `count` vectors, aligned to a cache line; the next call takes it over.
template <class T>
inline Vector<T>* scratch(int64_t count) {
  static thread_local std::vector<char> memory;
  const size_t bytes = size_t(count) * sizeof(Vector<T>) + 64;
  if (memory.size() < bytes) memory.resize(bytes);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<Vector<T>*>((address + 63) & ~uintptr_t(63));
}

// exp(x) for x <= 0, 0 below -708: x = k log 2 + r, the series of exp(r) with |r| < 0.35, and k into the exponent.
inline Vector<double> exponential(Vector<double> x) {
  using Bits __attribute__((vector_size(kBytes))) = int64_t;
  constexpr double kLift = 0x1.8p52;  // a number of this size has no room for a fraction
  const Vector<double> lifted = x * 0x1.71547652b82fep0 + kLift, k = lifted - kLift;
  const Vector<double> r = (x - k * 0x1.62e42fee00000p-1) - k * 0x1.a39ef35793c76p-33;
  Vector<double> series = r * (1.0 / 6227020800) + 1.0 / 479001600;
  for (double term : {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5})
    series = series * r + term;
  series = (series * r) * r + r;  // exp(r) - 1
  const Bits power = ((Bits)lifted + 1023) << 52;
  const Vector<double> result = (Vector<double>)power * series + (Vector<double>)power;
  return x < -708.0 ? Vector<double>{} : result;
}
