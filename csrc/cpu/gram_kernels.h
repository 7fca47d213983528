// The kernels for samples whose rows are far apart and whose C is the identity: products of the rows as they are in
// memory. Half the operations that differences take, and no copy: most are done while the rows arrive.

// Blocks of sums that fill the registers, 16 or 32 of them, along with what they share: kRows rows with kOthers others,
// kGroup rows of results.
constexpr int64_t kRows = kBytes == 64 ? 5 : 4, kOthers = kBytes == 64 ? 5 : 3, kGroup = 5;
constexpr int64_t kColumns = kBytes == 16 ? 256 : 512;  // of all rows, worked on at a time: 64 or 32 additions in a row
constexpr int64_t kInPlace = 12;     // so many rows at the most are read where they are

// Columns of rows next to one another, with zeros up to a whole vector. For the last columns; and for all where rows are
// many: a whole number of pages apart, as they often are, they all want the same few lines of the first level of cache.
template <class T, class X>
struct Copied {
  static constexpr int64_t kStride = kColumns + 64 / sizeof(X);

  const int64_t count;
  X* memory;
  std::vector<const void*> rows;  // none before something is copied, which few rows seldom need

  static int64_t vectors(int64_t count) { return (count * kStride * sizeof(X) + kBytes - 1) / kBytes; }
  Copied(int64_t count, Vector<T>* memory) : count(count), memory(reinterpret_cast<X*>(memory)) {}

  const void* const* load(const void* const* from, int64_t begin, int64_t end) {
    rows.resize(count);
    for (int64_t n = 0; n < count; ++n) {
      rows[n] = memory + n * kStride;
      const X* row = static_cast<const X*>(from[n]);
      X* to = std::copy(row + begin, row + end, memory + n * kStride);
      std::fill_n(to, -(end - begin) & (kWidth<T> - 1), X{});
      for (int64_t k = 0; k < end - begin; k += 64 / sizeof(X)) __builtin_prefetch(row + end + k, 0, 2);
    }
    return rows.data();
  }
};

// f(begin, end, in place) for the columns begin .. end of a sample, tile by tile; the last ones are no whole vectors.
template <class T, class F>
inline void in_tiles(int64_t rows, int64_t begin, int64_t end, const F& f) {
  const bool few = rows <= kInPlace;
  const int64_t whole = few ? begin + (end - begin) / kWidth<T> * kWidth<T> : begin;
  for (int64_t at = begin; at < whole; at += kColumns) f(at, std::min(at + kColumns, whole), true);
  for (int64_t at = whole; at < end; at += kColumns) f(at, std::min(at + kColumns, end), false);
}

template <class T, class X>
inline Vector<T> at_column(const void* row, int64_t k) {
  return get<T>(static_cast<const X*>(row) + k);
}

// totals[a * stride + b] += p_a p_b of kA rows and kB others; with kOwn they are the same and b >= a.
template <class T, class In, int64_t kA, int64_t kB, bool kOwn>
inline void gram_block(const void* const* p, const void* const* other, int64_t begin, int64_t end, Vector<T>* totals, int64_t stride) {
  using V = Vector<T>;
  V sums[kA][kB];
#pragma GCC unroll 8
  for (int64_t a = 0; a < kA; ++a)  // one by one, and only those that are used: an initialiser sets memory
#pragma GCC unroll 8
    for (int64_t b = kOwn ? a : 0; b < kB; ++b) sums[a][b] = V{};
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
  in_blocks<kRows>(0, rows, [&](auto size, int64_t i) {
    gram_block<T, In, size, size, true>(p + i, p + i, begin, end, totals + i * rows + i, rows);
    in_blocks<kOthers>(i + size, rows, [&](auto others, int64_t j) {
      gram_block<T, In, size, others, false>(p + i, p + j, begin, end, totals + i * rows + j, rows);
    });
  });
}

template <class T, class In>
void gram(const Sample& sample, int64_t begin, int64_t end, double* out) {
  const int64_t rows = sample.rows, count = rows * rows;
  Vector<T>* totals = scratch<T>(count + Copied<T, In>::vectors(rows));
  Copied<T, In> copied(rows, totals + count);
  std::fill(totals, totals + count, Vector<T>{});
  const auto empty = [&] {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = i * rows + i; n < (i + 1) * rows; ++n) out[n] += sum<T>(totals[n]), totals[n] = Vector<T>{};
  };
  int64_t full = begin + kRun;
  in_tiles<T>(rows, begin, end, [&](int64_t at, int64_t stop, bool in_place) {
    if (at >= full) empty(), full += kRun;
    in_place ? gram_tile<T, In>(sample.values, rows, at, stop, totals)
             : gram_tile<T, In>(copied.load(sample.values, at, stop), rows, 0, stop - at, totals);
  });
  empty();
}

