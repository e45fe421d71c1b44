// Products of few rows with low-precision matrices, which are read once, as they are stored; and whole
// experts made of them.
//
// Sums within a group are exact; those over groups are float32, in one order, so a row's result does
// not depend on the other rows, nor on the number of threads.
#include <memory>
#include <vector>

#include "swiglu.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && !defined(CHIASM_GENERIC)
#include "laid.h"
#define LANES 1
#endif

namespace {

constexpr int64_t CHUNK_BYTES = 256 << 10;  // of a matrix that a thread takes at a time
constexpr int64_t COMBINED = 512;           // columns that a thread adds up at a time

// Rows index[begin[r]], .., index[end[r] - 1] of x go through matrix expert[r].
struct Runs {
  int32_t count;
  const int32_t *expert, *begin, *end, *index;

  int64_t rows() const {
    int64_t all = 0;
    for (int32_t r = 0; r < count; ++r) all += end[r] - begin[r];
    return all;
  }
};

// A piece of work: rows [begin, end) of one matrix times some rows of x.
struct Part {
  int64_t expert, begin, end, rows;
  const int32_t* index;
  uint16_t* out;
};

#ifdef LANES

constexpr int64_t AHEAD = 8192;  // bytes; not every machine prefetches streams by itself

// A row of a matrix. load: the codes of step i as unsigned bytes by plane, of which `count` are
// there. scales: those of 16 groups from g on, as far as there are any. scale: that of the whole row.
struct Int8Row {
  const uint8_t* codes;
  float scale;

  Int8Row() = default;
  Int8Row(const Stack& s, int64_t row, const Table*)
      : codes(s.codes + row * s.k), scale(s.row_scale(row)) {}
  template <bool IS_EDGE>
  void load(int64_t i, int64_t count, __m512i plane[4]) const {
    for (int p = 0; p < 4; ++p) {
      const uint8_t* at = codes + 256 * i + 64 * p;
      const __m512i code =
          IS_EDGE ? _mm512_maskz_loadu_epi8(first_bytes(count - 64 * p), at) : _mm512_loadu_si512(at);
      plane[p] = _mm512_xor_si512(code, _mm512_set1_epi8(char(0x80)));
    }
  }
};

struct Int4Row {
  const uint8_t* codes;
  const uint16_t *own, *zero;
  static constexpr float scale = 1;

  Int4Row() = default;
  Int4Row(const Stack& s, int64_t row, const Table*)
      : codes(s.codes + row * (s.k / 2)),
        own(static_cast<const uint16_t*>(s.scale) + row * s.groups()),
        zero(static_cast<const uint16_t*>(s.aux) + row * s.groups()) {}
  template <bool IS_EDGE>
  void load(int64_t i, int64_t count, __m512i plane[2]) const {
    const uint8_t* at = codes + 64 * i;
    const __m512i code =
        IS_EDGE ? _mm512_maskz_loadu_epi8(first_bytes(count), at) : _mm512_loadu_si512(at);
    const __m512i low = _mm512_set1_epi8(15);
    plane[0] = _mm512_and_si512(code, low);
    plane[1] = _mm512_and_si512(_mm512_srli_epi16(code, 4), low);
  }
  __m512 scales(int64_t g, __mmask16 mask) const { return widen16(own + g, mask); }
  // What a group's values are multiplied with beside their codes: these are not below zero.
  __m512 offsets(int64_t g, __mmask16 mask, __m512 scales) const {
    return _mm512_fnmadd_ps(_mm512_set1_ps(8), scales, widen16(zero + g, mask));
  }
};

struct Tcq2Row {
  const Table* table;
  const uint8_t *codes, *local;
  float scale;

