// The product of convolution.h, with the vectors of second_order_kernels.h, which is included before.

constexpr int64_t kRows = 6;  // times two vectors: the sums that fit into 16 registers beside what they are made of

template <class T, int64_t Vectors>
void multiply_panel(const Products& p, const T* panel, int64_t first) {
  using V = Vector<T>;
  constexpr int64_t W = kWidth<T>;
  const T *in = static_cast<const T*>(p.in), *start = static_cast<const T*>(p.start);
  T* out = static_cast<T*>(p.out) + first;
  for (int64_t r = 0; r < p.rows; r += kRows) {
    const int64_t count = std::min(kRows, p.rows - r);
    const T* from[kRows];
    V sums[kRows][Vectors];
    for (int64_t i = 0; i < kRows; ++i) {
      from[i] = in + p.row[r + std::min(i, count - 1)];  // what there is not repeats the last one
      for (int64_t v = 0; v < Vectors; ++v) sums[i][v] = start ? load<V>(start + first + v * W) : V{};
    }
    const T* at = panel;
    for (int64_t d = 0; d < p.depth; ++d, at += Vectors * W) {
      const int64_t column = p.column[d];
      V b[Vectors];
      for (int64_t v = 0; v < Vectors; ++v) b[v] = load<V>(at + v * W);
      for (int64_t i = 0; i < kRows; ++i) {
        const V a = from[i][column] - V{};  // as is: + would turn -0 into 0, with an instruction of its own
        for (int64_t v = 0; v < Vectors; ++v) sums[i][v] += a * b[v];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      T* to = out + p.target[r + i];
      for (int64_t v = 0; v < Vectors; ++v, to += W) {
        if (first + (v + 1) * W <= p.stored) {
          store(p.accumulate ? load<V>(to) + sums[i][v] : sums[i][v], to);
        } else {
          for (int64_t lane = 0; first + v * W + lane < p.stored; ++lane)
            to[lane] = p.accumulate ? to[lane] + sums[i][v][lane] : sums[i][v][lane];
        }
      }
    }
  }
}

template <class T>
void multiply(const Products& p) {
  constexpr int64_t W = kWidth<T>;
  const T* matrix = static_cast<const T*>(p.matrix);
  for (int64_t first = 0; first < p.stored; first += 2 * W) {
    const T* panel = matrix + first * p.depth;
    if (first + W < p.stored)
      multiply_panel<T, 2>(p, panel, first);
    else
      multiply_panel<T, 1>(p, panel, first);
  }
}

inline const Multiplier& multiplier_for(bool wide) {
  static const Multiplier narrow{kWidth<float>, multiply<float>}, full{kWidth<double>, multiply<double>};
  return wide ? full : narrow;
}
