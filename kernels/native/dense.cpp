// Products of very few bfloat16 rows with bfloat16 matrices, read as fast as memory gives them.
//
// For one row a matrix product library spends its time on the way to the product. Sums are float32,
// in one order, so a row's result does not depend on the other rows, nor on the number of threads.
#include "formats.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(CHIASM_GENERIC)
#include <immintrin.h>
#define LANES 1
#endif

namespace {

#ifdef LANES

constexpr int64_t CHUNK = 32;  // rows of a matrix that a thread takes at a time

inline __m512bh load(const uint16_t* at, __mmask32 mask) {
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, at);
}

// R rows of the matrix, k apart, times M rows of x; out is strided by n.
template <int R, int M>
void product(
    const uint16_t* weight, int64_t k, const uint16_t* const* x, uint16_t* out, int64_t n) {
  __m512 total[R][M];
  for (auto& of_row : total)
    for (auto& lanes : of_row) lanes = _mm512_setzero_ps();
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
    for (int r = 0; r < R; ++r) out[m * n + r] = narrow(_mm512_reduce_add_ps(total[r][m]));
}

template <int M>
void rows(
    const uint16_t* weight, int64_t count, int64_t k, const uint16_t* const* x, uint16_t* out,
    int64_t n) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) product<4, M>(weight + j * k, k, x, out + j, n);
  for (; j < count; ++j) product<1, M>(weight + j * k, k, x, out + j, n);
}

#endif

}  // namespace

extern "C" {

#ifdef LANES
// As chiasm_linear, of weight [.., n, k] bfloat16; only where chiasm_has_bfloat16.
void chiasm_dense(
    const uint16_t* weight, int64_t n, int64_t k, const uint16_t* x, int32_t num_runs,
    const int32_t* expert, const int32_t* begin, const int32_t* end, const int32_t* index,
    uint16_t* out, int threads) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  int64_t rows_of_all = 0;
  for (int32_t r = 0; r < num_runs; ++r) rows_of_all += end[r] - begin[r];
  // Dynamic: a core may be another process's for a while, and its share must not wait for it.
#pragma omp parallel for num_threads(worth(rows_of_all * n * k, threads)) schedule(dynamic)
  for (int64_t item = 0; item < num_runs * chunks; ++item) {
    const int64_t run = item / chunks, first = item % chunks * CHUNK;
    const int64_t count = std::min(CHUNK, n - first);
    const uint16_t* held = weight + (expert[run] * n + first) * k;
    for (int64_t i = begin[run]; i < end[run];) {
      const int64_t left = end[run] - i;
      const uint16_t* given[4];
      for (int m = 0; m < std::min<int64_t>(left, 4); ++m) given[m] = x + index[i + m] * k;
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
}

int chiasm_has_bfloat16() { return 1; }
#else
int chiasm_has_bfloat16() { return 0; }
#endif
}
