// The kernels for samples whose rows are far apart and whose C is the identity: products of the rows as they are in
// memory. Half the operations that differences take, and no copy: most are done while the rows arrive.

constexpr int64_t kGroup = 5;        // rows that are held in vectors together
constexpr int64_t kColumns = 256;    // of all rows, worked on at a time

// The last columns of rows, fewer than a vector's, with zeros behind them.
template <class T, class X>
struct Ends {
  std::vector<X> memory;
  std::vector<const void*> rows;

  Ends(const void* const* from, int64_t count, int64_t begin, int64_t end) : memory(count * kWidth<T>), rows(count) {
    for (int64_t n = 0; n < count; ++n) {
      const X* row = static_cast<const X*>(from[n]);
      std::copy(row + begin, row + end, &memory[n * kWidth<T>]);
      rows[n] = &memory[n * kWidth<T>];
    }
  }
};

template <class T, class X>
inline Vector<T> at_column(const void* row, int64_t k) {
  return get<T>(static_cast<const X*>(row) + k);
}

// totals[a * stride + b] += p_a p_b of kA rows and kB others; with kOwn they are the same and b >= a.
template <class T, class In, int64_t kA, int64_t kB, bool kOwn>
inline void gram_block(const void* const* p, const void* const* other, int64_t begin, int64_t end, Vector<T>* totals, int64_t stride) {
  using V = Vector<T>;
  V sums[kA][kB] = {};
  for (int64_t k = begin; k < end; k += kWidth<T>) {
    for (int64_t a = 0; kOwn && k * sizeof(In) % 64 == 0 && a < kA; ++a)  // asks for the next columns, once for each row
      __builtin_prefetch(static_cast<const In*>(p[a]) + k + kColumns, 0, 2);
    V held[kA];
#pragma GCC unroll 8
    for (int64_t a = 0; a < kA; ++a) held[a] = at_column<T, In>(p[a], k);
#pragma GCC unroll 8
    for (int64_t b = 0; b < kB; ++b) {
      const V v = kOwn ? held[b] : at_column<T, In>(other[b], k);
#pragma GCC unroll 8
      for (int64_t a = 0; a < (kOwn ? b + 1 : kA); ++a) sums[a][b] += held[a] * v;
    }
  }
  for (int64_t a = 0; a < kA; ++a)
    for (int64_t b = kOwn ? a : 0; b < kB; ++b) totals[a * stride + b] += sums[a][b];
}

template <class T, class In>
inline void gram_tile(const void* const* p, int64_t rows, int64_t begin, int64_t end, Vector<T>* totals) {
  in_blocks<kGroup>(0, rows, [&](auto size, int64_t i) {
    gram_block<T, In, size, size, true>(p + i, p + i, begin, end, totals + i * rows + i, rows);
    in_blocks<2>(i + size, rows, [&](auto others, int64_t j) {
      gram_block<T, In, size, others, false>(p + i, p + j, begin, end, totals + i * rows + j, rows);
    });
  });
}

template <class T, class In>
void gram(const Sample& sample, int64_t begin, int64_t end, double* out) {
  const int64_t rows = sample.rows, count = rows * rows, whole = begin + (end - begin) / kWidth<T> * kWidth<T>;
  Vector<T>* totals = scratch<T>(count);
  std::fill(totals, totals + count, Vector<T>{});
  const auto empty = [&] {
    for (int64_t n = 0; n < count; ++n) out[n] += sum<T>(totals[n]), totals[n] = Vector<T>{};
  };
  for (int64_t run = begin; run < whole; run += kRun, empty())
    for (int64_t at = run; at < std::min(run + kRun, whole); at += kColumns)
      gram_tile<T, In>(sample.values, rows, at, std::min(at + kColumns, whole), totals);
  if (whole == end) return;
  gram_tile<T, In>(Ends<T, In>(sample.values, rows, whole, end).rows.data(), rows, 0, kWidth<T>, totals);
  empty();
}

