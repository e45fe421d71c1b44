// The products of linear.cpp with AVX2: sixteen codes of 16 bits at a time. Included there.
//
// As in laid.h each group of values of x becomes whole numbers of 16 bits and one scale. A code is
// widened to 16 bits, so a product of both fits the sums of 32 bits, which are exact within a group.
#define INLINE inline __attribute__((always_inline))

constexpr int PARTS = GROUP / 16;  // registers that hold a group's codes
constexpr int64_t AHEAD = 4096;    // bytes; not every machine prefetches streams by itself
constexpr int64_t SCALES_AHEAD = 256;
constexpr int64_t LOOKED_UP = 8;   // rows of tcq2 at a time: their levels stay in the cache

// The levels of four weights by their byte of codes and the six bits before it.
struct Windows {
  static constexpr uint32_t COUNT = 1 << 14;
  int8_t table[STATES];  // that they are made of
  uint32_t four[COUNT];

  explicit Windows(const int8_t* from) {
    std::copy(from, from + STATES, table);
    for (uint32_t window = 0; window < COUNT; ++window) {
      uint32_t levels = 0;
      for (int j = 0; j < 4; ++j)
        levels |= uint32_t(uint8_t(table[(window >> (6 - 2 * j)) & 255])) << (8 * j);
      four[window] = levels;
    }
  }
};

struct Table {
  std::shared_ptr<const Windows> windows;

  // Those made last are kept: a product of small matrices takes no longer than to make them.
  Table(const int8_t* table, uint8_t) {
    static std::mutex mutex;
    static std::shared_ptr<const Windows> kept;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!kept || !std::equal(table, table + STATES, kept->table))
      kept = std::make_shared<const Windows>(table);
    windows = kept;
  }

  // The levels of a row of so many bytes of codes.
  void operator()(const uint8_t* codes, int64_t bytes, uint8_t* out) const {
    const auto of = [four = windows->four](uint64_t window) -> uint64_t {
      return four[window & (Windows::COUNT - 1)];
    };
    uint64_t window = 0;
    int64_t i = 0;
    for (; i + 4 <= bytes; i += 4, out += 16) {
      uint32_t next;
      std::memcpy(&next, codes + i, 4);
      window = window << 32 | __builtin_bswap32(next);
      const uint64_t levels[2] = {
          of(window >> 24) | of(window >> 16) << 32, of(window >> 8) | of(window) << 32};
      std::memcpy(out, levels, 16);
    }
    for (; i < bytes; ++i, out += 4) {
      window = window << 8 | codes[i];
      const uint32_t levels = uint32_t(of(window));
      std::memcpy(out, &levels, 4);
    }
  }
};

// A group's codes of one row of a matrix, in the order in which Laid has the values of x.
struct Codes {
  __m256i part[PARTS];

  INLINE void of_bytes(const void* at) {
    for (int i = 0; i < PARTS; ++i)
      part[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(at) + i));
  }

  // Four nibbles of every 16 bits.
  INLINE void of_nibbles(const void* at) {
    const __m256i low = _mm256_set1_epi16(15);
    for (int i = 0; i < PARTS; i += 4) {
      const __m256i all = _mm256_loadu_si256(static_cast<const __m256i*>(at) + i / 4);
      part[i] = _mm256_and_si256(all, low);
      part[i + 1] = _mm256_and_si256(_mm256_srli_epi16(all, 4), low);
      part[i + 2] = _mm256_and_si256(_mm256_srli_epi16(all, 8), low);
      part[i + 3] = _mm256_srli_epi16(all, 12);
    }
  }

  INLINE __m256i dot(const int16_t* x) const {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    __m256i total = _mm256_madd_epi16(part[0], _mm256_load_si256(at));
    for (int i = 1; i < PARTS; ++i)
      total = _mm256_add_epi32(total, _mm256_madd_epi16(part[i], _mm256_load_si256(at + i)));
    return total;
  }
};

template <int F>
struct Laid {
  int64_t groups;
  std::unique_ptr<uint8_t[]> memory;
  int16_t* whole;      // [rows, groups, GROUP], zeros behind the end of a row
  float *scale, *sum;  // of each group: its unit; the values' sum

  Laid(int64_t k, int64_t rows) : groups((k + GROUP - 1) / GROUP) {
    memory.reset(new uint8_t[rows * groups * (2 * GROUP + 8) + 32]);
    const auto start = (reinterpret_cast<uintptr_t>(memory.get()) + 31) / 32 * 32;
    whole = reinterpret_cast<int16_t*>(start);
    scale = reinterpret_cast<float*>(whole + rows * groups * GROUP);
    sum = scale + rows * groups;
  }

