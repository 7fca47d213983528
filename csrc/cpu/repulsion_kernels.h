// The kernels of repulsion.h, written once: in vectors.h with the compiler's own vectors, over the tiles of tiles.h.
// Sums run in vectors over a few tiles and in double beyond, so their error does not grow with D.

template <class T, class A, class B>
double dot(const A* a, const B* b, int64_t begin, int64_t end) {
  constexpr int64_t W = kWidth<T>, kChains = 4;  // four chains hide the latency of the addition
  double total = 0;
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t stop = std::min(at + kRun, end);
    Vector<T> chains[kChains] = {};
    int64_t k = at;
    for (; k + kChains * W <= stop; k += kChains * W)
      for (int64_t u = 0; u < kChains; ++u) chains[u] += get<T>(a + k + u * W) * get<T>(b + k + u * W);
    for (; k < stop; k += W) {
      const int64_t count = std::min(W, stop - k);
      chains[0] += get_some<T>(a + k, count) * get_some<T>(b + k, count);
    }
    total += sum<T>((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }
  return total;
}

template <class T, class In>
void squares(const Sample& sample, int64_t begin, int64_t end, double* out) {
  for (int64_t n = 0; n < sample.rows; ++n) {
    const In* row = static_cast<const In*>(sample.values[n]);
    out[n] += dot<T>(row, row, begin, end);
  }
}

template <class T, class In>
void contrasts(const Sample& sample, int64_t begin, int64_t end, void* const* out) {
  using V = Vector<T>;
  Tiles<T, In> tiles(sample);
  const T weight = T(1 / (sample.rows - std::sqrt(double(sample.rows))));
  for (int64_t at = begin; at < end; at += tiles.columns()) {
    const int64_t count = std::min(tiles.columns(), end - at);
    tiles.load_differences(at, count);
    V shared[kVectors] = {};
    for (int64_t n = 1; n < sample.rows; ++n)
      for (int64_t v = 0; v < tiles.used; ++v) shared[v] += tiles.s_row(n)[v];
    for (int64_t v = 0; v < tiles.used; ++v) shared[v] *= weight;
    for (int64_t n = 1; n < sample.rows; ++n) {
      const V* row = tiles.s_row(n);
      T* z = static_cast<T*>(out[n - 1]) + at;
      tiles.prefetch(n);
      int64_t v = 0;
      for (; (v + 1) * kWidth<T> <= count; ++v) put<T>(row[v] - shared[v], z + v * kWidth<T>);
      if (v * kWidth<T> < count) put_some<T>(row[v] - shared[v], z + v * kWidth<T>, count - v * kWidth<T>);
    }
  }
}

// totals[a * stride + b] += (q_{i+a} - q_{j+b}) (s_{i+a} - s_{j+b}) over one tile: every row that is loaded serves a whole
// block of pairs, and enough sums run at a time to hide the latency of the multiply-add.
template <class T, class In, bool kProduct, int64_t kI, int64_t kJ>
inline void pair_block(const Tiles<T, In>& tiles, int64_t i, int64_t j, Vector<T>* totals, int64_t stride) {
  using V = Vector<T>;
  constexpr int64_t kUnroll = kI * kJ == 1 ? 8 : kI * kJ == 2 ? 4 : kI * kJ <= 4 ? 2 : 1;
  const int64_t pitch = kVectors;
  const V *s_i = tiles.s_row(i), *s_j = tiles.s_row(j), *q_i = tiles.q_row(i), *q_j = tiles.q_row(j);
  V sums[kUnroll][kI][kJ] = {};
  for (int64_t v = 0; v < tiles.used; v += kUnroll)
    for (int64_t u = 0; u < kUnroll; ++u)
      for (int64_t b = 0; b < kJ; ++b)
        for (int64_t a = 0; a < kI; ++a) {
          const int64_t at_i = a * pitch + v + u, at_j = b * pitch + v + u;
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
template <class T, class In, bool kProduct>
inline void pair_tile(const Tiles<T, In>& tiles, bool among, Vector<T>* totals) {
  constexpr int64_t kI = kBytes == 64 ? 4 : kProduct ? 2 : 3, kJ = kBytes == 64 ? 4 : 3;  // what the registers hold
  const int64_t moving = tiles.sample.moving, rows = tiles.sample.rows, first = among ? 0 : moving, repelling = rows - first;
  in_blocks<kI>(0, moving, [&](auto size_i, int64_t i) {
    constexpr int64_t kSize = decltype(size_i)::value;
    for (int64_t a = 0; a < kSize; ++a) tiles.prefetch(i + a);
    auto* own = totals + i * repelling - first;
    for (int64_t a = 0; among && a + 1 < kSize; ++a)
      in_blocks<kI>(i + a + 1, i + kSize, [&](auto size_j, int64_t j) {
        pair_block<T, In, kProduct, 1, decltype(size_j)::value>(tiles, i + a, j, own + a * repelling + j, repelling);
      });
    in_blocks<kJ>(among ? i + kSize : first, rows, [&](auto size_j, int64_t j) {
      pair_block<T, In, kProduct, kSize, decltype(size_j)::value>(tiles, i, j, own + j, repelling);
    });
  });
}

// totals[a] += (q_{n+a} - q_0) (s_{n+a} + s_0) over one tile: the growth of s^T C s from row 0.
template <class T, class In, int64_t kRows>
inline void growth_block(const Tiles<T, In>& tiles, int64_t n, Vector<T>* totals) {
  using V = Vector<T>;
  constexpr int64_t kUnroll = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
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

template <class T, class In>
void pairs(const Sample& sample, int64_t begin, int64_t end, double* d, double* growth) {
  using V = Vector<T>;
  const bool among = sample.moving == sample.rows;  // the particles repel each other: each pair once
  const int64_t first = among ? 0 : sample.moving, repelling = sample.rows - first, count = sample.moving * repelling;
  Tiles<T, In> tiles(sample, count + sample.rows);
  V* sums = tiles.spare();                     // [moving, repelling], then [rows]
  const int64_t growing = growth ? sample.rows : 0;
  for (int64_t run = begin; run < end; run += kRun) {
    std::fill(sums, sums + count + sample.rows, V{});
    for (int64_t at = run; at < std::min(run + kRun, end); at += tiles.columns()) {
      tiles.load(at, std::min(tiles.columns(), end - at));
      in_blocks<4>(1, growing, [&](auto size, int64_t n) {
        growth_block<T, In, decltype(size)::value>(tiles, n, sums + count + n);
      });
      sample.product ? pair_tile<T, In, true>(tiles, among, sums) : pair_tile<T, In, false>(tiles, among, sums);
    }
    for (int64_t i = 0; i < sample.moving; ++i)
      for (int64_t j = among ? i + 1 : 0; j < repelling; ++j) d[i * repelling + j] += sum<T>(sums[i * repelling + j]);
    for (int64_t n = 0; n < growing; ++n) growth[n] += sum<T>(sums[count + n]);
  }
}