  Tcq2Row() = default;
  Tcq2Row(const Stack& s, int64_t row, const Table* t)
      : table(t),
        codes(s.codes + row * (s.k / 4)),
        local(static_cast<const uint8_t*>(s.aux) + row * s.groups()),
        scale(s.row_scale(row)) {}
  template <bool IS_EDGE>
  void load(int64_t i, int64_t count, __m512i plane[4]) const {
    const uint8_t* at = codes + 64 * i;
    const __mmask64 mask = IS_EDGE ? first_bytes(count) : ~0ull;
    const __m512i code = _mm512_maskz_loadu_epi8(mask, at);
    // Before a row is a zero.
    const __m512i before = _mm512_maskz_loadu_epi8(i ? mask : mask & ~1ull, at - 1);
    __m512i state[4];
    states_by_plane(code, before, state);
    for (int p = 0; p < 4; ++p) plane[p] = (*table)(state[p]);
  }
  __m512 scales(int64_t g, __mmask16 mask) const {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, local + g)));
  }
};

#define INLINE inline __attribute__((always_inline))

// R rows of a matrix at a time, times M rows of x.
template <int F, class Row, int R, int M>
struct Product {
  using S = Shape<F>;
  static constexpr int parts = S::width / S::group, block = 16 / parts;  // groups, steps
  const int64_t row_bytes, groups;
  const int8_t* bytes[M];
  const int32_t* correction[M];
  const float *scale[M], *sum[M];

  Product(const Stack& s, const Laid<F>& x, const int32_t* index)
      : row_bytes(s.row_bytes()), groups(std::min(s.groups(), x.groups)) {
    for (int m = 0; m < M; ++m) {
      bytes[m] = x.bytes + index[m] * x.steps * S::planes * 128;
      if constexpr (S::offset != 0) correction[m] = x.correction + index[m] * x.steps * 16;
      scale[m] = x.scale + index[m] * x.groups;
      sum[m] = x.sum + index[m] * x.groups;
    }
  }

  // Of a row of the matrix and one of x.
  struct Pair {
    __m512 total = _mm512_setzero_ps();
    alignas(64) float unit[16];  // of a row's group times that of x, for the groups of a block
  };

  // The units from group g on, and what INT4's offsets add.
  INLINE void begin(const Row row[R], int64_t g, Pair pair[R][M]) const {
    const __mmask16 mask = __mmask16(first_bytes(std::min<int64_t>(16, groups - g)));
    for (int r = 0; r < R; ++r) {
      const __m512 scales = row[r].scales(g, mask);
      for (int m = 0; m < M; ++m) {
        Pair& at = pair[r][m];
        _mm512_store_ps(at.unit, _mm512_mul_ps(scales, _mm512_maskz_loadu_ps(mask, scale[m] + g)));
        if constexpr (F == INT4)
          at.total = _mm512_fmadd_ps(
              row[r].offsets(g, mask, scales), _mm512_maskz_loadu_ps(mask, sum[m] + g), at.total);
      }
    }
  }