  void fill(int64_t row, const uint16_t* x, int64_t k) const {
    for (int64_t g = 0; g < groups; ++g) {
      int32_t values[GROUP] = {};
      const int count = int(std::min<int64_t>(GROUP, k - g * GROUP));
      const int64_t at = row * groups + g;
      scale[at] = round_group(x + g * GROUP, count, values);
      int32_t total = 0;
      for (int i = 0; i < GROUP; ++i) total += values[i];
      sum[at] = float(total) * scale[at];
      for (int i = 0; i < GROUP; ++i) whole[at * GROUP + place(i)] = int16_t(values[i]);
    }
  }

  static int place(int i) {
    return F == INT4 ? i / 64 * 64 + i % 4 * 16 + i % 64 / 4 : i;
  }
};

// Neighbouring rows of a matrix: their codes, `stride` bytes apart, and what the sums of their groups
// are multiplied with. Levels of tcq2 are looked up before.
template <int F>
struct Rows {
  static constexpr int64_t group_bytes = F == INT4 ? GROUP / 2 : GROUP;
  const Stack& s;
  int64_t first, count;
  const uint8_t* codes;
  int64_t stride;

  // Those that a row has all codes of.
  int64_t whole_groups() const { return stride / group_bytes; }

  INLINE Codes group(int64_t j, int64_t g) const {
    const uint8_t* at = codes + j * stride + g * group_bytes;
    if constexpr (F != TCQ2)  // whose levels are in the cache
      for (int line = 0; line < group_bytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(at + line + AHEAD), _MM_HINT_T0);
    return read(at);
  }

  // The group behind those, with zeros: nothing is read that is not there.
  INLINE Codes rest(int64_t j) const {
    const int64_t first = whole_groups() * group_bytes;
    uint8_t edge[group_bytes] = {};
    std::memcpy(edge, codes + j * stride + first, stride - first);
    return read(edge);
  }

  static INLINE Codes read(const void* at) {
    Codes found;
    F == INT4 ? found.of_nibbles(at) : found.of_bytes(at);
    return found;
  }

  // They come a few bytes a row, in which no processor sees a stream.
  INLINE void fetch_scales(int64_t j) const {
    if (F != INT4) return;
    const int64_t at = 2 * (first + j) * s.groups() + SCALES_AHEAD;
    _mm_prefetch(static_cast<const char*>(s.scale) + at, _MM_HINT_T0);
    _mm_prefetch(static_cast<const char*>(s.aux) + at, _MM_HINT_T0);
  }

  // Those of four whole rows.
  INLINE __m128 scales(int64_t j) const {
    if (F == INT4) return _mm_set1_ps(1);
    return _mm_loadu_ps(static_cast<const float*>(s.scale) + first + j);
  }

  float unit(int64_t j, int64_t g) const {
    const int64_t at = (first + j) * s.groups() + g;
    if (F == INT4) return widen(static_cast<const uint16_t*>(s.scale)[at]);
    return F == TCQ2 ? float(static_cast<const uint8_t*>(s.aux)[at]) : 1;
  }

  // What a value of x is multiplied with beside its code: nibbles are not below zero.
  float offset(int64_t j, int64_t g, float unit) const {
    return widen(static_cast<const uint16_t*>(s.aux)[(first + j) * s.groups() + g]) - 8 * unit;
  }
};

// Four bfloat16.
INLINE __m128 four(const uint16_t* at) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
}

// The sums over the lanes of each, in the order of sum().
INLINE __m128 sums(const Wide* a, int stride) {
  __m128 row[4];
  for (int r = 0; r < 4; ++r) {
    const Wide lanes = a[r * stride];
    row[r] = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  }
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  return _mm_add_ps(_mm_add_ps(row[0], row[2]), _mm_add_ps(row[1], row[3]));
}

// As narrow() has them.
INLINE void store4(__m128 values, uint16_t* out) {
  const __m128i bits = _mm_castps_si128(values);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i up = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7FFF)));
  const __m128i high = _mm_srli_epi32(up, 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(high, high));
}

