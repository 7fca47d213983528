// The kernels of repulsion.h, written once with the compiler's own vectors. Each file that includes this one
// chooses an instruction set and a width for them.
//
// A tile of kTile columns of every row is brought to the computing type in scratch memory that stays in the first
// levels of cache; padding columns are zero and add nothing to any sum. Sums run in vectors over a tile and in
// double over tiles, so their error does not grow with D.

// kBytes, the width of a vector, is defined by the file that includes this one.
template <class T>
using Vector __attribute__((vector_size(kBytes))) = T;
template <class T>
using Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)))) = T;

constexpr int64_t kTile = 8 * kBytes;  // columns that are worked on at a time
constexpr int64_t kRun = 4096;         // columns whose sums stay in vectors of the computing type; whole tiles

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

inline void narrow(float x, float* y) { *y = x; }
inline void narrow(double x, double* y) { *y = x; }
inline void narrow(float x, bfloat16* y) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class In>
using Acc = decltype(widen(In{}));

template <class T>
constexpr int64_t kWidth = kBytes / sizeof(T);

template <class T>
inline double sum(Vector<T> v) {
  T lanes[kWidth<T>];
  std::memcpy(lanes, &v, sizeof v);
  for (int64_t width = kWidth<T> / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

// Memory of this thread for `count` vectors, aligned to a cache line; the next call takes it over.
template <class T>
inline Vector<T>* scratch(int64_t count) {
  static thread_local std::vector<char> memory;
  const size_t bytes = size_t(count) * sizeof(Vector<T>) + 64;
  if (memory.size() < bytes) memory.resize(bytes);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<Vector<T>*>((address + 63) & ~uintptr_t(63));
}

// tile = values / norm, zero up to `padded`. In double by a division: in one dimension the result is
// exactly 1 or -1, and the distance between two of them exactly 0. In float, for many columns, by the reciprocal.
template <class In>
inline void fill(const In* values, double norm, int64_t count, int64_t padded, Acc<In>* __restrict__ tile) {
  using T = Acc<In>;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t k = 0; k < count; ++k) tile[k] = values[k] / norm;
  } else {
    const T factor = T(1 / norm);
    for (int64_t k = 0; k < count; ++k) tile[k] = widen(values[k]) * factor;
  }
  for (int64_t k = count; k < padded; ++k) tile[k] = 0;
}

// A row of a large result goes past the caches: nothing reads it soon, and its lines need not be fetched first.
template <class T>
inline void store(Vector<T> v, Unaligned<T>* to, bool past_caches) {
  if (past_caches)
    store_past_caches(&v, to);
  else
    *to = v;
}

template <class T>
inline void prefetch_tile(const T* values) {
  for (int64_t k = 0; k < kTile; k += 64 / sizeof(T)) __builtin_prefetch(values + k, 0, 2);
}

template <class In>
struct Tiles {
  using T = Acc<In>;
  using V = Vector<T>;
  static constexpr int64_t kVectors = kTile / kWidth<T>;

  const Sample& sample;
  int64_t begin = 0;  // the first column
  int64_t used = 0;  // vectors of each row that are in use, a multiple of 8: fewer than kVectors at the end of the columns
  V* s;              // [N, kVectors]
  V* q;              // the same memory as s where C is the identity

  explicit Tiles(const Sample& sample, int64_t spare = 0) : sample(sample) {
    s = scratch<T>(sample.rows * kVectors * (sample.product ? 2 : 1) + spare);
    q = sample.product ? s + sample.rows * kVectors : s;
  }

  V* spare() const { return q + sample.rows * kVectors; }

  V* s_row(int64_t n) const { return s + n * kVectors; }
  V* q_row(int64_t n) const { return q + n * kVectors; }

  void load(int64_t from, int64_t count) {
    begin = from;
    used = (count + 8 * kWidth<T> - 1) / (8 * kWidth<T>) * 8;
    load_s(count);
    if (sample.product) load_q(count);
  }

