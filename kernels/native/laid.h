// Rows of x as the products of linear.cpp read them: bytes beside bytes of codes.
//
// Each group of values becomes whole numbers of 16 bits and one scale, and a whole number two bytes,
// 256 * high + low. The rounding is at most 2^-16 of the group's largest value, far below that of a
// bfloat16 result. A load is 64 bytes of codes, seen as planes of one unsigned byte a weight.
#pragma once
#include <memory>

#include "lanes.h"

template <int F>
struct Shape {
  static constexpr int planes = F == INT4 ? 2 : 4;
  static constexpr int width = 64 * planes;               // weights that a step takes
  static constexpr int codes = F == INT8 ? 256 : 64;      // bytes that they are stored in
  static constexpr int group = F == INT8 ? 256 : GROUP;   // values of x that share a scale
  static constexpr bool is_planar = F != INT8;            // byte b of plane p: weight planes * b + p
  // What makes a code an unsigned byte, and is taken from the sums again; INT4's are such bytes.
  static constexpr int offset = F == INT4 ? 0 : 128;
};

template <int F>
struct Laid {
  using S = Shape<F>;
  static constexpr int64_t step_bytes = 128 * S::planes;
  int64_t steps, groups;
  std::unique_ptr<uint8_t[]> memory;
  int8_t* bytes;        // for every step and plane 64 high bytes and 64 low ones
  int32_t* correction;  // for each of the 16 lanes of a step: what the offset adds, negative
  float *scale, *sum;   // of each group: its unit; the values' sum

  Laid(int64_t k, int64_t rows) {
    steps = (k + S::width - 1) / S::width;
    groups = steps * (S::width / S::group);
    const int64_t lanes = S::offset ? rows * steps * 16 : 0;
    memory.reset(new uint8_t[rows * steps * step_bytes + lanes * 4 + rows * groups * 8 + 64]);
    const auto start = (reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64;
    bytes = reinterpret_cast<int8_t*>(start);
    correction = reinterpret_cast<int32_t*>(bytes + rows * steps * step_bytes);
    scale = reinterpret_cast<float*>(correction + lanes);
    sum = scale + rows * groups;
  }

  void fill(int64_t row, const uint16_t* x, int64_t k) const {
    constexpr int parts = S::width / S::group;
    for (int64_t step = 0; step < steps; ++step) {
      alignas(64) int32_t whole[S::width] = {};
      const int64_t at = row * steps + step;
      for (int part = 0; part < parts; ++part) {
        const int64_t first = step * S::width + part * S::group;
        const int count = int(std::clamp<int64_t>(k - first, 0, S::group));
        int32_t* to = whole + part * S::group;
        const float unit = round_group(x + first, count, to);
        scale[row * groups + step * parts + part] = unit;
        int32_t total = 0;
        for (int i = 0; i < S::group; ++i) total += to[i];
        sum[row * groups + step * parts + part] = float(total) * unit;
      }
      for (int quarter = 0; quarter < S::planes; ++quarter)
        split(whole + 64 * quarter, quarter, bytes + at * step_bytes);
      if constexpr (S::offset != 0) correct(bytes + at * step_bytes, correction + at * 16);
    }
  }

  // 64 whole numbers to their places among a step's bytes.
  static void split(const int32_t* whole, int quarter, int8_t* to) {
    alignas(64) int8_t high[64], low[64];
    for (int i = 0; i < 64; i += 16) {
      const __m512i value = _mm512_load_si512(whole + i);
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
      const __m512i lower = _mm512_sub_epi32(value, _mm512_slli_epi32(upper, 8));
      _mm_store_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(upper));
      _mm_store_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(lower));
    }
    if (!S::is_planar) {
      std::memcpy(to + 128 * quarter, high, 64);
      std::memcpy(to + 128 * quarter + 64, low, 64);
      return;
    }
    constexpr int count = 64 / S::planes;
    for (int p = 0; p < S::planes; ++p)
      for (int b = 0; b < count; ++b) {
        to[128 * p + quarter * count + b] = high[S::planes * b + p];
        to[128 * p + quarter * count + b + 64] = low[S::planes * b + p];
      }
  }

  static void correct(const int8_t* from, int32_t* to) {
    const __m512i offset = _mm512_set1_epi8(char(S::offset));
    __m512i high = _mm512_setzero_si512(), low = high;
    for (int p = 0; p < S::planes; ++p) {
      high = _mm512_dpbusd_epi32(high, offset, _mm512_load_si512(from + 128 * p));
      low = _mm512_dpbusd_epi32(low, offset, _mm512_load_si512(from + 128 * p + 64));
    }
    const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    _mm512_store_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), total));
  }
};