// A row of a matrix times M rows of x, whose groups begin at `first`.
template <int F, int M>
INLINE void product(
    const Rows<F>& rows, int64_t j, const Laid<F>& x, const int64_t* first, Wide* out) {
  const int64_t whole = rows.whole_groups();
  Wide total[M];
  for (auto& lanes : total) lanes = wide(0);
  // The products with group g, times what `unit` gives for each row of x.
  const auto add_group = [&](const Codes& codes, int64_t g, const auto& unit) {
    for (int m = 0; m < M; ++m) {
      const Wide exact = _mm256_cvtepi32_ps(codes.dot(x.whole + (first[m] + g) * GROUP));
      total[m] = multiply_add(exact, unit(m), total[m]);
    }
  };
  const auto add_single = [&](const Codes& codes, int64_t g) {
    const float unit = rows.unit(j, g);
    add_group(codes, g, [&](int m) { return wide(unit * x.scale[first[m] + g]); });
    if constexpr (F == INT4)
      for (int m = 0; m < M; ++m) {
        const __m128 offset = _mm_set_ss(rows.offset(j, g, unit) * x.sum[first[m] + g]);
        total[m] = add(total[m], _mm256_zextps128_ps256(offset));
      }
  };
  rows.fetch_scales(j);
  int64_t g = 0;
  if constexpr (F == INT4) {
    __m128 zeros[M];
    for (auto& lanes : zeros) lanes = _mm_setzero_ps();
    for (; g + 4 <= whole; g += 4) {
      const int64_t place = (rows.first + j) * x.groups + g;
      const __m128 units = four(static_cast<const uint16_t*>(rows.s.scale) + place);
      const __m128 offsets = _mm_fnmadd_ps(
          _mm_set1_ps(8), units, four(static_cast<const uint16_t*>(rows.s.aux) + place));
      __m256 own[M];
      for (int m = 0; m < M; ++m) {
        own[m] = _mm256_castps128_ps256(_mm_mul_ps(units, _mm_loadu_ps(x.scale + first[m] + g)));
        zeros[m] = _mm_fmadd_ps(offsets, _mm_loadu_ps(x.sum + first[m] + g), zeros[m]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        add_group(rows.group(j, g + i), g + i, [&](int m) {
          return _mm256_permutevar8x32_ps(own[m], _mm256_set1_epi32(i));
        });
    }
    for (int m = 0; m < M; ++m) total[m] = add(total[m], _mm256_zextps128_ps256(zeros[m]));
  }
  for (; g < whole; ++g) add_single(rows.group(j, g), g);
  if (g < x.groups) add_single(rows.rest(j), g);
  std::copy(total, total + M, out);
}

// Rows of a matrix times M rows of x, to `out` [M, n].
template <int F, int M>
void products(const Rows<F>& rows, const Laid<F>& x, const int32_t* index, uint16_t* out) {
  int64_t first[M], j = 0;
  for (int m = 0; m < M; ++m) first[m] = index[m] * x.groups;
  for (; j + 4 <= rows.count; j += 4) {
    Wide total[4][M];
    for (int r = 0; r < 4; ++r) product<F, M>(rows, j + r, x, first, total[r]);
    const __m128 scale = rows.scales(j);
    for (int m = 0; m < M; ++m)
      store4(_mm_mul_ps(sums(&total[0][m], M), scale), out + m * rows.s.n + j);
  }
  for (; j < rows.count; ++j) {
    Wide total[M];
    product<F, M>(rows, j, x, first, total);
    const float scale = rows.s.row_scale(rows.first + j);
    for (int m = 0; m < M; ++m) out[m * rows.s.n + j] = narrow(sum(total[m]) * scale);
  }
}

// Rows of a matrix times all rows of x of a part.
template <int F>
void multiply(const Rows<F>& rows, const Laid<F>& x, const Part& part, uint16_t* out) {
  const int64_t n = rows.s.n;
  int64_t m = 0;
  for (; m + 4 <= part.rows; m += 4) products<F, 4>(rows, x, part.index + m, out + m * n);
  for (; m + 2 <= part.rows; m += 2) products<F, 2>(rows, x, part.index + m, out + m * n);
  for (; m < part.rows; ++m) products<F, 1>(rows, x, part.index + m, out + m * n);
}

template <int F>
void multiply(const Stack& s, const Laid<F>& x, const Table* table, const Part& part) {
  const int64_t first = part.expert * s.n + part.begin, count = part.end - part.begin;
  const uint8_t* codes = s.codes + first * s.row_bytes();
  if constexpr (F != TCQ2) {
    multiply(Rows<F>{s, first, count, codes, s.row_bytes()}, x, part, part.out + part.begin);
  } else {
    const int64_t stride = x.groups * GROUP;
    const std::unique_ptr<uint8_t[]> levels(new uint8_t[LOOKED_UP * stride]());
    for (int64_t j = 0; j < count; j += LOOKED_UP) {
      const int64_t some = std::min(LOOKED_UP, count - j);
      for (int64_t i = 0; i < some; ++i)
        (*table)(codes + (j + i) * s.row_bytes(), s.row_bytes(), levels.get() + i * stride);
      multiply(
          Rows<F>{s, first + j, some, levels.get(), stride}, x, part, part.out + part.begin + j);
    }
  }
}