  void load_s(int64_t count) {
    for (int64_t n = 0; n < sample.rows; ++n) {
      fill(static_cast<const In*>(sample.values[n]) + begin, sample.norm[n], count, used * kWidth<T>,
           reinterpret_cast<T*>(s_row(n)));
    }
  }

  // Asks for what is read next of some rows while this tile is worked on: the next sample's tile where there is one (this
  // sample's own next tile is near already), else the next tile. A few rows at a time, between the work, as requests wait
  // for one another.
  void prefetch(int64_t from, int64_t to) const {
    for (int64_t n = from; n < std::min(to, sample.rows); ++n) {
      prefetch_tile(sample.ahead ? static_cast<const In*>(sample.ahead[n]) + begin : static_cast<const In*>(sample.values[n]) + begin + kTile);
      if (sample.product && n > 0) prefetch_tile(static_cast<const T*>(sample.product[n - 1]) + begin + kTile);
    }
  }

  // The contrasts' product gives q_n for n > 0; q_0 = sum_n q_n / (sqrt(N) - 1) has the same shared vector taken away.
  void load_q(int64_t count) {
    T* first = reinterpret_cast<T*>(q_row(0));
    const int64_t padded = used * kWidth<T>;
    std::fill(first, first + padded, T(0));
    for (int64_t n = 1; n < sample.rows; ++n) {
      T* row = reinterpret_cast<T*>(q_row(n));
      const T* product = static_cast<const T*>(sample.product[n - 1]) + begin;
      std::copy(product, product + count, row);
      std::fill(row + count, row + padded, T(0));
      for (int64_t k = 0; k < padded; ++k) first[k] += row[k];
    }
    T scale = T(1 / (std::sqrt(double(sample.rows)) - 1));
    for (int64_t k = 0; k < padded; ++k) first[k] *= scale;
  }
};

template <class In>
void squares(const Sample& sample, int64_t begin, int64_t end, double* out) {
  using T = Acc<In>;
  constexpr int64_t kLanes = 4 * kWidth<T>;  // four chains hide the latency of the addition
  for (int64_t n = 0; n < sample.rows; ++n) {
    const In* row = static_cast<const In*>(sample.values[n]);
    for (int64_t at = begin; at < end; at += kRun) {
      const int64_t stop = std::min(at + kRun, end);
      T total[kLanes] = {};
      int64_t k = at;
      for (; k + kLanes <= stop; k += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) total[lane] += widen(row[k + lane]) * widen(row[k + lane]);
      for (; k < stop; ++k) total[0] += widen(row[k]) * widen(row[k]);
      for (T lane : total) out[n] += lane;
    }
  }
}

template <class In>
void contrasts(const Sample& sample, int64_t begin, int64_t end, void* const* out) {
  using T = Acc<In>;
  Tiles<In> tiles(sample);
  const T weight = T(1 / (sample.rows - std::sqrt(double(sample.rows))));
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min(kTile, end - at);
    tiles.load(at, count);
    tiles.prefetch(0, sample.rows);
    T shared[kTile] = {};
    const T* row_0 = reinterpret_cast<const T*>(tiles.s_row(0));
    for (int64_t n = 1; n < sample.rows; ++n) {
      const T* row = reinterpret_cast<const T*>(tiles.s_row(n));
      for (int64_t k = 0; k < count; ++k) shared[k] += row[k] - row_0[k];
    }
    for (int64_t k = 0; k < count; ++k) shared[k] *= weight;
    for (int64_t n = 1; n < sample.rows; ++n) {
      const T* row = reinterpret_cast<const T*>(tiles.s_row(n));
      T* z = static_cast<T*>(out[n - 1]) + at;
      for (int64_t k = 0; k < count; ++k) z[k] = (row[k] - row_0[k]) - shared[k];
    }
  }
}

