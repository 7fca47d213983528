// What gradients are made of, a row at a time: mixed_i + sum_j c[i,j] (q_i - q_j).

template <class T, class In, bool kMixed, int64_t kVectors>
struct Mixture {
  using V = Vector<T>;
  static constexpr int64_t W = kWidth<T>, kUnroll = 4;  // vectors that share a coefficient

  const void* const* mixed;
  const int64_t first, repelling;  // the first row j, and how many there are: none without coefficients
  Tiles<T, In, kVectors> tiles;
  T* weights;  // [moving, repelling]

  Mixture(const Sample& sample, const void* const* mixed, const double* c)
      : mixed(mixed), first(sample.moving == sample.rows ? 0 : sample.moving), repelling(c ? sample.rows - first : 0),
        tiles(sample, sample.moving * repelling / W + 1), weights(reinterpret_cast<T*>(tiles.spare())) {
    std::copy(c, c + sample.moving * repelling, weights);
  }

  // f(k, sum) for kUnroll vectors of row i at a time, k columns after the tile's first. Each sum is added up in two
  // parts, which hides the latency of the multiply-add; padding is 0.
  template <class F>
  void each(int64_t i, int64_t count, const F& f) const {
    const T* c = weights + i * repelling;
    const T* start = kMixed ? static_cast<const T*>(mixed[i]) + tiles.begin : nullptr;
    for (int64_t v = 0; v < tiles.used; v += kUnroll) {
      V even[kUnroll], odd[kUnroll] = {}, own[kUnroll];
      const V *q_i = tiles.q_row(i) + v, *q_j = tiles.q_row(first) + v;
      const bool whole = (v + kUnroll) * W <= count;
      for (int64_t u = 0; u < kUnroll; ++u) {
        own[u] = q_i[u];
        if constexpr (!kMixed)
          even[u] = V{};
        else if (whole)
          even[u] = get<T>(start + (v + u) * W);
        else
          even[u] = get_some<T>(start + (v + u) * W, std::clamp<int64_t>(count - (v + u) * W, 0, W));
      }
      int64_t j = 0;
      for (; j + 2 <= repelling; j += 2, q_j += 2 * kVectors)
        for (int64_t u = 0; u < kUnroll; ++u) {
          even[u] += c[j] * (own[u] - q_j[u]);
          odd[u] += c[j + 1] * (own[u] - q_j[kVectors + u]);
        }
      if (j < repelling)
        for (int64_t u = 0; u < kUnroll; ++u) even[u] += c[j] * (own[u] - q_j[u]);
      for (int64_t u = 0; u < kUnroll; ++u) even[u] += odd[u];
      f(v, even);
    }
  }
};

// out = (sum - along s_i) reciprocal of row i over a tile; the last vectors may be in part.
template <bool kPast, class T, class In, bool kMixed, int64_t kVectors>
void combine_row(const Mixture<T, In, kMixed, kVectors>& mixture, int64_t i, int64_t count, T along, T reciprocal, In* out) {
  using M = Mixture<T, In, kMixed, kVectors>;
  constexpr int64_t W = kWidth<T>;
  const Vector<T>* s = mixture.tiles.s_row(i);
  mixture.each(i, count, [&](int64_t v, const Vector<T>(&sum)[M::kUnroll]) {
    if ((v + M::kUnroll) * W <= count)
      for (int64_t u = 0; u < M::kUnroll; ++u) put<kPast, T>((sum[u] - along * s[v + u]) * reciprocal, out + (v + u) * W);
    else
      for (int64_t u = 0; u < M::kUnroll; ++u)
        put_some<T>((sum[u] - along * s[v + u]) * reciprocal, out + (v + u) * W, std::clamp<int64_t>(count - (v + u) * W, 0, W));
  });
}

template <class T, class In, bool kMixed, int64_t kVectors>
void combine(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, const double* t,
             void* const* out, bool past_caches) {
  Mixture<T, In, kMixed, kVectors> mixture(sample, mixed, c);
  for (int64_t at = begin; at < end; at += mixture.tiles.columns()) {
    const int64_t count = std::min(mixture.tiles.columns(), end - at);
    mixture.tiles.load(at, count);
    for (int64_t i = 0; i < sample.moving; ++i) {
      mixture.tiles.prefetch(i, i + 1);
      In* to = static_cast<In*>(out[i]) + at;
      const T along = T(t[i]), reciprocal = T(1 / sample.norm[i]);
      past_caches && reinterpret_cast<uintptr_t>(to) % kBytes == 0
          ? combine_row<true>(mixture, i, count, along, reciprocal, to)
          : combine_row<false>(mixture, i, count, along, reciprocal, to);
    }
  }
  if (past_caches) finish_stores();
}

template <class T, class In>
void combine(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, const double* t,
             void* const* out, bool past_caches) {
  const auto by = [&](auto is_mixed, auto vectors) {
    combine<T, In, decltype(is_mixed)::value, decltype(vectors)::value>(sample, begin, end, mixed, c, t, out, past_caches);
  };
  using Wide = std::integral_constant<int64_t, kMostVectors>;
  using Slim = std::integral_constant<int64_t, kStep>;
  if (sample.rows <= kFewRows)
    mixed ? by(std::true_type(), Wide()) : by(std::false_type(), Wide());
  else
    mixed ? by(std::true_type(), Slim()) : by(std::false_type(), Slim());
}

template <class T, class In>
void along(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* c, double* t) {
  using M = Mixture<T, In, true, kMostVectors>;
  M mixture(sample, mixed, c);
  for (int64_t at = begin; at < end; at += mixture.tiles.columns()) {
    const int64_t count = std::min(mixture.tiles.columns(), end - at);
    mixture.tiles.load(at, count);
    for (int64_t i = 0; i < sample.moving; ++i) {
      Vector<T> total[M::kUnroll] = {};
      const Vector<T>* s = mixture.tiles.s_row(i);
      mixture.each(i, count, [&](int64_t v, const Vector<T>(&sum)[M::kUnroll]) {
        for (int64_t u = 0; u < M::kUnroll; ++u) total[u] += sum[u] * s[v + u];
      });
      for (int64_t u = 1; u < M::kUnroll; ++u) total[0] += total[u];
      t[i] += forde_fast::sum<T>(total[0]);
    }
  }
}

inline void exponentials(double* x, int64_t count) {
  constexpr int64_t W = kWidth<double>;
  int64_t k = 0;
  for (; k + W <= count; k += W) put<false, double>(exponential(get<double>(x + k)), x + k);
  if (k < count) put_some<double>(exponential(get_some<double>(x + k, count - k)), x + k, count - k);
}

template <class T, class In>
constexpr Kernels kKernels = {squares<T, In>, contrasts<T, In>, pairs<T, In>, combine<T, In>, along<T, In>, exponentials};

inline const Kernels& kernels_for(Input input, bool wide) {
  switch (input) {
    case Input::kFloat32: return wide ? kKernels<double, float> : kKernels<float, float>;
    case Input::kBFloat16: return wide ? kKernels<double, bfloat16> : kKernels<float, bfloat16>;
    default: return kKernels<double, double>;
  }
}
