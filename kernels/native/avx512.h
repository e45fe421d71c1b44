// The products of linear.cpp with AVX-512, VBMI and VNNI: 64 codes of a byte each at a time. Included
// there.
#define INLINE inline __attribute__((always_inline))

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

template <int F>
void multiply(const Stack& s, const Laid<F>& x, const Table* table, const Part& part) {
  using OfBits = std::conditional_t<F == INT4, Int4Row, Tcq2Row>;
  using Row = std::conditional_t<F == INT8, Int8Row, OfBits>;
  int64_t m = 0;
  // Few rows of x at a time: they stay in the nearest cache while those of the matrix pass.
  for (; m + 4 <= part.rows; m += 4) tile<F, Row, 4>(s, x, table, part, m);
  for (; m + 2 <= part.rows; m += 2) tile<F, Row, 2>(s, x, table, part, m);
  for (; m < part.rows; ++m) tile<F, Row, 1>(s, x, table, part, m);
}
