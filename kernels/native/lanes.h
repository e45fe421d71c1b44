// The formats on AVX-512 with VBMI: 64 codes of a byte each at a time.
#pragma once
#include <immintrin.h>

#include "formats.h"

// 256 bytes by index, in four registers.
struct Table {
  __m512i part[4];

  Table(const int8_t* table, uint8_t flip) {
    for (int i = 0; i < 4; ++i) {
      const __m512i signed_ = _mm512_loadu_si512(table + 64 * i);
      part[i] = _mm512_xor_si512(signed_, _mm512_set1_epi8(char(flip)));
    }
  }

  __m512i operator()(__m512i index) const {
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
  }
};

inline __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

// As many bfloat16 as the mask says, and zeros.
inline __m512 widen16(const uint16_t* from, __mmask16 mask) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// The sums over the lanes of each, in the order of _mm512_reduce_add_ps.
inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const __m512 ab = halves(a, b), cd = halves(c, d);
  __m512 total =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  total = _mm512_add_ps(total, _mm512_permute_ps(total, 0x4E));
  total = _mm512_add_ps(total, _mm512_permute_ps(total, 0xB1));
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, total));
}

// As narrow() has them.
inline __m256i narrow16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

inline void store4(__m128 values, uint16_t* out) {
  const __m256i narrowed = narrow16(_mm512_castps128_ps512(values));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(narrowed));
}

// The states of the weights 4i + j of 64 bytes, one register for each j. `before` holds for every
// byte the one before it.
inline void states_by_plane(__m512i bytes, __m512i before, __m512i plane[4]) {
  const __m512i keep6 = _mm512_set1_epi8(char(0xFC)), keep4 = _mm512_set1_epi8(char(0xF0)),
                keep2 = _mm512_set1_epi8(char(0xC0));
  // Shifts are of 16 bits; what they drag in from the neighbouring byte is masked away:
  // 0xCA takes the second operand where the first has ones, else the third.
  plane[0] = _mm512_ternarylogic_epi32(
      keep6, _mm512_slli_epi16(before, 2), _mm512_srli_epi16(bytes, 6), 0xCA);
  plane[1] = _mm512_ternarylogic_epi32(
      keep4, _mm512_slli_epi16(before, 4), _mm512_srli_epi16(bytes, 4), 0xCA);
  plane[2] = _mm512_ternarylogic_epi32(
      keep2, _mm512_slli_epi16(before, 6), _mm512_srli_epi16(bytes, 2), 0xCA);
  plane[3] = bytes;
}

// The states of 64 weights in order, of 16 bytes and those before them.
inline __m512i states_in_order(__m128i bytes, __m128i before) {
  const __m512i window = _mm512_or_si512(
      _mm512_slli_epi32(_mm512_cvtepu8_epi32(before), 8), _mm512_cvtepu8_epi32(bytes));
  const __m512i shift = _mm512_set1_epi64(0x2022242600020406ll);
  return _mm512_multishift_epi64_epi8(shift, window);
}

inline void store16(__m512 low, __m512 high, float* out) {
  _mm512_storeu_ps(out, low);
  _mm512_storeu_ps(out + 16, high);
}

inline void store16(__m512 low, __m512 high, uint16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow16(low));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), narrow16(high));
}

// The 64 whole numbers of a row from weight k on, a multiple of 64, as int8.
template <int F>
inline __m512i levels64(const uint8_t* row, int64_t k, const Table* table) {
  if (F == INT8) return _mm512_loadu_si512(row + k);
  if (F == INT4) {
    const __m512i byte = _mm512_cvtepu8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k / 2)));
    const __m512i nibbles = _mm512_and_si512(
        _mm512_or_si512(byte, _mm512_slli_epi16(byte, 4)), _mm512_set1_epi8(15));
    return _mm512_sub_epi8(nibbles, _mm512_set1_epi8(8));
  }
  const uint8_t* at = row + k / 4;
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  const __m128i before = _mm_maskz_loadu_epi8(k ? 0xFFFF : 0xFFFE, at - 1);
  return (*table)(states_in_order(bytes, before));
}

// 64 whole numbers, each turned to its weight by `value`, to out: `store` takes 32 at a time.
template <typename Out, typename Value, typename Store>
inline void store64(__m512i whole, Value value, Store store, Out* out) {
  const __m128i part[4] = {
      _mm512_castsi512_si128(whole), _mm512_extracti32x4_epi32(whole, 1),
      _mm512_extracti32x4_epi32(whole, 2), _mm512_extracti32x4_epi32(whole, 3)};
  for (int i = 0; i < 4; i += 2)
    store(
        value(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[i]))),
        value(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[i + 1]))), out + 16 * i);
}

// A row of whole groups; false when it is none.
template <typename Out>
inline bool decode_row_lanes(const Stack& s, int64_t row, Out* out) {
  if (s.k % GROUP) return false;
  const uint8_t* codes = s.codes + row * s.row_bytes();
  const int64_t groups = s.groups();
  const auto store = [](__m512 low, __m512 high, Out* to) { store16(low, high, to); };
  const __m512 scale = _mm512_set1_ps(s.row_scale(row));
  if (s.format == INT8) {
    const auto value = [&](__m512 v) { return _mm512_mul_ps(v, scale); };
    for (int64_t k = 0; k < s.k; k += 64)
      store64(levels64<INT8>(codes, k, nullptr), value, store, out + k);
  } else if (s.format == INT4) {
    const auto* scales = static_cast<const uint16_t*>(s.scale) + row * groups;
    const auto* zeros = static_cast<const uint16_t*>(s.aux) + row * groups;
    for (int64_t k = 0; k < s.k; k += 64) {
      const __m512 own = _mm512_set1_ps(widen(scales[k / GROUP]));
      const __m512 zero = _mm512_set1_ps(widen(zeros[k / GROUP]));
      const auto value = [&](__m512 v) { return _mm512_fmadd_ps(v, own, zero); };
      store64(levels64<INT4>(codes, k, nullptr), value, store, out + k);
    }
  } else {
    const Table table(s.table, 0);
    const auto* locals = static_cast<const uint8_t*>(s.aux) + row * groups;
    for (int64_t k = 0; k < s.k; k += 64) {
      const __m512 local = _mm512_set1_ps(float(locals[k / GROUP]));
      // Level times local is exact, so there is one rounding, as specified.
      const auto value = [&](__m512 v) { return _mm512_mul_ps(_mm512_mul_ps(v, local), scale); };
      store64(levels64<TCQ2>(codes, k, &table), value, store, out + k);
    }
  }
  return true;
}
