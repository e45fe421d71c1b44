// The products of linear.cpp on any processor: levels are widened, and the compiler makes the best of
// it. Included there.

struct Table {
  Table(const int8_t*, uint8_t) {}
};

template <int F>
struct Laid {
  std::unique_ptr<float[]> values;
  int64_t k;

  Laid(int64_t k, int64_t rows) : values(new float[rows * k]), k(k) {}
  void fill(int64_t row, const uint16_t* x, int64_t) const {
    for (int64_t i = 0; i < k; ++i) values[row * k + i] = widen(x[i]);
  }
};

template <int F>
void multiply(const Stack& s, const Laid<F>& x, const Table*, const Part& part) {
  std::unique_ptr<float[]> totals(new float[part.rows]);
  for (int64_t j = part.begin; j < part.end; ++j) {
    const int64_t row = part.expert * s.n + j;
    std::fill(totals.get(), totals.get() + part.rows, 0.0f);
    for (int64_t g = 0; g < s.groups(); ++g) {
      const int count = int(std::min<int64_t>(GROUP, s.k - g * GROUP));
      float value[GROUP];
      unscaled(s, row, g, count, value);
      for (int64_t m = 0; m < part.rows; ++m) {
        const float* xs = x.values.get() + part.index[m] * x.k + g * GROUP;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < count; ++i) sum += value[i] * xs[i];
        totals[m] += sum;
      }
    }
    const float scale = s.row_scale(row);
    for (int64_t m = 0; m < part.rows; ++m) part.out[m * s.n + j] = narrow(totals[m] * scale);
  }
}
