// One sample's normalised rows, a tile of columns at a time, in scratch memory that stays in the first level of cache.
// Padding columns are zero and add nothing to any sum.

constexpr int64_t kStep = 8;  // vectors of a tile's row are a multiple of it, so that loops may be unrolled
constexpr int64_t kVectors = 4 * kStep;  // of a whole row
constexpr int64_t kRun = 4096;       // columns whose sums stay in vectors of the computing type

template <class T, class In>
struct Tiles {
  using V = Vector<T>;
  static constexpr int64_t W = kWidth<T>;

  const Sample& sample;
  int64_t begin = 0;      // the first column
  int64_t used = 0;       // vectors of each row that are in use: fewer at the end of the columns
  V* s;                   // [N, kVectors]
  V* q;                   // the same memory as s where C is the identity
  std::vector<Divisor<T>> norm;

  explicit Tiles(const Sample& sample, int64_t spare = 0) : sample(sample), norm(sample.norm, sample.norm + sample.rows) {
    s = scratch<T>(sample.rows * kVectors * (sample.product ? 2 : 1) + spare);
    q = sample.product ? s + sample.rows * kVectors : s;
  }

  static constexpr int64_t columns() { return kVectors * W; }
  V* spare() const { return q + sample.rows * kVectors; }
  V* s_row(int64_t n) const { return s + n * kVectors; }
  V* q_row(int64_t n) const { return q + n * kVectors; }

  void move_to(int64_t from, int64_t count) {
    begin = from;
    used = (count + kStep * W - 1) / (kStep * W) * kStep;
  }

  void load(int64_t from, int64_t count) {
    move_to(from, count);
    for (int64_t n = 0; n < sample.rows; ++n) load_row(n, count);
    if (sample.product) load_q(count);
  }

  // s_0, and s_n - s_0 in the places of the others.
  void load_differences(int64_t from, int64_t count) {
    move_to(from, count);
    load_row(0, count);
    for (int64_t n = 1; n < sample.rows; ++n) load_row(n, count, [first = s_row(0)](V s, int64_t v) { return s - first[v]; });
  }

  struct AsItIs {
    V operator()(V p, int64_t) const { return p; }
  };

  template <class F = AsItIs>
  void load_row(int64_t n, int64_t count, F f = {}) const {
    const auto* from = static_cast<const In*>(sample.values[n]) + begin;
    copy(from, count, s_row(n), [f, by = norm[n]](V p, int64_t v) { return f(by(p), v); });
  }

  // Brings a row into the tile through f, zeros behind it.
  template <class From, class F = AsItIs>
  void copy(const From* from, int64_t count, V* to, F f = {}) const {
    int64_t v = 0;
    for (; (v + 4) * W <= count; v += 4)
      for (int64_t u = 0; u < 4; ++u) to[v + u] = f(get<T>(from + (v + u) * W), v + u);
    for (; (v + 1) * W <= count; ++v) to[v] = f(get<T>(from + v * W), v);
    if (v * W < count) to[v] = f(get_some<T>(from + v * W, count - v * W), v), ++v;
    for (; v < used; ++v) to[v] = V{};
  }

  // The contrasts' product gives q_n for n > 0; q_0 = sum_n q_n / (sqrt(N) - 1) has the same shared vector taken away.
  void load_q(int64_t count) {
    V* first = q_row(0);
    std::fill(first, first + used, V{});
    for (int64_t n = 1; n < sample.rows; ++n) {
      copy(static_cast<const T*>(sample.product[n - 1]) + begin, count, q_row(n));
      for (int64_t v = 0; v < used; ++v) first[v] += q_row(n)[v];
    }
    const T scale = T(1 / (std::sqrt(double(sample.rows)) - 1));
    for (int64_t v = 0; v < used; ++v) first[v] *= scale;
  }

  // Asks for row n of the next tile while this one is worked on: a row at a time, between the work, as requests wait for
  // one another.
  void prefetch(int64_t n) const {
    ask_for(static_cast<const In*>(sample.values[n]) + begin + columns());
    if (sample.product && n > 0) ask_for(static_cast<const T*>(sample.product[n - 1]) + begin + columns());
  }

  template <class X>
  static void ask_for(const X* values) {
    for (int64_t k = 0; k < columns(); k += 64 / sizeof(X)) __builtin_prefetch(values + k, 0, 2);
  }
};

template <class T, class In>
void store(const Vector<T>* row, int64_t count, In* to) {
  constexpr int64_t W = kWidth<T>;
  int64_t v = 0;
  for (; (v + 1) * W <= count; ++v) put<T>(row[v], to + v * W);
  if (v * W < count) put_some<T>(row[v], to + v * W, count - v * W);
}