// The sums of kSize rows of the result from column k on, kMany vectors of each.
template <class T, class In, int64_t kSize, int64_t kMany>
inline void mix_block(const void* const* p, int64_t rows, const void* const* mixed, const T* by, const T* w, int64_t k, Vector<T>* to) {
  using V = Vector<T>;
  constexpr int64_t W = kWidth<T>;
  V sums[kSize][kMany] = {};
  for (int64_t a = 0; mixed && a < kSize; ++a)
    for (int64_t u = 0; u < kMany; ++u) sums[a][u] = by[a] * at_column<T, T>(mixed[a], k + u * W);
#pragma GCC unroll 5
  for (int64_t j = 0; j < rows; ++j) {
    V row[kMany];
#pragma GCC unroll 16
    for (int64_t u = 0; u < kMany; ++u) row[u] = at_column<T, In>(p[j], k + u * W);
#pragma GCC unroll 16
    for (int64_t a = 0; a < kSize; ++a)
#pragma GCC unroll 16
      for (int64_t u = 0; u < kMany; ++u) sums[a][u] += w[a * rows + j] * row[u];
  }
#pragma GCC unroll 16
  for (int64_t a = 0; a < kSize; ++a)
#pragma GCC unroll 16
    for (int64_t u = 0; u < kMany; ++u) to[a * (kColumns / W) + u] = sums[a][u];
}

// Columns begin .. end of the results, which are stored `count` numbers of each row from column `first` on.
template <class T, class In>
inline void mix_tile(const void* const* p, int64_t rows, const void* const* mixed, const T* by, const T* w, int64_t begin, int64_t end,
                     Vector<T>* results, void* const* out, int64_t first, int64_t count, bool past_caches) {
  in_blocks<kGroup>(0, rows, [&](auto size, int64_t i) {
    constexpr int64_t W = kWidth<T>, kMany = 2 * kGroup / size;
    const auto block = [&](auto many, int64_t k) {
      mix_block<T, In, size, many>(p, rows, mixed ? mixed + i : nullptr, by + i, w + i * rows, k, results + (k - begin) / W);
    };
    int64_t k = begin;
    for (; k + kMany * W <= end; k += kMany * W) block(std::integral_constant<int64_t, kMany>(), k);
    for (; k < end; k += W) block(std::integral_constant<int64_t, 1>(), k);
    for (int64_t a = 0; a < size; ++a)
      store<T>(past_caches, results + a * (kColumns / kWidth<T>), count, static_cast<In*>(out[i + a]) + first);
  });
}

template <class T, class In>
void mix(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* weights, void* const* out, bool past_caches) {
  const int64_t rows = sample.rows, whole = begin + (end - begin) / kWidth<T> * kWidth<T>;
  constexpr int64_t kResults = kGroup * kColumns / kWidth<T>;
  Vector<T>* results = scratch<T>(kResults + rows * (rows + 1) / kWidth<T> + 1);
  T *w = reinterpret_cast<T*>(results + kResults), *by = w + rows * rows;
  std::copy(weights, weights + rows * rows, w);
  for (int64_t n = 0; n < rows; ++n) by[n] = T(1 / sample.norm[n]);
  for (int64_t at = begin; at < whole; at += kColumns) {
    const int64_t stop = std::min(at + kColumns, whole);
    mix_tile<T, In>(sample.values, rows, mixed, by, w, at, stop, results, out, at, stop - at, past_caches);
  }
  if (whole < end) {
    const Ends<T, In> p(sample.values, rows, whole, end);
    const Ends<T, T> m(mixed, mixed ? rows : 0, whole, end);
    mix_tile<T, In>(p.rows.data(), rows, mixed ? m.rows.data() : nullptr, by, w, 0, kWidth<T>, results, out, whole, end - whole, false);
  }
  if (past_caches) finish_stores();
}
