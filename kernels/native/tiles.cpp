// Products of many bfloat16 rows by the processor's tiles (AMX), for matrices of any format.
//
// A tile holds 16 rows of 64 bytes. The matrix's rows are a product's left operand: bfloat16 ones
// are loaded from where they are stored, others (and ends of matrices) are widened, 64 rows at a
// time, into a buffer that stays in the cache. Rows of x are the right operand, laid out before.
// Sums are float32, in one order, so a row's result does not depend on the other rows, nor on the
// number of threads. What is smaller than float32's smallest normal number counts as zero.
#include <memory>
#include <vector>

#include "clock.h"
#include "formats.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__) && \
    defined(__linux__) && !defined(CHIASM_GENERIC)
#include <sys/syscall.h>
#include <unistd.h>

#include "lanes.h"
#define TILES 1
#endif

namespace {

#ifdef TILES

constexpr int64_t SIDE = 16;            // rows of a tile
constexpr int64_t DEPTH = 32;           // bfloat16 values of a tile's row
constexpr int64_t TILE = SIDE * DEPTH;  // values of a tile
constexpr int64_t BLOCK = 2 * SIDE;     // rows of the matrix that are multiplied at a time
constexpr int64_t CHUNK = 2 * BLOCK;    // rows of the matrix that a thread takes at a time

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  Config() {
    for (int i = 0; i < 4; ++i) row_bytes[i] = 64, rows[i] = SIDE;
  }
};

// Compilers do not know what memory a tile is loaded from: all that was written is written by here.
inline void written() { asm volatile("" ::: "memory"); }

// The system lets a process use tiles once it has asked.
bool is_permitted() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

template <typename T>
struct Aligned {
  std::unique_ptr<uint8_t[]> memory;
  T* at;

  explicit Aligned(int64_t count) : memory(new uint8_t[count * sizeof(T) + 64]) {
    at = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  }
};