// totals[a * stride + b] += (q_{i+a} - q_{j+b}) (s_{i+a} - s_{j+b}) over one tile: every row that is loaded serves a whole
// block of pairs, and enough sums run at a time to hide the latency of the multiply-add.
template <class In, bool kProduct, int64_t kI, int64_t kJ>
inline void pair_block(const Tiles<In>& tiles, int64_t i, int64_t j, Vector<Acc<In>>* totals, int64_t stride) {
  using V = Vector<Acc<In>>;
  constexpr int64_t kVectors = Tiles<In>::kVectors, kUnroll = kI * kJ == 1 ? 8 : kI * kJ == 2 ? 4 : kI * kJ <= 4 ? 2 : 1;
  const V *s_i = tiles.s_row(i), *s_j = tiles.s_row(j), *q_i = tiles.q_row(i), *q_j = tiles.q_row(j);
  V sums[kUnroll][kI][kJ] = {};
  for (int64_t v = 0; v < tiles.used; v += kUnroll)
    for (int64_t u = 0; u < kUnroll; ++u)
      for (int64_t b = 0; b < kJ; ++b)
        for (int64_t a = 0; a < kI; ++a) {
          const int64_t at_i = a * kVectors + v + u, at_j = b * kVectors + v + u;
          const V ds = s_i[at_i] - s_j[at_j];
          if constexpr (kProduct)
            sums[u][a][b] += (q_i[at_i] - q_j[at_j]) * ds;
          else
            sums[u][a][b] += ds * ds;
        }
  for (int64_t u = 0; u < kUnroll; ++u)
    for (int64_t a = 0; a < kI; ++a)
      for (int64_t b = 0; b < kJ; ++b) totals[a * stride + b] += sums[u][a][b];
}

// Calls f with the constant kMost as often as that fits into from .. to, then with what is left.
template <int64_t kMost, class F>
inline void in_blocks(int64_t from, int64_t to, const F& f) {
  for (; from + kMost <= to; from += kMost) f(std::integral_constant<int64_t, kMost>(), from);
  if constexpr (kMost > 1)
    if (from < to) in_blocks<kMost - 1>(from, to, f);
}

// All pairs of one tile, only j > i where the particles repel each other; totals [moving, repelling].
template <class In, bool kProduct>
inline void pair_tile(const Tiles<In>& tiles, bool among, Vector<Acc<In>>* totals) {
  constexpr int64_t kI = kBytes == 64 ? 4 : kProduct ? 2 : 3, kJ = kBytes == 64 ? 4 : 3;  // what the registers hold
  const int64_t moving = tiles.sample.moving, rows = tiles.sample.rows, first = among ? 0 : moving, repelling = rows - first;
  in_blocks<kI>(0, moving, [&](auto size_i, int64_t i) {
    constexpr int64_t kSize = decltype(size_i)::value;
    tiles.prefetch(i, i + kSize);
    auto* own = totals + i * repelling - first;
    for (int64_t a = 0; among && a + 1 < kSize; ++a)
      in_blocks<kI>(i + a + 1, i + kSize, [&](auto size_j, int64_t j) {
        pair_block<In, kProduct, 1, decltype(size_j)::value>(tiles, i + a, j, own + a * repelling + j, repelling);
      });
    in_blocks<kJ>(among ? i + kSize : first, rows, [&](auto size_j, int64_t j) {
      pair_block<In, kProduct, kSize, decltype(size_j)::value>(tiles, i, j, own + j, repelling);
    });
  });
}

// totals[a] += (q_{n+a} - q_0) (s_{n+a} + s_0) over one tile: the growth of s^T C s from row 0. It is 0 without a product
// but for rounding, and that is wanted: the projection then removes what the rounding of the norms put along the rows.
template <class In, int64_t kRows>
inline void growth_block(const Tiles<In>& tiles, int64_t n, Vector<Acc<In>>* totals) {
  using V = Vector<Acc<In>>;
  constexpr int64_t kVectors = Tiles<In>::kVectors, kUnroll = 8 / kRows;
  const V *s_n = tiles.s_row(n), *q_n = tiles.q_row(n), *s_0 = tiles.s_row(0), *q_0 = tiles.q_row(0);
  V sums[kUnroll][kRows] = {};
  for (int64_t v = 0; v < tiles.used; v += kUnroll)
    for (int64_t u = 0; u < kUnroll; ++u)
      for (int64_t a = 0; a < kRows; ++a) {
        const int64_t at = a * kVectors + v + u;
        sums[u][a] += (q_n[at] - q_0[v + u]) * (s_n[at] + s_0[v + u]);
      }
  for (int64_t u = 0; u < kUnroll; ++u)
    for (int64_t a = 0; a < kRows; ++a) totals[a] += sums[u][a];
}

