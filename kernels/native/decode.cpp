// Matrices in full width, the same bits as `dequantize` of kernels/quant/formats.py.
#include "formats.h"

#if defined(__AVX512VBMI__) && !defined(CHIASM_GENERIC)
#define LANES 1
#include "lanes.h"
#endif

namespace {

void store(const float* values, int count, float* out) { std::copy(values, values + count, out); }

void store(const float* values, int count, uint16_t* out) {
  for (int i = 0; i < count; ++i) out[i] = narrow(values[i]);
}

template <typename Out>
void decode_row(const Stack& s, int64_t row, Out* out) {
  const float scale = s.row_scale(row);
  float values[GROUP];
  for (int64_t group = 0; group < s.groups(); ++group) {
    const int count = int(std::min<int64_t>(GROUP, s.k - group * GROUP));
    unscaled(s, row, group, count, values);
    for (int i = 0; i < count; ++i) values[i] *= scale;
    store(values, count, out + group * GROUP);
  }
}

template <typename Out>
void decode(const Stack& s, int64_t first, int64_t count, Out* out, int threads) {
#pragma omp parallel for num_threads(worth(count * s.k, threads)) schedule(dynamic, 32)
  for (int64_t i = 0; i < count; ++i) {
    Out* to = out + i * s.k;
#ifdef LANES
    if (decode_row_lanes(s, first + i, to)) continue;
#endif
    decode_row(s, first + i, to);
  }
}

}  // namespace

extern "C" {

// Rows [first, first + count) of the stack seen as one matrix of e * n rows.
void chiasm_decode_float32(const Stack* s, int64_t first, int64_t count, float* out, int threads) {
  decode(*s, first, count, out, threads);
}

void chiasm_decode_bfloat16(
    const Stack* s, int64_t first, int64_t count, uint16_t* out, int threads) {
  decode(*s, first, count, out, threads);
}
}
