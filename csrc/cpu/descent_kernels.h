// The pass of descent.h. A product and the sum after it are one operation where the processor has it, as in PyTorch's
// `add` with a factor; the velocity's product is rounded by itself, as `mul_` does, which is why it goes through memory.

template <class T>
void descend(const Descent& d) {
  constexpr int64_t kBlock = 512;
  const T momentum = T(d.momentum), decay = T(d.weight_decay), rate = T(-d.rate);
  T *__restrict p = static_cast<T*>(d.parameters), *__restrict v = static_cast<T*>(d.velocity);
  const T* g = static_cast<const T*>(d.gradient);
  for (int64_t begin = 0; begin < d.count; begin += kBlock) {
    const int64_t end = std::min(d.count, begin + kBlock);
    for (int64_t i = begin; i < end; ++i) v[i] *= momentum;
    for (int64_t i = begin; i < end; ++i) {
      const T own = g[i] + decay * p[i];
      const T velocity = v[i] + own;
      v[i] = velocity;
      const T direction = d.nesterov ? own + momentum * velocity : velocity;
      p[i] = p[i] + rate * direction;
    }
  }
}

inline void descend(const Descent& d, bool wide) { wide ? descend<double>(d) : descend<float>(d); }
