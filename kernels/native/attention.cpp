// Attention of single new tokens over bfloat16 histories, read in place, once and front to back.
//
// A history is cut at fixed positions. A cut gives its weighted values, the largest of its scores
// and the sum of its weights, which combine exactly (Dao et al. 2022, arXiv:2205.14135, section
// 3.1). Cuts are combined in order, so a row's result depends neither on the other rows nor on the
// number of threads.
#include <cmath>
#include <memory>
#include <numeric>

#include "formats.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(CHIASM_GENERIC)
#include <immintrin.h>
#define LANES 1
#endif

namespace {

#ifdef LANES

constexpr int64_t CUT = 1024;    // tokens of a cut
constexpr int64_t BLOCK = 32;    // tokens whose scores are held at a time
constexpr int64_t MAX_GROUP = 8;  // query heads of a kv head

// keys and values: [slots, kv_heads, dim].
struct Cache {
  const uint16_t *keys, *values;
  int64_t kv_heads, dim, group;

  int64_t heads() const { return kv_heads * group; }
  int64_t slot() const { return kv_heads * dim; }
};

// A cut's result: of each query head the largest score, the weights' sum and the weighted values.
struct Partial {
  float *largest, *sum, *values;

  Partial(float* at, const Cache& c)
      : largest(at), sum(at + c.heads()), values(at + 2 * c.heads()) {}
  static int64_t size(const Cache& c) { return c.heads() * (2 + c.dim); }
};

// e^x of numbers that are not positive: 2^n times a polynomial of degree 6, right to about 1e-7.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-110));  // whose power is zero, and no infinity
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// G query heads of one kv head over `count` neighbouring tokens; pointers are to the first head.
template <int G>
void attend_block(
    const Cache& c, const uint16_t* query, int64_t slot, int64_t count, int64_t kv_head,
    float scale, float* largest, float* sum, float* values) {
  alignas(64) float score[G][BLOCK];
  const uint16_t* key = c.keys + slot * c.slot() + kv_head * c.dim;
  for (int64_t t = 0; t < count; ++t, key += c.slot()) {
    __m512 total[G];
    for (auto& lanes : total) lanes = _mm512_setzero_ps();
    for (int64_t d = 0; d < c.dim; d += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(key + d + BLOCK * c.slot()), _MM_HINT_T0);
      const __m512bh held = (__m512bh)_mm512_loadu_si512(key + d);
      for (int g = 0; g < G; ++g)
        total[g] = _mm512_dpbf16_ps(
            total[g], held, (__m512bh)_mm512_loadu_si512(query + g * c.dim + d));
    }
    for (int g = 0; g < G; ++g) score[g][t] = _mm512_reduce_add_ps(total[g]) * scale;
  }
  float keep[G];
  for (int g = 0; g < G; ++g) {
    for (int64_t t = count; t < BLOCK; ++t) score[g][t] = -INFINITY;
    const __m512 low = _mm512_load_ps(score[g]), high = _mm512_load_ps(score[g] + 16);
    const float top = std::max(largest[g], _mm512_reduce_max_ps(_mm512_max_ps(low, high)));
    const __m512 weight_low = exponential(_mm512_sub_ps(low, _mm512_set1_ps(top)));
    const __m512 weight_high = exponential(_mm512_sub_ps(high, _mm512_set1_ps(top)));
    _mm512_store_ps(score[g], weight_low);
    _mm512_store_ps(score[g] + 16, weight_high);
    keep[g] = std::exp(largest[g] - top);
    largest[g] = top;
    sum[g] = sum[g] * keep[g] + _mm512_reduce_add_ps(_mm512_add_ps(weight_low, weight_high));
  }
  for (int64_t d = 0; d < c.dim; d += 32) {
    __m512 low[G], high[G];
    for (int g = 0; g < G; ++g) {
      const __m512 factor = _mm512_set1_ps(keep[g]);
      low[g] = _mm512_mul_ps(_mm512_loadu_ps(values + g * c.dim + d), factor);
      high[g] = _mm512_mul_ps(_mm512_loadu_ps(values + g * c.dim + d + 16), factor);
    }
    const uint16_t* value = c.values + slot * c.slot() + kv_head * c.dim + d;
    for (int64_t t = 0; t < count; ++t, value += c.slot()) {
      _mm_prefetch(reinterpret_cast<const char*>(value + BLOCK * c.slot()), _MM_HINT_T0);
      const __m512i bits = _mm512_loadu_si512(value);
      const __m512 first = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16));
      const __m512 second = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16));
      for (int g = 0; g < G; ++g) {
        const __m512 weight = _mm512_set1_ps(score[g][t]);
        low[g] = _mm512_fmadd_ps(weight, first, low[g]);
        high[g] = _mm512_fmadd_ps(weight, second, high[g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      _mm512_storeu_ps(values + g * c.dim + d, low[g]);
      _mm512_storeu_ps(values + g * c.dim + d + 16, high[g]);
    }
  }
}