  template <bool IS_EDGE>
  INLINE void step(const Row row[R], int64_t i, Pair pair[R][M]) const {
    __m512i plane[R][S::planes];
    for (int r = 0; r < R; ++r) {
      for (int line = 0; line < S::codes; line += 64)
        _mm_prefetch(row[r].codes + S::codes * i + line + AHEAD, _MM_HINT_T1);
      row[r].template load<IS_EDGE>(i, row_bytes - i * S::codes, plane[r]);
    }
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) {
        const float* own = F == INT8 ? scale[m] + i : pair[r][m].unit + i % block * parts;
        __m512 unit = _mm512_set1_ps(own[0]);
        if constexpr (parts == 2) unit = _mm512_mask_blend_ps(0xFF00, unit, _mm512_set1_ps(own[1]));
        const __m512 whole = _mm512_cvtepi32_ps(dot(plane[r], m, i));
        pair[r][m].total = _mm512_fmadd_ps(whole, unit, pair[r][m].total);
      }
  }

  INLINE __m512i dot(const __m512i plane[S::planes], int m, int64_t i) const {
    const int8_t* at = bytes[m] + i * S::planes * 128;
    __m512i high = _mm512_setzero_si512(), low = high;
    if constexpr (S::offset != 0) low = _mm512_load_si512(correction[m] + i * 16);
    for (int p = 0; p < S::planes; ++p) {
      high = _mm512_dpbusd_epi32(high, plane[p], _mm512_load_si512(at + 128 * p));
      low = _mm512_dpbusd_epi32(low, plane[p], _mm512_load_si512(at + 128 * p + 64));
    }
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  }

  // To R columns of M rows of `out` [.., n].
  INLINE void run(const Row row[R], uint16_t* out, int64_t n) const {
    const int64_t whole = row_bytes / S::codes, all = (row_bytes + S::codes - 1) / S::codes;
    Pair pair[R][M];
    for (int64_t first = 0; first < all; first += block) {
      if constexpr (F != INT8) begin(row, first * parts, pair);
      const int64_t end = std::min(whole, first + block);
      for (int64_t i = first; i < end; ++i) step<false>(row, i, pair);
      if (end == whole && whole < all) step<true>(row, whole, pair);
    }
    for (int m = 0; m < M; ++m, out += n)
      if constexpr (R == 4) {
        const __m128 scale = _mm_setr_ps(row[0].scale, row[1].scale, row[2].scale, row[3].scale);
        const __m128 total =
            sums(pair[0][m].total, pair[1][m].total, pair[2][m].total, pair[3][m].total);
        store4(_mm_mul_ps(total, scale), out);
      } else {
        for (int r = 0; r < R; ++r)
          out[r] = narrow(_mm512_reduce_add_ps(pair[r][m].total) * row[r].scale);
      }
  }
};

// Rows j, .. of the matrix, R at a time as long as there are so many, times M rows of x from m on.
template <int F, class Row, int R, int M>
void products(
    const Stack& s, const Laid<F>& x, const Table* table, const Part& part, int64_t m, int64_t& j) {
  const Product<F, Row, R, M> product(s, x, part.index + m);
  for (; j + R <= part.end; j += R) {
    Row rows[R];
    for (int r = 0; r < R; ++r) rows[r] = Row(s, part.expert * s.n + j + r, table);
    product.run(rows, part.out + m * s.n + j, s.n);
  }
}

template <int F, class Row, int M>
void tile(const Stack& s, const Laid<F>& x, const Table* table, const Part& part, int64_t m) {
  int64_t j = part.begin;
  // What is loaded of one row of x serves four of a matrix, where registers suffice.
  if (M == 1 && F != TCQ2) products<F, Row, 4, M>(s, x, table, part, m, j);
  products<F, Row, 2, M>(s, x, table, part, m, j);
  products<F, Row, 1, M>(s, x, table, part, m, j);
}

template <int F, class Row>
void multiply(const Stack& s, const Laid<F>& x, const Table* table, const Part& part) {
  int64_t m = 0;
  // Few rows of x at a time: they stay in the nearest cache while those of the matrix pass.
  for (; m + 4 <= part.rows; m += 4) tile<F, Row, 4>(s, x, table, part, m);
  for (; m + 2 <= part.rows; m += 2) tile<F, Row, 2>(s, x, table, part, m);
  for (; m < part.rows; ++m) tile<F, Row, 1>(s, x, table, part, m);
}

#else
#include "generic.h"
#endif

// A product that a team of threads takes on: all of them call work() with the same arguments.
struct Task {
  virtual void work() const = 0;
  virtual ~Task() = default;
};

template <int F, class Row>
struct Linear : Task {
  const Stack& s;
  const uint16_t* x;
  int64_t num_rows;
  Runs runs;
  uint16_t* out;
  Laid<F> laid;
  std::unique_ptr<Table> table;

  Linear(const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out)
      : s(s), x(x), num_rows(num_rows), runs(runs), out(out), laid(s.k, num_rows) {
    if (F == TCQ2) table.reset(new Table(s.table, 0x80));
  }

