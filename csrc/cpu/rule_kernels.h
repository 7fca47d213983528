// The first half of rule.h, for kLanes samples next to one another: a vector has numbers of several of them.

constexpr int64_t kNetwork = 32;  // up to so many rows are sorted without a branch, all lanes at once

// The median of each lane of columns [rows][kLanes], the mean of the middle two of an even number; reorders them.
template <class T>
inline void medians(Vector<T>* columns, int64_t rows, double* out) {
  constexpr int64_t kParts = kLanes / kWidth<T>;
  const T* lanes = reinterpret_cast<T*>(columns);
  if (rows <= kNetwork) {  // odd-even transposition
    for (int64_t round = 0; round < rows; ++round)
      for (Vector<T>* pair = columns + round % 2 * kParts; pair + kParts < columns + rows * kParts; pair += 2 * kParts)
#pragma GCC unroll 8
        for (int64_t k = 0; k < kParts; ++k) {
          const Vector<T> a = pair[k], b = pair[kParts + k];
          pair[k] = b < a ? b : a;
          pair[kParts + k] = b < a ? a : b;
        }
    for (int64_t lane = 0; lane < kLanes; ++lane)
      out[lane] = (double(lanes[(rows - 1) / 2 * kLanes + lane]) + double(lanes[rows / 2 * kLanes + lane])) / 2;
    return;
  }
  std::vector<T> column(rows);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    bool ordered = true;
    for (int64_t i = 0; i < rows; ++i) column[i] = lanes[i * kLanes + lane], ordered &= column[i] == column[i];
    const auto upper = column.begin() + rows / 2;
    if (ordered) std::nth_element(column.begin(), upper, column.end());  // NaN has no place in an order
    out[lane] = rows % 2 ? double(*upper) : (double(*std::max_element(column.begin(), upper)) + double(*upper)) / 2;
  }
}

template <class T>
bool rule(int64_t moving, int64_t repelling, double log_count, const void* distances, double* bandwidth, double* slopes, double* sums) {
  using V = Vector<double>;
  constexpr int64_t W = kWidth<double>;
  const T* d = static_cast<const T*>(distances);
  Vector<T>* columns = scratch<T>(moving * kLanes / kWidth<T>);
  double middle[kLanes];
  std::fill_n(sums, moving * kLanes, 0.0);  // of a choice between vectors by j == 0 GCC 12 makes one lane
  V excess = {};  // 0 as long as all is finite: an infinite distance alone would only make a kernel value 0
  for (int64_t j = 0; j < repelling; ++j) {
    for (int64_t i = 0; i < moving; ++i) std::copy_n(d + (i * repelling + j) * kLanes, kLanes, reinterpret_cast<T*>(columns) + i * kLanes);
    medians<T>(columns, moving, middle);
    for (int64_t lane = 0; lane < kLanes; lane += W) {
      const V h = get<double>(middle + lane) / log_count + 1e-12, reciprocal = 1 / h;
      put<double>(h, bandwidth + j * kLanes + lane);
      for (int64_t i = 0; i < moving; ++i) {
        const int64_t at = (i * repelling + j) * kLanes + lane, row = i * kLanes + lane;
        const V from = get<double>(d + at), value = exponential(-from / h);
        excess += from * 0;
        put<double>(from == 0 ? V{} : value * reciprocal, slopes + at);
        put<double>(get<double>(sums + row) + value, sums + row);
      }
    }
  }
  return sum<double>(excess) == 0;
}

template <class T, class In>
constexpr Kernels kKernels = {squares<T, In>, contrasts<T, In>, pairs<T, In>,  combine<T, In>,
                               gram<T, In>,    mix<T, In>,       along<T, In>, rule<T>};

inline const Kernels& kernels_for(Input input, bool wide) {
  switch (input) {
    case Input::kFloat32: return wide ? kKernels<double, float> : kKernels<float, float>;
    case Input::kBFloat16: return wide ? kKernels<double, bfloat16> : kKernels<float, bfloat16>;
    default: return kKernels<double, double>;
  }
}
