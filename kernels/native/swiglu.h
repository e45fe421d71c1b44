// SiLU of the gate times up, of bfloat16, in one pass: torch takes three, and copies the halves.
#pragma once
#include "formats.h"

// e^x to a few units of float32's last place, infinite from 88.4 on: a power of two and a polynomial
// of the rest, with the constants of Cephes' expf (S. Moshier, netlib.org/cephes).
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 89.0f);
  const float n = std::nearbyintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}

// One row of gate, then up. As torch has it, silu is rounded before it is multiplied.
inline void swiglu(const uint16_t* gate, int64_t width, uint16_t* out) {
  const uint16_t* up = gate + width;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float x = widen(gate[i]);
    out[i] = narrow(widen(narrow(x / (1 + exponential(-x)))) * widen(up[i]));
  }
}