// 16 rows of 16 dwords, seen as columns.
void transpose(__m512i row[SIDE]) {
  __m512i pair[SIDE], four[SIDE];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm512_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
      four[i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(four[j], four[j + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(four[j], four[j + 4], 0xDD);
    const __m512i low2 = _mm512_shuffle_i32x4(four[j + 8], four[j + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(four[j + 8], four[j + 12], 0xDD);
    row[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    row[j + 8] = _mm512_shuffle_i32x4(low, low2, 0xDD);
    row[j + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    row[j + 12] = _mm512_shuffle_i32x4(high, high2, 0xDD);
  }
}

// Up to 16 rows of x as right operands: a tile for every 32 values, whose row i holds values 2i and
// 2i + 1 of each row of x.
void lay(const uint16_t* x, int64_t k, const int32_t* index, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < k; i += DEPTH, out += TILE) {
    const auto mask = __mmask32(first_bytes(k - i));
    __m512i row[SIDE];
    for (int64_t m = 0; m < SIDE; ++m)
      row[m] = m < count ? _mm512_maskz_loadu_epi16(mask, x + index[m] * k + i)
                         : _mm512_setzero_si512();
    transpose(row);
    for (int64_t m = 0; m < SIDE; ++m) _mm512_store_si512(out + m * DEPTH, row[m]);
  }
}

struct Widener {
  const Stack& s;
  std::unique_ptr<Table> table;

  explicit Widener(const Stack& s) : s(s) {
    if (s.format == TCQ2) table.reset(new Table(s.table, 0));
  }

  // A row but for its scale, by which its sums are multiplied, and zeros up to `width`.
  void operator()(int64_t row, int64_t width, uint16_t* out) const {
    std::memset(out + s.k, 0, (width - s.k) * 2);
    const uint8_t* codes = s.codes + row * s.row_bytes();
    if (s.format == DENSE) {
      std::memcpy(out, codes, s.k * 2);
      return;
    }
    for (int64_t group = 0; group < s.groups(); ++group) {
      uint16_t* to = out + group * GROUP;
      if (s.k - group * GROUP >= GROUP)
        whole_group(codes, row, group, to);
      else
        part_group(row, group, int(s.k - group * GROUP), to);
    }
  }

  void whole_group(const uint8_t* codes, int64_t row, int64_t group, uint16_t* out) const {
    const int64_t at = row * s.groups() + group, first = group * GROUP;
    if (s.format == INT8) {
      widen_group<INT8>(codes, first, [](__m512 v) { return v; }, out);
    } else if (s.format == INT4) {
      const __m512 scale = _mm512_set1_ps(widen(static_cast<const uint16_t*>(s.scale)[at]));
      const __m512 zero = _mm512_set1_ps(widen(static_cast<const uint16_t*>(s.aux)[at]));
      const auto value = [&](__m512 v) { return _mm512_fmadd_ps(v, scale, zero); };
      widen_group<INT4>(codes, first, value, out);
    } else {
      const __m512 local = _mm512_set1_ps(float(static_cast<const uint8_t*>(s.aux)[at]));
      widen_group<TCQ2>(codes, first, [&](__m512 v) { return _mm512_mul_ps(v, local); }, out);
    }
  }

  template <int F, typename Value>
  void widen_group(const uint8_t* codes, int64_t first, Value value, uint16_t* out) const {
    const auto store = [](__m512 low, __m512 high, uint16_t* to) {
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    };
    for (int i = 0; i < GROUP; i += 64)
      store64(levels64<F>(codes, first + i, table.get()), value, store, out + i);
  }

  void part_group(int64_t row, int64_t group, int count, uint16_t* out) const {
    float values[GROUP];
    unscaled(s, row, group, count, values);
    for (int i = 0; i < count; ++i) out[i] = narrow(values[i]);
  }
};

// 32 rows of a matrix, `stride` bytes apart, times 16 rows of x -> out, two tiles of float.
//
// Four tiles are in use and no more: of those that a core renames them to, its threads share few,
// and with all eight in use (two by two sums) a product was seen to wait for the one before.
void block(
    const uint16_t* rows, int64_t stride, const uint16_t* x, int64_t steps, float* out) {
  const uint16_t* lower = rows + SIDE * stride / 2;
  written();
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(3, x + i * TILE, 64);
    _tile_loadd(2, rows + i * DEPTH, stride);
    _tile_dpbf16ps(0, 2, 3);
    _tile_loadd(2, lower + i * DEPTH, stride);
    _tile_dpbf16ps(1, 2, 3);
  }
  _tile_stored(0, out, 64);
  _tile_stored(1, out + 256, 64);
}

// A tile of sums [rows of the matrix, rows of x] to out [rows of x, n].
void put(
    const float* sums, const float* scale, int64_t rows, int64_t count, uint16_t* out, int64_t n) {
  __m512i row[SIDE];
  for (int i = 0; i < SIDE; ++i) {
    const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums + i * 16), _mm512_set1_ps(scale[i]));
    row[i] = _mm512_castps_si512(scaled);
  }
  transpose(row);
  const auto mask = __mmask16(first_bytes(rows));  // none of what the matrix does not have
  for (int64_t m = 0; m < count; ++m) {
    const auto values = (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(row[m]));
    _mm256_mask_storeu_epi16(out + m * n, mask, values);
  }
}

// One run of rows of x, laid out in blocks of 16, through rows [begin, end) of one matrix.
struct Part {
  int64_t expert, begin, end, count;
  const uint16_t* x;
  uint16_t* out;
};

void multiply(const Widener& widener, const Part& part, int64_t steps, uint16_t* buffer) {
  const Stack& s = widener.s;
  const int64_t height = part.end - part.begin, first = part.expert * s.n + part.begin;
  const bool is_direct = s.format == DENSE && s.k % DEPTH == 0 && height == CHUNK;
  // A line more than a row is long, or the same place of all rows would fall on the same lines.
  const int64_t stride = is_direct ? s.k * 2 : steps * 64 + 64;
  const auto* rows = is_direct ? reinterpret_cast<const uint16_t*>(s.codes) + first * s.k : buffer;
  alignas(64) float sums[BLOCK * SIDE], scale[CHUNK] = {};
  if (!is_direct)
    for (int64_t j = 0; j < height; ++j) widener(first + j, steps * DEPTH, buffer + j * stride / 2);
  for (int64_t j = 0; j < height; ++j) scale[j] = s.row_scale(first + j);
  for (int64_t m = 0; m < part.count; m += SIDE) {
    const uint16_t* x = part.x + m * steps * DEPTH;
    for (int64_t j = 0; j < height; j += BLOCK) {
      block(rows + j * stride / 2, stride, x, steps, sums);
      for (int64_t i = j; i < std::min(height, j + BLOCK); i += SIDE) {
        uint16_t* out = part.out + m * s.n + part.begin + i;
        put(sums + (i - j) * SIDE, scale + i, height - i, std::min(SIDE, part.count - m), out, s.n);
      }
    }
  }
}

#endif

}  // namespace

extern "C" {

#ifdef TILES
// As chiasm_linear, also of bfloat16 matrices; only where chiasm_has_tiles.
void chiasm_tiles(
    const Stack* s, const uint16_t* x, int32_t num_runs, const int32_t* expert,
    const int32_t* begin, const int32_t* end, const int32_t* index, int64_t* spent, uint16_t* out,
    int threads) {
  const int64_t steps = (s->k + DEPTH - 1) / DEPTH, chunks = (s->n + CHUNK - 1) / CHUNK;
  std::vector<int64_t> first(num_runs + 1);  // of each run's 16 rows of x among all
  for (int32_t r = 0; r < num_runs; ++r)
    first[r + 1] = first[r] + (end[r] - begin[r] + SIDE - 1) / SIDE;
  const Aligned<uint16_t> laid(first[num_runs] * steps * TILE);
#pragma omp parallel num_threads(worth(first[num_runs] * SIDE * s->n * s->k, threads))
  {
    const Config config;
    written();
    _tile_loadconfig(&config);
    const Widener widener(*s);
    const Aligned<uint16_t> buffer(CHUNK * (steps + 1) * DEPTH);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < first[num_runs]; ++b) {
      const auto r = std::upper_bound(first.begin(), first.end(), b) - first.begin() - 1;
      const int64_t at = begin[r] + (b - first[r]) * SIDE;
      lay(x, s->k, index + at, std::min(SIDE, end[r] - at), laid.at + b * steps * TILE);
    }
    // Dynamic: a core may be another process's for a while, and its share must not wait for it.
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_runs * chunks; ++item) {
      const int64_t r = item / chunks, row = item % chunks * CHUNK;
      const Clock clock(spent, expert[r]);
      multiply(
          widener,
          {expert[r], row, std::min(s->n, row + CHUNK), end[r] - begin[r],
           laid.at + first[r] * steps * TILE, out + begin[r] * s->n},
          steps, buffer.at);
    }
    _tile_release();
  }
}

int chiasm_has_tiles() { return is_permitted(); }
#else
int chiasm_has_tiles() { return 0; }
#endif
}