using Attend = void (*)(
    const Cache&, const uint16_t*, int64_t, int64_t, int64_t, float, float*, float*, float*);
constexpr Attend ATTEND[MAX_GROUP] = {attend_block<1>, attend_block<2>, attend_block<3>,
                                      attend_block<4>, attend_block<5>, attend_block<6>,
                                      attend_block<7>, attend_block<8>};

// Tokens [first, last) of a history that lies in pieces of [slot, number of slots].
void attend_cut(
    const Cache& c, const uint16_t* query, const int64_t* piece, int64_t first, int64_t last,
    float scale, const Partial& to) {
  std::fill(to.largest, to.largest + c.heads(), -INFINITY);
  std::fill(to.sum, to.sum + c.heads() * (1 + c.dim), 0.f);
  for (int64_t begin = 0; begin < last; begin += piece[1], piece += 2) {
    const int64_t end = std::min(begin + piece[1], last);
    for (int64_t t = std::max(begin, first); t < end; t += BLOCK)
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        const int64_t g = h * c.group;
        ATTEND[c.group - 1](
            c, query + g * c.dim, piece[0] + t - begin, std::min(BLOCK, end - t), h, scale,
            to.largest + g, to.sum + g, to.values + g * c.dim);
      }
  }
}

// A row from the partial results of its cuts, added up in those of the first.
void combine(const Cache& c, float* partial, int64_t cuts, uint16_t* out) {
  const Partial all(partial, c);
  for (int64_t h = 0; h < c.heads(); ++h) {
    float top = -INFINITY, sum = 0, *total = all.values + h * c.dim;
    for (int64_t i = 0; i < cuts; ++i) top = std::max(top, partial[i * Partial::size(c) + h]);
    for (int64_t i = 0; i < cuts; ++i) {
      const Partial of(partial + i * Partial::size(c), c);
      const float share = std::exp(of.largest[h] - top);
      sum += share * of.sum[h];
      for (int64_t d = 0; d < c.dim; ++d)
        total[d] = (i ? total[d] : 0) + share * of.values[h * c.dim + d];
    }
    for (int64_t d = 0; d < c.dim; ++d) out[h * c.dim + d] = narrow(total[d] / sum);
  }
}

#endif

}  // namespace

extern "C" {

#ifdef LANES
// Row row[i] of out [T, heads, dim] = attention of that row of query to the length[i] tokens in the
// slots of piece[begin[i]], ..: pairs of the first slot and the number of slots. heads = kv_heads *
// group, dim is a multiple of 32. Only where chiasm_has_bfloat16.
void chiasm_attend(
    const uint16_t* query, const uint16_t* keys, const uint16_t* values, int64_t kv_heads,
    int64_t group, int64_t dim, int64_t count, const int64_t* row, const int64_t* length,
    const int64_t* begin, const int64_t* piece, uint16_t* out, int threads) {
  const Cache c{keys, values, kv_heads, dim, group};
  const float scale = 1 / std::sqrt(float(dim));
  const std::unique_ptr<int64_t[]> first(new int64_t[count + 1]);
  first[0] = 0;
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + (length[i] + CUT - 1) / CUT;
  const int64_t work = std::accumulate(length, length + count, int64_t(0)) * 2 * c.heads() * dim;
  const std::unique_ptr<float[]> partial(new float[first[count] * Partial::size(c)]);
#pragma omp parallel num_threads(worth(work, threads))
  {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < first[count]; ++item) {
      const int64_t i = std::upper_bound(first.get(), first.get() + count, item) - first.get() - 1;
      const int64_t from = (item - first[i]) * CUT;
      attend_cut(
          c, query + row[i] * c.heads() * dim, piece + 2 * begin[i], from,
          std::min(from + CUT, length[i]), scale,
          Partial(partial.get() + item * Partial::size(c), c));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      combine(
          c, partial.get() + first[i] * Partial::size(c), first[i + 1] - first[i],
          out + row[i] * c.heads() * dim);
  }
}
#endif
}
