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
#include "wide.h"

namespace {

#if LANES

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

// e^x of numbers that are not positive: 2^n times a polynomial of degree 6, right to about 1e-7; of
// those below -87 a number as good as zero.
inline Wide exponential(Wide x) {
  x = larger(x, wide(-87));
  const Wide n = rounded(multiply(x, wide(1.44269504f)));
  Wide r = multiply_add(n, wide(-0.693145752f), x);
  r = multiply_add(n, wide(-1.42860677e-6f), r);
  Wide y = wide(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = multiply_add(y, r, wide(c));
  return scaled(y, n);
}

// Of G query heads with one key.
template <int G>
void dot(const uint16_t* key, const uint16_t* query, int64_t dim, float* score) {
  Wide total[G];
  for (auto& lanes : total) lanes = wide(0);
  for (int64_t d = 0; d < dim; d += 32) {
#if LANES == 512
    const __m512bh held = (__m512bh)_mm512_loadu_si512(key + d);
    for (int g = 0; g < G; ++g)
      total[g] = _mm512_dpbf16_ps(
          total[g], held, (__m512bh)_mm512_loadu_si512(query + g * dim + d));
#else
    for (int64_t i = d; i < d + 32; i += WIDTH) {
      const Wide held = widened(key + i);
      for (int g = 0; g < G; ++g)
        total[g] = multiply_add(held, widened(query + g * dim + i), total[g]);
    }
#endif
  }
  for (int g = 0; g < G; ++g) score[g * BLOCK] = sum(total[g]);
}

// G query heads of one kv head over `count` neighbouring tokens; pointers are to the first head.
template <int G>
void attend_block(
    const Cache& c, const uint16_t* query, int64_t slot, int64_t count, int64_t kv_head,
    float scale, float* top, float* total, float* values) {
  alignas(64) float score[G][BLOCK];
  const uint16_t* key = c.keys + slot * c.slot() + kv_head * c.dim;
  for (int64_t t = 0; t < count; ++t, key += c.slot()) {
    for (int64_t d = 0; d < c.dim; d += 32)
      _mm_prefetch(reinterpret_cast<const char*>(key + d + BLOCK * c.slot()), _MM_HINT_T0);
    dot<G>(key, query, c.dim, &score[0][t]);
  }
  float keep[G];
  for (int g = 0; g < G; ++g) {
    for (int64_t t = 0; t < BLOCK; ++t) score[g][t] = t < count ? score[g][t] * scale : -INFINITY;
    Wide most = load(score[g]);
    for (int64_t t = WIDTH; t < BLOCK; t += WIDTH) most = larger(most, load(score[g] + t));
    const float now = std::max(top[g], largest(most));
    Wide weights = wide(0);
    for (int64_t t = 0; t < BLOCK; t += WIDTH) {
      const Wide weight = exponential(add(load(score[g] + t), wide(-now)));
      store(score[g] + t, weight);
      weights = add(weights, weight);
    }
    keep[g] = std::exp(top[g] - now);
    top[g] = now;
    total[g] = total[g] * keep[g] + sum(weights);
  }
  for (int64_t d = 0; d < c.dim; d += 2 * WIDTH) {
    Wide low[G], high[G];
    for (int g = 0; g < G; ++g) {
      low[g] = multiply(load(values + g * c.dim + d), wide(keep[g]));
      high[g] = multiply(load(values + g * c.dim + d + WIDTH), wide(keep[g]));
    }
    const uint16_t* value = c.values + slot * c.slot() + kv_head * c.dim + d;
    for (int64_t t = 0; t < count; ++t, value += c.slot()) {
      _mm_prefetch(reinterpret_cast<const char*>(value + BLOCK * c.slot()), _MM_HINT_T0);
      const Wide first = widened(value), second = widened(value + WIDTH);
      for (int g = 0; g < G; ++g) {
        const Wide weight = wide(score[g][t]);
        low[g] = multiply_add(weight, first, low[g]);
        high[g] = multiply_add(weight, second, high[g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      store(values + g * c.dim + d, low[g]);
      store(values + g * c.dim + d + WIDTH, high[g]);
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

#if LANES
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
