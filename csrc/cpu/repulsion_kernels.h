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

// Asks for the next tile of a row while this one is worked on: the hardware loses its track at every change of row.
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

  void load(int64_t begin, int64_t count) {
    used = (count + 8 * kWidth<T> - 1) / (8 * kWidth<T>) * 8;
    load_s(begin, count);
    if (sample.product) load_q(begin, count);
  }

  void load_s(int64_t begin, int64_t count) {
    for (int64_t n = 0; n < sample.rows; ++n) {
      prefetch_tile(static_cast<const In*>(sample.values[n]) + begin + kTile);
      fill(static_cast<const In*>(sample.values[n]) + begin, sample.norm[n], count, used * kWidth<T>,
           reinterpret_cast<T*>(s_row(n)));
    }
  }

  // The contrasts' product gives q_n for n > 0; q_0 = sum_n q_n / (sqrt(N) - 1) has the same shared vector taken away.
  void load_q(int64_t begin, int64_t count) {
    T* first = reinterpret_cast<T*>(q_row(0));
    const int64_t padded = used * kWidth<T>;
    std::fill(first, first + padded, T(0));
    for (int64_t n = 1; n < sample.rows; ++n) {
      T* row = reinterpret_cast<T*>(q_row(n));
      const T* product = static_cast<const T*>(sample.product[n - 1]) + begin;
      prefetch_tile(product + kTile);
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

// total[p] += (q_i - q_{j+p}) (s_i - s_{j+p}) over one tile; eight sums run at a time, which hides the latency of
// the multiply-add.
template <class In, int64_t kPairs>
inline void pair_tile(const Tiles<In>& tiles, int64_t i, int64_t j, Vector<Acc<In>>* total) {
  using V = Vector<Acc<In>>;
  constexpr int64_t kVectors = Tiles<In>::kVectors, kUnroll = 8 / kPairs;
  const V *s_i = tiles.s_row(i), *q_i = tiles.q_row(i), *s_j = tiles.s_row(j), *q_j = tiles.q_row(j);
  V sums[kUnroll][kPairs] = {};
  if (tiles.q == tiles.s) {
    for (int64_t v = 0; v < tiles.used; v += kUnroll)
      for (int64_t u = 0; u < kUnroll; ++u)
        for (int64_t p = 0; p < kPairs; ++p) {
          const V ds = s_i[v + u] - s_j[p * kVectors + v + u];
          sums[u][p] += ds * ds;
        }
  } else {
    for (int64_t v = 0; v < tiles.used; v += kUnroll)
      for (int64_t u = 0; u < kUnroll; ++u)
        for (int64_t p = 0; p < kPairs; ++p) {
          const int64_t at = p * kVectors + v + u;
          sums[u][p] += (q_i[v + u] - q_j[at]) * (s_i[v + u] - s_j[at]);
        }
  }
  for (int64_t u = 0; u < kUnroll; ++u)
    for (int64_t p = 0; p < kPairs; ++p) total[p] += sums[u][p];
}

// total += (q_n - q_0) (s_n + s_0) over one tile: the growth of s^T C s from row 0 to row n. It is 0 without a product but
// for rounding, and that is wanted: the projection then removes what the rounding of the norms put along the rows.
template <class In>
inline void growth_tile(const Tiles<In>& tiles, int64_t n, Vector<Acc<In>>* total) {
  using V = Vector<Acc<In>>;
  const V *s_n = tiles.s_row(n), *q_n = tiles.q_row(n), *s_0 = tiles.s_row(0), *q_0 = tiles.q_row(0);
  V sums[4] = {};
  for (int64_t v = 0; v < tiles.used; v += 4)
    for (int64_t u = 0; u < 4; ++u) sums[u] += (q_n[v + u] - q_0[v + u]) * (s_n[v + u] + s_0[v + u]);
  *total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
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
      for (int64_t n = 1; n < sample.rows; ++n) growth_tile<In>(tiles, n, sums + count + n);
      for (int64_t i = 0; i < sample.moving; ++i) {
        int64_t j = among ? i + 1 : first;
        V* row = sums + i * repelling - first;
        for (; j + 4 <= sample.rows; j += 4) pair_tile<In, 4>(tiles, i, j, row + j);
        for (; j + 2 <= sample.rows; j += 2) pair_tile<In, 2>(tiles, i, j, row + j);
        for (; j < sample.rows; ++j) pair_tile<In, 1>(tiles, i, j, row + j);
      }
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
  static constexpr int64_t kVectors = Tiles<In>::kVectors, kUnroll = kBytes == 64 ? 8 : 4;  // they share a coefficient

  const void* const* mixed;
  const int64_t first, repelling;  // the first row j, and how many there are: none without coefficients
  Tiles<In> tiles;
  V* row;      // [kVectors], of mixed, or a result on its way out
  T* weights;  // [moving, repelling]

  Mixture(const Sample& sample, const void* const* mixed, const double* c)
      : mixed(mixed), first(sample.moving == sample.rows ? 0 : sample.moving), repelling(c ? sample.rows - first : 0),
        tiles(sample, kVectors + sample.moving * repelling / kWidth<T> + 1), row(tiles.spare()),
        weights(reinterpret_cast<T*>(row + kVectors)) {
    std::copy(c, c + sample.moving * repelling, weights);
  }

  void load(int64_t i, int64_t at, int64_t count) {
    if (!mixed) return;
    const T* from = static_cast<const T*>(mixed[i]) + at;
    T* to = std::copy(from, from + count, reinterpret_cast<T*>(row));
    std::fill(to, reinterpret_cast<T*>(row + kVectors), T(0));
  }

  // of row i, vectors v to v + kUnroll
  void at(int64_t i, int64_t v, V* sum) const {
    const V *q_i = tiles.q_row(i), *q_j = tiles.q_row(first) + v;
    const T* c = weights + i * repelling;
    V odd[kUnroll] = {}, own[kUnroll];  // two chains of multiply-adds, to hide their latency
    for (int64_t u = 0; u < kUnroll; ++u) own[u] = q_i[v + u], sum[u] = mixed ? row[v + u] : V{};
    int64_t j = 0;
    for (; j + 2 <= repelling; j += 2, q_j += 2 * kVectors)
      for (int64_t u = 0; u < kUnroll; ++u) {
        sum[u] += c[j] * (own[u] - q_j[u]);
        odd[u] += c[j + 1] * (own[u] - q_j[kVectors + u]);
      }
    if (j < repelling)
      for (int64_t u = 0; u < kUnroll; ++u) sum[u] += c[j] * (own[u] - q_j[u]);
    for (int64_t u = 0; u < kUnroll; ++u) sum[u] += odd[u];
  }
};

template <class In>
void combine(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, const double* t,
             void* const* out, bool past_caches) {
  using T = Acc<In>;
  using M = Mixture<In>;
  M mixture(sample, mixed, c);
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min(kTile, end - at);
    mixture.tiles.load(at, count);
    for (int64_t i = 0; i < sample.moving; ++i) {
      mixture.load(i, at, count);
      In* row = static_cast<In*>(out[i]) + at;
      const bool direct = std::is_same_v<In, T> && count == kTile;
      auto* to = reinterpret_cast<Unaligned<T>*>(direct ? static_cast<void*>(row) : mixture.row);
      const bool past = past_caches && direct && reinterpret_cast<uintptr_t>(row) % kBytes == 0;
      const T along = T(t[i]), reciprocal = T(1 / sample.norm[i]);
      const auto* s_i = mixture.tiles.s_row(i);
      for (int64_t v = 0; v < mixture.tiles.used; v += M::kUnroll) {
        Vector<T> sum[M::kUnroll];
        mixture.at(i, v, sum);
        for (int64_t u = 0; u < M::kUnroll; ++u) store<T>((sum[u] - along * s_i[v + u]) * reciprocal, to + v + u, past);
      }
      if (direct) continue;
      const T* from = reinterpret_cast<const T*>(mixture.row);
      for (int64_t k = 0; k < count; ++k) narrow(from[k], row + k);
    }
  }
  if (past_caches) finish_stores();
}

template <class In>
void along(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, double* t) {
  using T = Acc<In>;
  using M = Mixture<In>;
  M mixture(sample, mixed, c);
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min(kTile, end - at);
    mixture.tiles.load(at, count);
    for (int64_t i = 0; i < sample.moving; ++i) {
      mixture.load(i, at, count);
      const auto* s_i = mixture.tiles.s_row(i);
      Vector<T> total[M::kUnroll] = {}, sum[M::kUnroll];
      for (int64_t v = 0; v < mixture.tiles.used; v += M::kUnroll) {
        mixture.at(i, v, sum);
        for (int64_t u = 0; u < M::kUnroll; ++u) total[u] += sum[u] * s_i[v + u];
      }
      for (int64_t u = 1; u < M::kUnroll; ++u) total[0] += total[u];
      t[i] += forde_fast::sum<T>(total[0]);
    }
  }
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