  void work() const override {
    const int64_t chunk = std::max<int64_t>(2, CHUNK_BYTES / s.row_bytes() / 2 * 2);
    const int64_t chunks = (s.n + chunk - 1) / chunk;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) laid.fill(row, x + row * s.k, s.k);
    // Dynamic: a core may be another process's for a while, and its share must not wait for it.
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < runs.count * chunks; ++item) {
      const int64_t run = item / chunks, first = runs.begin[run], begin = item % chunks * chunk;
      Part part;
      part.expert = runs.expert[run];
      part.rows = runs.end[run] - first;
      part.index = runs.index + first;
      part.begin = begin;
      part.end = std::min(s.n, begin + chunk);
      part.out = out + first * s.n;
      multiply<F, Row>(s, laid, table.get(), part);
    }
  }
};

std::unique_ptr<Task> linear(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out) {
  using Made = std::unique_ptr<Task>;
  if (s.format == INT8) return Made(new Linear<INT8, Int8Row>(s, x, num_rows, runs, out));
  if (s.format == INT4) return Made(new Linear<INT4, Int4Row>(s, x, num_rows, runs, out));
  return Made(new Linear<TCQ2, Tcq2Row>(s, x, num_rows, runs, out));
}

// Adds weight[i] * row i of `results` to row slot[i] of `values`, by ascending i.
void combine(
    const uint16_t* results, int64_t width, const float* weight, const int64_t* slot, int64_t count,
    float* values) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < width; first += COMBINED) {
    const int64_t end = std::min(width, first + COMBINED);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = first; j < end; ++j)
        values[slot[i] * width + j] += widen(results[i * width + j]) * weight[i];
  }
}

}  // namespace

extern "C" {

// Row i of out [.., n] = row index[i] of x [num_rows, k] times a matrix transposed: that of expert[r]
// for i in [begin[r], end[r]); rows of no run are left alone. x and out are bfloat16.
void chiasm_linear(
    const Stack* s, const uint16_t* x, int64_t num_rows, int32_t num_runs, const int32_t* expert,
    const int32_t* begin, const int32_t* end, const int32_t* index, uint16_t* out, int threads) {
  const Runs runs{num_runs, expert, begin, end, index};
  const auto product = linear(*s, x, num_rows, runs, out);
#pragma omp parallel num_threads(worth(runs.rows() * s->n * s->k, threads))
  product->work();
}

// Whole experts, down(silu(gate(x)) * up(x)), of few pairs of a token and an expert. Pair i is of row
// index[i] of x [num_rows, gate_up.k] and of the expert whose run holds it; weight[i] times its result
// is added to row slot[i] of `values`.
void chiasm_experts(
    const Stack* gate_up, const Stack* down, const uint16_t* x, int64_t num_rows, int32_t num_runs,
    const int32_t* expert, const int32_t* begin, const int32_t* end, const int32_t* index,
    const float* weight, const int64_t* slot, float* values, int threads) {
  Runs runs{num_runs, expert, begin, end, index};
  const int64_t pairs = runs.rows(), width = down->k, out = down->n;
  using Values = std::unique_ptr<uint16_t[]>;  // not a vector, which would be set to zero first
  const Values both(new uint16_t[pairs * 2 * width]), inner(new uint16_t[pairs * width]),
      results(new uint16_t[pairs * out]);
  std::vector<int32_t> straight(pairs);
  for (int64_t i = 0; i < pairs; ++i) straight[i] = int32_t(i);
  const auto first = linear(*gate_up, x, num_rows, runs, both.get());
  runs.index = straight.data();
  const auto second = linear(*down, inner.get(), pairs, runs, results.get());
#pragma omp parallel num_threads(worth(pairs * 2 * width * gate_up->k, threads))
  {
    first->work();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs; ++i)
      swiglu(both.get() + 2 * i * width, width, inner.get() + i * width);
    second->work();
    combine(results.get(), out, weight, slot, pairs, values);
  }
}

// Whether the products use the instructions above.
int chiasm_has_lanes() {
#ifdef LANES
  return 1;
#else
  return 0;
#endif
}
}
