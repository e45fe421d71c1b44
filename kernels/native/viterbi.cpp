// The best path through the trellis of tcq2, one row after the other, 256 states at a time.
//
// The state after weight t is ((state << 2) | symbol) & 255, so the 4 states before a state s share
// their low bits q = s >> 2 and differ in the high ones p: s' = p * 64 + q. Costs, and with them the
// path, are the same bits as those of kernels/quant/tcq2.py: the same float32 operations in the same
// order, and of equal costs the one with the smaller p, at the end the smaller state.
#include <limits>
#include <vector>

#include "formats.h"

#if defined(__AVX512F__) && !defined(CHIASM_GENERIC)
#define LANES 512
#include <immintrin.h>
#elif defined(__AVX2__) && !defined(CHIASM_GENERIC)
#define LANES 256
#include <immintrin.h>
#else
#define LANES 0
#endif

namespace {

constexpr int TAILS = STATES / 4;

// For each q which p was best, as two bits in two words.
struct Choice {
  uint64_t low, high;
};

#if LANES == 512

struct Search {
  __m512 cost[16];
  __m512i spread[4];

  Search() {
    alignas(64) int32_t lane[16];
    for (int u = 0; u < 4; ++u) {
      for (int i = 0; i < 16; ++i) lane[i] = 4 * u + i / 4;
      spread[u] = _mm512_load_si512(lane);
    }
  }

  void begin() {
    const float far = std::numeric_limits<float>::infinity();
    for (auto& c : cost) c = _mm512_set1_ps(far);
    cost[0] = _mm512_mask_mov_ps(cost[0], 1, _mm512_setzero_ps());
  }

  Choice step(float weight, float importance, const float* level) {
    Choice choice{0, 0};
    __m512 best[4];
    for (int v = 0; v < 4; ++v) {
      const __m512 c0 = cost[v], c1 = cost[4 + v], c2 = cost[8 + v], c3 = cost[12 + v];
      const __mmask16 m1 = _mm512_cmp_ps_mask(c1, c0, _CMP_LT_OQ);
      const __mmask16 m3 = _mm512_cmp_ps_mask(c3, c2, _CMP_LT_OQ);
      const __m512 b01 = _mm512_min_ps(c1, c0), b23 = _mm512_min_ps(c3, c2);
      const __mmask16 upper = _mm512_cmp_ps_mask(b23, b01, _CMP_LT_OQ);
      best[v] = _mm512_min_ps(b23, b01);
      const uint64_t low = uint16_t((m1 & ~upper) | (m3 & upper));
      choice.low |= low << (16 * v);
      choice.high |= uint64_t(uint16_t(upper)) << (16 * v);
    }
    const __m512 w = _mm512_set1_ps(weight), i = _mm512_set1_ps(importance);
    for (int u = 0; u < 16; ++u) {
      const __m512 before = _mm512_permutexvar_ps(spread[u % 4], best[u / 4]);
      const __m512 error = _mm512_sub_ps(w, _mm512_loadu_ps(level + 16 * u));
      const __m512 square = _mm512_mul_ps(_mm512_mul_ps(error, error), i);
      cost[u] = _mm512_add_ps(before, square);
    }
    return choice;
  }

  void costs(float* out) const {
    for (int u = 0; u < 16; ++u) _mm512_storeu_ps(out + 16 * u, cost[u]);
  }
};

#elif LANES == 256

struct Search {
  __m256 cost[32];
  __m256i spread[4];

  Search() {
    for (int u = 0; u < 4; ++u) {
      const int q = 2 * u;
      spread[u] = _mm256_setr_epi32(q, q, q, q, q + 1, q + 1, q + 1, q + 1);
    }
  }

  void begin() {
    const float far = std::numeric_limits<float>::infinity();
    for (auto& c : cost) c = _mm256_set1_ps(far);
    cost[0] = _mm256_blend_ps(cost[0], _mm256_setzero_ps(), 1);
  }

