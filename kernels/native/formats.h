// What kernels/quant/formats.py says of the formats, as C++ sees it. One matrix is [n, k], row by row.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

constexpr int GROUP = 128;
constexpr int STATES = 256;

enum Format : int32_t { INT8 = 0, INT4 = 1, TCQ2 = 2, DENSE = 3 };

// A stack of matrices. scale: int8 float [e, n]; int4 bfloat16 [e, n, groups]; tcq2 (`row`) float
// [e, n]. aux: int4 (`zero`) bfloat16 [e, n, groups]; tcq2 (`local`) uint8 [e, n, groups].
struct Stack {
  int32_t format;
  int64_t n, k;
  const uint8_t* codes;
  const void* scale;
  const void* aux;
  const int8_t* table;

  int64_t groups() const { return (k + GROUP - 1) / GROUP; }
  int64_t row_bytes() const {
    return format == INT8 ? k : format == INT4 ? k / 2 : format == TCQ2 ? k / 4 : 2 * k;
  }
  // That of all of a row's weights; 1 in formats that have none.
  float row_scale(int64_t row) const {
    return format == INT8 || format == TCQ2 ? static_cast<const float*>(scale)[row] : 1;
  }
};

// Threads for work of so many multiplications: to wake one takes as long as many of them.
inline int worth(int64_t multiplications, int threads) {
  constexpr int64_t EACH = 1 << 19;
  return int(std::clamp<int64_t>(multiplications / EACH, 1, std::max(threads, 1)));
}

inline float widen(uint16_t bfloat) {
  uint32_t bits = uint32_t(bfloat) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest, ties to even, as torch rounds; finite values only.
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// The whole numbers of one group of a row, before any scale: int8 codes, nibbles, or table levels.
// `row` points at the row's codes; `count` weights from weight `first`, a multiple of GROUP.
inline void levels(const Stack& s, const uint8_t* row, int64_t first, int count, int32_t* out) {
  if (s.format == INT8) {
    for (int i = 0; i < count; ++i) out[i] = int8_t(row[first + i]);
  } else if (s.format == INT4) {
    for (int i = 0; i < count / 2; ++i) {
      uint8_t byte = row[first / 2 + i];
      out[2 * i] = byte & 15;
      out[2 * i + 1] = byte >> 4;
    }
  } else {
    uint32_t window = first ? row[first / 4 - 1] : 0;
    for (int i = 0; i < count / 4; ++i) {
      window = (window << 8) | row[first / 4 + i];
      for (int j = 0; j < 4; ++j) out[4 * i + j] = s.table[(window >> (6 - 2 * j)) & 255];
    }
  }
}

// The weights of one group of a row but for the row's scale, each rounded once.
inline void unscaled(const Stack& s, int64_t row, int64_t group, int count, float* out) {
  const int64_t at = row * s.groups() + group;
  int32_t whole[GROUP];
  levels(s, s.codes + row * s.row_bytes(), group * GROUP, count, whole);
  float scale = 1, zero = 0;
  if (s.format == INT4) {
    scale = widen(static_cast<const uint16_t*>(s.scale)[at]);
    zero = widen(static_cast<const uint16_t*>(s.aux)[at]);
  } else if (s.format == TCQ2) {
    scale = static_cast<const uint8_t*>(s.aux)[at];
  }
  const int offset = s.format == INT4 ? 8 : 0;
  for (int i = 0; i < count; ++i) out[i] = float(whole[i] - offset) * scale + zero;
}

// Values of x as whole numbers of at most 127 * 256, so that the high byte stays within 127 when the
// low one is rounded up; returns their unit.
inline float round_group(const uint16_t* x, int count, int32_t* whole) {
  uint16_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max<uint16_t>(largest, x[i] & 0x7FFF);
  if (widen(largest) < 1e-30f) return 0;  // what such a group adds is nothing
  const float unit = widen(largest) / 32512, inverse = 1 / unit;
  for (int i = 0; i < count; ++i) whole[i] = int32_t(std::nearbyintf(widen(x[i]) * inverse));
  return unit;
}