template <class In>
void pairs(const Sample& sample, int64_t begin, int64_t end, double* d, double* growth) {
  using V = Vector<Acc<In>>;
  const bool among = sample.moving == sample.rows;  // the particles repel each other: each pair once
  const int64_t first = among ? 0 : sample.moving, repelling = sample.rows - first, count = sample.moving * repelling;
  Tiles<In> tiles(sample, count + sample.rows);
  V* sums = tiles.spare();  // [moving, repelling], then [rows]
  for (int64_t run = begin; run < end; run += kRun) {
    std::fill(sums, sums + count + sample.rows, V{});
    for (int64_t at = run; at < std::min(run + kRun, end); at += kTile) {
      tiles.load(at, std::min(kTile, end - at));
      for (int64_t n = 1; n + 4 <= sample.rows; n += 4) growth_block<In, 4>(tiles, n, sums + count + n);
      for (int64_t n = sample.rows - (sample.rows - 1) % 4; n < sample.rows; ++n) growth_block<In, 1>(tiles, n, sums + count + n);
      sample.product ? pair_tile<In, true>(tiles, among, sums) : pair_tile<In, false>(tiles, among, sums);
    }
    for (int64_t p = 0; p < count; ++p) d[p] += sum<Acc<In>>(sums[p]);
    for (int64_t n = 0; n < sample.rows; ++n) growth[n] += sum<Acc<In>>(sums[count + n]);
  }
}

// What gradients are made of: mixed_i + sum_j c[i,j] (q_i - q_j), a tile at a time.
template <class In>
struct Mixture {
  using T = Acc<In>;
  using V = Vector<T>;
  static constexpr int64_t kVectors = Tiles<In>::kVectors, kRows = 1, kUnroll = 4;  // done at a time

  const void* const* mixed;
  const int64_t first, repelling;  // the first row j, and how many there are: none without coefficients
  Tiles<In> tiles;
  V* row;      // [kRows, kVectors], of mixed, or results on their way out
  T* weights;  // [moving, repelling]

  Mixture(const Sample& sample, const void* const* mixed, const double* c)
      : mixed(mixed), first(sample.moving == sample.rows ? 0 : sample.moving), repelling(c ? sample.rows - first : 0),
        tiles(sample, kRows * kVectors + sample.moving * repelling / kWidth<T> + 1), row(tiles.spare()),
        weights(reinterpret_cast<T*>(row + kRows * kVectors)) {
    std::copy(c, c + sample.moving * repelling, weights);
  }

  // f(size, i) for blocks of `size` rows, over the columns at .. at + count
  template <class F>
  void each(int64_t at, int64_t count, const F& f) {
    tiles.load(at, count);
    in_blocks<kRows>(0, tiles.sample.moving, [&](auto size, int64_t i) {
      for (int64_t a = 0; mixed && a < size; ++a) {
        const T* from = static_cast<const T*>(mixed[i + a]) + at;
        T* to = std::copy(from, from + count, reinterpret_cast<T*>(row + a * kVectors));
        std::fill(to, reinterpret_cast<T*>(row + (a + 1) * kVectors), T(0));
      }
      tiles.prefetch(i, i + size);
      f(size, i);
    });
  }