  Choice step(float weight, float importance, const float* level) {
    Choice choice{0, 0};
    __m256 best[8];
    for (int v = 0; v < 8; ++v) {
      const __m256 c0 = cost[v], c1 = cost[8 + v], c2 = cost[16 + v], c3 = cost[24 + v];
      const __m256 m1 = _mm256_cmp_ps(c1, c0, _CMP_LT_OQ), m3 = _mm256_cmp_ps(c3, c2, _CMP_LT_OQ);
      const __m256 b01 = _mm256_min_ps(c1, c0), b23 = _mm256_min_ps(c3, c2);
      const __m256 upper = _mm256_cmp_ps(b23, b01, _CMP_LT_OQ);
      best[v] = _mm256_min_ps(b23, b01);
      choice.low |= uint64_t(_mm256_movemask_ps(_mm256_blendv_ps(m1, m3, upper))) << (8 * v);
      choice.high |= uint64_t(_mm256_movemask_ps(upper)) << (8 * v);
    }
    const __m256 w = _mm256_set1_ps(weight), i = _mm256_set1_ps(importance);
    for (int u = 0; u < 32; ++u) {
      const __m256 before = _mm256_permutevar8x32_ps(best[u / 4], spread[u % 4]);
      const __m256 error = _mm256_sub_ps(w, _mm256_loadu_ps(level + 8 * u));
      const __m256 square = _mm256_mul_ps(_mm256_mul_ps(error, error), i);
      cost[u] = _mm256_add_ps(before, square);
    }
    return choice;
  }

  void costs(float* out) const {
    for (int u = 0; u < 32; ++u) _mm256_storeu_ps(out + 8 * u, cost[u]);
  }
};

#else

struct Search {
  float cost[STATES];

  void begin() {
    std::fill(cost, cost + STATES, std::numeric_limits<float>::infinity());
    cost[0] = 0;
  }

  Choice step(float weight, float importance, const float* level) {
    Choice choice{0, 0};
    float best[TAILS];
    for (int q = 0; q < TAILS; ++q) {
      const bool m1 = cost[TAILS + q] < cost[q], m3 = cost[3 * TAILS + q] < cost[2 * TAILS + q];
      const float b01 = m1 ? cost[TAILS + q] : cost[q];
      const float b23 = m3 ? cost[3 * TAILS + q] : cost[2 * TAILS + q];
      const bool upper = b23 < b01;
      best[q] = upper ? b23 : b01;
      choice.low |= uint64_t(upper ? m3 : m1) << q;
      choice.high |= uint64_t(upper) << q;
    }
    for (int s = 0; s < STATES; ++s) {
      const float error = weight - level[s];
      const float square = error * error * importance;
      cost[s] = best[s >> 2] + square;
    }
    return choice;
  }

  void costs(float* out) const { std::copy(cost, cost + STATES, out); }
};

#endif

void encode_row(
    const float* weights, const uint8_t* local, const float* importance, const int8_t* table,
    int64_t k, Choice* choices, uint8_t* codes) {
  Search search;
  search.begin();
  alignas(64) float level[STATES];
  for (int64_t t = 0; t < k; ++t) {
    if (t % GROUP == 0)
      for (int s = 0; s < STATES; ++s) level[s] = float(table[s] * int32_t(local[t / GROUP]));
    choices[t] = search.step(weights[t], importance[t], level);
  }
  float cost[STATES];
  search.costs(cost);
  int state = int(std::min_element(cost, cost + STATES) - cost);
  for (int64_t t = k - 1; t >= 0; --t) {
    if (t % 4 == 3) codes[t / 4] = uint8_t(state);  // four symbols: all of the state
    const int q = state >> 2;
    const int p = int((choices[t].low >> q) & 1) | int((choices[t].high >> q) & 1) << 1;
    state = p * TAILS + q;
  }
}

}  // namespace

extern "C" {

// weights: float32 [rows, k] in units of the row's scale. local: uint8 [rows, groups]. importance:
// float32 [k]. codes: uint8 [rows, k / 4], written.
void chiasm_viterbi(
    const float* weights, const uint8_t* local, const float* importance, const int8_t* table,
    int64_t rows, int64_t k, uint8_t* codes, int threads) {
  const int64_t groups = (k + GROUP - 1) / GROUP;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Choice> choices(k);
#pragma omp for schedule(dynamic, 8)
    for (int64_t row = 0; row < rows; ++row)
      encode_row(
          weights + row * k, local + row * groups, importance, table, k, choices.data(),
          codes + row * (k / 4));
  }
}
}
