// What gradients are made of: mixed_i + sum_j c[i,j] (q_i - q_j). From differences: where rows are close, products of
// rows (gram_kernels.h) would lose what sets them apart.

template <class T, class In>
struct Mixture {
  using V = Vector<T>;
  static constexpr int64_t W = kWidth<T>, kMost = 3;  // rows that share a load of q_j
  template <int64_t kSize>  // so many vectors of each of kSize rows: enough sums to hide the latency of the multiply-add
  static constexpr int64_t kMany = kSize == 1 ? kStep : (kSize == 2 ? 4 : 2) * (kBytes == 64 ? 2 : 1);

  const void* const* mixed;
  const int64_t first, repelling;  // the first row j, and how many there are: none without coefficients
  Tiles<T, In> tiles;
  V* results;  // [kMost, kVectors]
  T* weights;  // [moving, repelling]

  Mixture(const Sample& sample, const void* const* mixed, const double* c)
      : mixed(mixed), first(sample.moving == sample.rows ? 0 : sample.moving), repelling(c ? sample.rows - first : 0),
        tiles(sample, kMost * kVectors + sample.moving * repelling / W + 1), results(tiles.spare()),
        weights(reinterpret_cast<T*>(results + kMost * kVectors)) {
    std::copy(c, c + sample.moving * repelling, weights);
  }

  // The sums of kMany vectors of each of the rows i .. i + kSize; padding is 0.
  template <int64_t kSize>
  void sum(int64_t i, int64_t v, int64_t count, V (&sums)[kSize][kMany<kSize>]) const {
    for (int64_t a = 0; a < kSize; ++a)
      for (int64_t u = 0; u < kMany<kSize>; ++u) sums[a][u] = mixed ? mixed_at(i + a, v + u, count) : V{};
    const V *q_i = tiles.q_row(i) + v, *q_j = tiles.q_row(first) + v;
    const T* c = weights + i * repelling;
    for (int64_t j = 0; j < repelling; ++j, q_j += kVectors)
#pragma GCC unroll 16
      for (int64_t a = 0; a < kSize; ++a)
#pragma GCC unroll 16
        for (int64_t u = 0; u < kMany<kSize>; ++u) sums[a][u] += c[a * repelling + j] * (q_i[a * kVectors + u] - q_j[u]);
  }

  V mixed_at(int64_t i, int64_t v, int64_t count) const {
    const T* from = static_cast<const T*>(mixed[i]) + tiles.begin + v * W;
    const int64_t left = count - v * W;
    return left >= W ? get<T>(from) : get_some<T>(from, std::max<int64_t>(left, 0));
  }
};

// (sum - t s_i) / norm_i of the rows i .. i + kSize over a tile, in the memory that is spare.
template <int64_t kSize, class T, class In>
void finish(const Mixture<T, In>& mixture, int64_t i, int64_t count, const double* t, Vector<T>* to) {
  constexpr int64_t kMany = Mixture<T, In>::template kMany<kSize>;
  const Vector<T>* s = mixture.tiles.s_row(i);
  T along[kSize], reciprocal[kSize];
  for (int64_t a = 0; a < kSize; ++a) along[a] = T(t[i + a]), reciprocal[a] = T(1 / mixture.tiles.sample.norm[i + a]);
  for (int64_t v = 0; v < mixture.tiles.used; v += kMany) {
    Vector<T> sums[kSize][kMany];
    mixture.sum(i, v, count, sums);
#pragma GCC unroll 16
    for (int64_t a = 0; a < kSize; ++a)
#pragma GCC unroll 16
      for (int64_t u = 0; u < kMany; ++u)
        to[a * kVectors + v + u] = (sums[a][u] - along[a] * s[a * kVectors + v + u]) * reciprocal[a];
  }
}

template <class T, class In>
void combine(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, const double* t,
             void* const* out) {
  Mixture<T, In> mixture(sample, mixed, c);
  for (int64_t at = begin; at < end; at += mixture.tiles.columns()) {
    const int64_t count = std::min(mixture.tiles.columns(), end - at);
    mixture.tiles.load(at, count);
    in_blocks<Mixture<T, In>::kMost>(0, sample.moving, [&](auto size, int64_t i) {
      finish<size, T, In>(mixture, i, count, t, mixture.results);
      for (int64_t a = 0; a < size; ++a) store<T>(mixture.results + a * kVectors, count, static_cast<In*>(out[i + a]) + at);
    });
  }
}

template <class T, class In>
void along(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, double* t) {
  for (int64_t n = 0; !c && n < sample.moving; ++n)
    t[n] += dot<T>(static_cast<const In*>(sample.values[n]), static_cast<const T*>(mixed[n]), begin, end) / sample.norm[n];
  if (!c) return;
  Mixture<T, In> mixture(sample, mixed, c);
  const Tiles<T, In>& tiles = mixture.tiles;
  for (int64_t at = begin; at < end; at += tiles.columns()) {
    const int64_t count = std::min(tiles.columns(), end - at);
    mixture.tiles.load(at, count);
    in_blocks<Mixture<T, In>::kMost>(0, sample.moving, [&](auto size, int64_t i) {
      constexpr int64_t kMany = Mixture<T, In>::template kMany<size>;
      Vector<T> totals[size] = {};
      for (int64_t v = 0; v < tiles.used; v += kMany) {
        Vector<T> sums[size][kMany];
        mixture.sum(i, v, count, sums);
        for (int64_t a = 0; a < size; ++a)
          for (int64_t u = 0; u < kMany; ++u) totals[a] += sums[a][u] * tiles.s_row(i + a)[v + u];
      }
      for (int64_t a = 0; a < size; ++a) t[i + a] += sum<T>(totals[a]);
    });
  }
}
