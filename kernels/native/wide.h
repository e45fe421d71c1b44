// Registers of float32, 16 with AVX-512 and 8 with AVX2, under one name; nothing without either.
//
// LANES: their bits, or 0. Who has not said so multiplies bfloat16.
#pragma once
#ifndef LANES
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(CHIASM_GENERIC)
#define LANES 512
#elif defined(__AVX2__) && defined(__FMA__) && !defined(CHIASM_GENERIC)
#define LANES 256
#else
#define LANES 0
#endif
#endif

#if LANES
#include <immintrin.h>

#include <cstdint>
#endif

#if LANES == 512

using Wide = __m512;
constexpr int64_t WIDTH = 16;

inline Wide wide(float value) { return _mm512_set1_ps(value); }
inline Wide load(const float* at) { return _mm512_loadu_ps(at); }
inline void store(float* at, Wide value) { _mm512_storeu_ps(at, value); }
inline Wide add(Wide a, Wide b) { return _mm512_add_ps(a, b); }
inline Wide multiply(Wide a, Wide b) { return _mm512_mul_ps(a, b); }
inline Wide multiply_add(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
inline Wide larger(Wide a, Wide b) { return _mm512_max_ps(a, b); }
inline float sum(Wide lanes) { return _mm512_reduce_add_ps(lanes); }
inline float largest(Wide lanes) { return _mm512_reduce_max_ps(lanes); }
inline Wide rounded(Wide value) {
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Wide scaled(Wide value, Wide power) { return _mm512_scalef_ps(value, power); }

// The bfloat16 values at `at`, as many as are wide.
inline Wide widened(const uint16_t* at) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

#elif LANES == 256

using Wide = __m256;
constexpr int64_t WIDTH = 8;

inline Wide wide(float value) { return _mm256_set1_ps(value); }
inline Wide load(const float* at) { return _mm256_loadu_ps(at); }
inline void store(float* at, Wide value) { _mm256_storeu_ps(at, value); }
inline Wide add(Wide a, Wide b) { return _mm256_add_ps(a, b); }
inline Wide multiply(Wide a, Wide b) { return _mm256_mul_ps(a, b); }
inline Wide multiply_add(Wide a, Wide b, Wide c) { return _mm256_fmadd_ps(a, b, c); }
inline Wide larger(Wide a, Wide b) { return _mm256_max_ps(a, b); }
inline float sum(Wide lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Wide lanes) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Wide rounded(Wide value) {
  return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// value * 2^power, of a power of at least -126.
inline Wide scaled(Wide value, Wide power) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
  return _mm256_mul_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

inline Wide widened(const uint16_t* at) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

#endif
