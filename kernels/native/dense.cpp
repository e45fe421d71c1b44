// Products of few bfloat16 rows with bfloat16 matrices, read as fast as memory gives them.
//
// For one row a matrix product library spends its time on the way to the product. Sums are float32,
// in one order, so a row's result does not depend on the other rows, nor on the number of threads.
#include <memory>

#include "clock.h"
#include "product.h"
#include "wide.h"

namespace {

#if LANES == 512

// Rows of x as they are.
struct Laid {
  using Value = uint16_t;
  static constexpr bool is_filled = false;
  const uint16_t* x;
  int64_t k;

  Laid(const uint16_t* x, int64_t, int64_t k) : x(x), k(k) {}
  void fill(int64_t) const {}
  const Value* row(int64_t i) const { return x + i * k; }
};

inline __m512bh load(const uint16_t* at, __mmask32 mask) {
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, at);
}

// R rows of the matrix, k apart, times M rows of x; out is strided by n.
template <int R, int M>
void product(
    const uint16_t* weight, int64_t k, const uint16_t* const* x, uint16_t* out, int64_t n) {
  Wide total[R][M];
  for (auto& of_row : total)
    for (auto& lanes : of_row) lanes = wide(0);
  for (int64_t i = 0; i < k; i += 32) {
    const __mmask32 mask = k - i >= 32 ? ~0u : (1u << (k - i)) - 1;
    __m512bh given[M];
    for (int m = 0; m < M; ++m) given[m] = load(x[m] + i, mask);
    for (int r = 0; r < R; ++r) {
      const uint16_t* at = weight + r * k + i;
      // The same place of the next R rows: not every machine prefetches streams by itself. To the
      // second level: the first one has no room for so much so early.
      _mm_prefetch(reinterpret_cast<const char*>(at + R * k), _MM_HINT_T1);
      const __m512bh held = load(at, mask);
      for (int m = 0; m < M; ++m) total[r][m] = _mm512_dpbf16_ps(total[r][m], held, given[m]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * n + r] = narrow(sum(total[r][m]));
}

#elif LANES == 256

constexpr int64_t PAIR = 2 * WIDTH;  // values that are multiplied at a time

// So many bfloat16 values as float32: those of even places, those of odd ones.
struct Widened {
  Wide even, odd;

  explicit Widened(const uint16_t* at) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xFFFF0000))));
  }
};

// Rows of x widened, with zeros behind their ends.
struct Laid {
  using Value = float;
  static constexpr bool is_filled = true;
  const uint16_t* x;
  int64_t k, width;
  std::unique_ptr<float[]> values;

  Laid(const uint16_t* x, int64_t rows, int64_t k)
      : x(x), k(k), width((k + PAIR - 1) / PAIR * PAIR), values(new float[rows * width]) {}
  void fill(int64_t i) const {
    for (int64_t j = 0; j < k; j += PAIR) {
      uint16_t edge[PAIR] = {};
      const uint16_t* from = x + i * k + j;
      if (k - j < PAIR) {
        std::copy(from, from + (k - j), edge);
        from = edge;
      }
      const Widened given(from);
      store(values.get() + i * width + j, given.even);
      store(values.get() + i * width + j + WIDTH, given.odd);
    }
  }
  const Value* row(int64_t i) const { return values.get() + i * width; }
};

// R rows of the matrix, k apart, times M rows of x; out is strided by n.
template <int R, int M>
void product(const uint16_t* weight, int64_t k, const float* const* x, uint16_t* out, int64_t n) {
  Wide total[R][M];
  for (auto& of_row : total)
    for (auto& lanes : of_row) lanes = wide(0);
  const auto step = [&](const uint16_t* at, int64_t stride, int64_t i) {
    for (int r = 0; r < R; ++r) {
      const Widened held(at + r * stride);
      for (int m = 0; m < M; ++m) {
        Wide& lanes = total[r][m];
        lanes = multiply_add(held.even, load(x[m] + i), lanes);
        lanes = multiply_add(held.odd, load(x[m] + i + WIDTH), lanes);
      }
    }
  };
  int64_t i = 0;
  for (; i + PAIR <= k; i += PAIR) {
    for (int r = R; r < 2 * R; ++r)  // as above
      _mm_prefetch(reinterpret_cast<const char*>(weight + r * k + i), _MM_HINT_T0);
    step(weight + i, k, i);
  }
  if (i < k) {  // nothing is read that is not there
    uint16_t edge[R * PAIR] = {};
    for (int r = 0; r < R; ++r)
      std::copy(weight + r * k + i, weight + (r + 1) * k, edge + r * PAIR);
    step(edge, PAIR, i);
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * n + r] = narrow(sum(total[r][m]));
}

#endif

#if LANES

// As many rows of the matrix at a time as registers suffice for.
template <int M>
void rows(
    const uint16_t* weight, int64_t count, int64_t k, const Laid::Value* const* x, uint16_t* out,
    int64_t n) {
  constexpr int R = LANES == 256 && M == 4 ? 2 : 4;
  int64_t j = 0;
  for (; j + R <= count; j += R) product<R, M>(weight + j * k, k, x, out + j, n);
  for (; j < count; ++j) product<1, M>(weight + j * k, k, x, out + j, n);
}

struct Dense : Task {
  const Stack& s;
  int64_t num_rows;
  Runs runs;
  uint16_t* out;
  Laid laid;

  Dense(const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out)
      : s(s), num_rows(num_rows), runs(runs), out(out), laid(x, num_rows, s.k) {}

  void work() const override {
    if (Laid::is_filled) {  // without a need threads do not wait for each other
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num_rows; ++i) laid.fill(i);
    }
    const int64_t chunk = chunk_rows(s, runs.count), chunks = (s.n + chunk - 1) / chunk;
    // Dynamic: a core may be another process's for a while, and its share must not wait for it.
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < runs.count * chunks; ++item) {
      const int64_t run = item / chunks;
      const Clock clock(runs.spent, runs.expert[run]);
      multiply(run, item % chunks * chunk, chunk);
    }
  }

  // The rows of one run times up to `chunk` rows of its matrix.
  void multiply(int64_t run, int64_t first, int64_t chunk) const {
    const int64_t n = s.n, k = s.k, count = std::min(chunk, n - first);
    const auto* weight = reinterpret_cast<const uint16_t*>(s.codes);
    const uint16_t* held = weight + (runs.expert[run] * n + first) * k;
    for (int64_t i = runs.begin[run]; i < runs.end[run];) {
      const int64_t left = runs.end[run] - i;
      const Laid::Value* given[4];
      for (int m = 0; m < std::min<int64_t>(left, 4); ++m) given[m] = laid.row(runs.index[i + m]);
      uint16_t* to = out + i * n + first;
      if (left >= 4) {
        rows<4>(held, count, k, given, to, n);
        i += 4;
      } else if (left >= 2) {
        rows<2>(held, count, k, given, to, n);
        i += 2;
      } else {
        rows<1>(held, count, k, given, to, n);
        i += 1;
      }
    }
  }
};

#endif

}  // namespace

#if LANES
std::unique_ptr<Task> dense_product(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out) {
  return std::unique_ptr<Task>(new Dense(s, x, num_rows, runs, out));
}
#else
std::unique_ptr<Task> dense_product(
    const Stack&, const uint16_t*, int64_t, const Runs&, uint16_t*) {
  return nullptr;  // nobody asks: chiasm_has_bfloat16
}
#endif

extern "C" {

// Whether there are products of bfloat16 matrices.
int chiasm_has_bfloat16() { return LANES != 0; }
}