  // of rows i .. i + kSize, vectors v .. v + kUnroll; each sum in two parts, which hides the latency of the multiply-add
  template <int64_t kSize>
  void at(int64_t i, int64_t v, V (&sum)[kSize][kUnroll]) const {
    const V *q_i = tiles.q_row(i) + v, *q_j = tiles.q_row(first) + v;
    const T* c = weights + i * repelling;
    V odd[kSize][kUnroll] = {}, own[kSize][kUnroll];
    for (int64_t a = 0; a < kSize; ++a)
      for (int64_t u = 0; u < kUnroll; ++u) {
        own[a][u] = q_i[a * kVectors + u];
        sum[a][u] = mixed ? row[a * kVectors + v + u] : V{};
      }
    const auto add = [&](V(&to)[kSize][kUnroll], int64_t j) {
      for (int64_t u = 0; u < kUnroll; ++u) {
        for (int64_t a = 0; a < kSize; ++a) to[a][u] += c[a * repelling + j] * (own[a][u] - q_j[u]);
      }
      q_j += kVectors;
    };
    int64_t j = 0;
    for (; j + 2 <= repelling; j += 2) add(sum, j), add(odd, j + 1);
    if (j < repelling) add(sum, j);
    for (int64_t a = 0; a < kSize; ++a)
      for (int64_t u = 0; u < kUnroll; ++u) sum[a][u] += odd[a][u];
  }
};

template <class In>
void combine(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, const double* t,
             void* const* out, bool past_caches) {
  using T = Acc<In>;
  using M = Mixture<In>;
  M mixture(sample, mixed, c);
  const auto row = [&](int64_t a) { return mixture.row + a * M::kVectors; };
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min(kTile, end - at);
    const bool direct = std::is_same_v<In, T> && count == kTile;
    mixture.each(at, count, [&](auto size, int64_t i) {
      constexpr int64_t kSize = decltype(size)::value;
      Unaligned<T>* to[kSize];
      T along[kSize], reciprocal[kSize];
      bool past = past_caches && direct;
      for (int64_t a = 0; a < kSize; ++a) {
        In* result = static_cast<In*>(out[i + a]) + at;
        to[a] = reinterpret_cast<Unaligned<T>*>(direct ? static_cast<void*>(result) : row(a));
        along[a] = T(t[i + a]), reciprocal[a] = T(1 / sample.norm[i + a]);
        past = past && reinterpret_cast<uintptr_t>(result) % kBytes == 0;
      }
      for (int64_t v = 0; v < mixture.tiles.used; v += M::kUnroll) {
        Vector<T> sum[kSize][M::kUnroll];
        mixture.at(i, v, sum);
        for (int64_t a = 0; a < kSize; ++a)
          for (int64_t u = 0; u < M::kUnroll; ++u)
            store<T>((sum[a][u] - along[a] * mixture.tiles.s_row(i + a)[v + u]) * reciprocal[a], to[a] + v + u, past);
      }
      for (int64_t a = 0; !direct && a < kSize; ++a) {
        const T* from = reinterpret_cast<const T*>(row(a));
        for (int64_t k = 0; k < count; ++k) narrow(from[k], static_cast<In*>(out[i + a]) + at + k);
      }
    });
  }
  if (past_caches) finish_stores();
}

template <class In>
void along(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, double* t) {
  using M = Mixture<In>;
  M mixture(sample, mixed, c);
  for (int64_t at = begin; at < end; at += kTile)
    mixture.each(at, std::min(kTile, end - at), [&](auto size, int64_t i) {
      constexpr int64_t kSize = decltype(size)::value;
      Vector<Acc<In>> total[kSize][M::kUnroll] = {}, sum[kSize][M::kUnroll];
      for (int64_t v = 0; v < mixture.tiles.used; v += M::kUnroll) {
        mixture.at(i, v, sum);
        for (int64_t a = 0; a < kSize; ++a)
          for (int64_t u = 0; u < M::kUnroll; ++u) total[a][u] += sum[a][u] * mixture.tiles.s_row(i + a)[v + u];
      }
      for (int64_t a = 0; a < kSize; ++a) {
        for (int64_t u = 1; u < M::kUnroll; ++u) total[a][0] += total[a][u];
        t[i + a] += forde_fast::sum<Acc<In>>(total[a][0]);
      }
    });
}

template <class In>
constexpr Kernels kKernels = {squares<In>, contrasts<In>, pairs<In>, combine<In>, along<In>};

inline const Kernels& kernels_for(Input input) {
  switch (input) {
    case Input::kFloat32: return kKernels<float>;
    case Input::kBFloat16: return kKernels<bfloat16>;
    default: return kKernels<double>;
  }
}