// The sums of kSize rows of the result from column k on, kMany vectors of each, handed to `to`; w [rows, kSize].
template <class T, class In, int64_t kSize, int64_t kMany, class To>
inline void mix_block(const void* const* p, int64_t rows, const void* const* mixed, const T* by, const T* w, int64_t k, const To& to) {
  using V = Vector<T>;
  constexpr int64_t W = kWidth<T>;
  V sums[kSize][kMany] = {};
  for (int64_t a = 0; mixed && a < kSize; ++a)
    for (int64_t u = 0; u < kMany; ++u) sums[a][u] = by[a] * at_column<T, T>(mixed[a], k + u * W);
  const auto add = [&](auto count) {  // the next `count` rows
    for (int64_t j = 0; j < count; ++j) {
      V row[kMany];
#pragma GCC unroll 32
      for (int64_t u = 0; u < kMany; ++u) row[u] = at_column<T, In>(p[j], k + u * W);
#pragma GCC unroll 16
      for (int64_t a = 0; a < kSize; ++a)
#pragma GCC unroll 32
        for (int64_t u = 0; u < kMany; ++u) sums[a][u] += w[j * kSize + a] * row[u];
    }
    p += count, w += count * kSize;
  };
  for (; rows >= kGroup; rows -= kGroup) add(std::integral_constant<int64_t, kGroup>());
  for (; rows > 0; --rows) add(std::integral_constant<int64_t, 1>());
#pragma GCC unroll 16
  for (int64_t a = 0; a < kSize; ++a)
#pragma GCC unroll 32
    for (int64_t u = 0; u < kMany; ++u) to(a, u, sums[a][u]);
}

// Columns begin .. end of the results, which are stored from column `first` on, straight from the registers.
template <class T, class In>
inline void mix_tile(const void* const* p, int64_t rows, const void* const* mixed, const T* by, const T* w, int64_t begin, int64_t end,
                     void* const* out, int64_t first) {
  in_blocks<kGroup>(0, rows, [&](auto size, int64_t i) {
    constexpr int64_t W = kWidth<T>, kMany = kBytes == 64 ? (size > 1 ? 4 : 8) : 2 * kGroup / size;
    const auto block = [&](auto many, int64_t k) {
      mix_block<T, In, size, many>(p, rows, mixed ? mixed + i : nullptr, by + i, w + i * rows, k, [&](int64_t a, int64_t u, Vector<T> v) {
        const int64_t at = k - begin + u * W, left = end - begin - at;
        In* to = static_cast<In*>(out[i + a]) + first + at;
        if (many > 1 || left >= W) put<T>(v, to);
        else put_some<T>(v, to, left);
      });
    };
    int64_t k = begin;
    for (; k + kMany * W <= end; k += kMany * W) block(std::integral_constant<int64_t, kMany>(), k);
    for (; k < end; k += W) block(std::integral_constant<int64_t, 1>(), k);
  });
}

template <class T, class In>
void mix(const Sample& sample, int64_t begin, int64_t end, const void* const* mixed, const double* weights, void* const* out) {
  const int64_t rows = sample.rows, copies = Copied<T, In>::vectors(rows), others = mixed ? Copied<T, T>::vectors(rows) : 0;
  Vector<T>* memory = scratch<T>(copies + others + rows * (rows + 1) / kWidth<T> + 1);
  Copied<T, In> p(rows, memory);
  Copied<T, T> m(mixed ? rows : 0, memory + copies);
  T *w = reinterpret_cast<T*>(memory + copies + others), *by = w + rows * rows;
  for (int64_t n = 0; n < rows; ++n) by[n] = T(1 / sample.norm[n]);
  in_blocks<kGroup>(0, rows, [&](auto size, int64_t i) {  // the weights of a block next to one another
    for (int64_t a = 0; a < size; ++a)
      for (int64_t j = 0; j < rows; ++j) w[i * rows + j * size + a] = T(weights[(i + a) * rows + j]);
  });
  in_tiles<T>(rows, begin, end, [&](int64_t at, int64_t stop, bool in_place) {
    if (in_place) return mix_tile<T, In>(sample.values, rows, mixed, by, w, at, stop, out, at);
    const auto *own = p.load(sample.values, at, stop), *more = mixed ? m.load(mixed, at, stop) : nullptr;
    mix_tile<T, In>(own, rows, more, by, w, 0, stop - at, out, at);
  });
}
