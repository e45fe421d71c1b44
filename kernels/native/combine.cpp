// The weighted sum of each token's results: one pass over them, where torch takes one for each step.
//
// A product and a sum round by themselves, and a row's terms are added in the order of its pairs, so
// the bits are those of `index_add_` in turns.
#include <vector>

#include "formats.h"

namespace {

constexpr int64_t CHUNK = 16;  // rows that a thread takes at a time

inline float value(float stored) { return stored; }
inline float value(uint16_t stored) { return widen(stored); }

template <typename T>
void combine(
    const T* results, int64_t width, const float* weight, const int64_t* slot, int64_t num_pairs,
    float* values, int64_t num_rows, int threads) {
  // The pairs by row: those of row r are order[begin[r]] to order[begin[r + 1] - 1], ascending.
  std::vector<int64_t> begin(num_rows + 2), order(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) ++begin[slot[i] + 2];
  for (int64_t r = 2; r < num_rows + 2; ++r) begin[r] += begin[r - 1];
  for (int64_t i = 0; i < num_pairs; ++i) order[begin[slot[i] + 1]++] = i;
#pragma omp parallel for num_threads(threads) schedule(dynamic, CHUNK)
  for (int64_t r = 0; r < num_rows; ++r) {
    float* row = values + r * width;
    for (int64_t i = begin[r]; i < begin[r + 1]; ++i) {
      const T* result = results + order[i] * width;
      const float factor = weight[order[i]];
      for (int64_t j = 0; j < width; ++j) row[j] += value(result[j]) * factor;
    }
  }
}

}  // namespace

extern "C" {

// values [num_rows, width] += weight[i] * results[i] for row slot[i], i ascending. results [P, width]
// are float32.
void chiasm_combine_float32(
    const float* results, int64_t width, const float* weight, const int64_t* slot,
    int64_t num_pairs, float* values, int64_t num_rows, int threads) {
  combine(results, width, weight, slot, num_pairs, values, num_rows, threads);
}

// The same of bfloat16 results.
void chiasm_combine_bfloat16(
    const uint16_t* results, int64_t width, const float* weight, const int64_t* slot,
    int64_t num_pairs, float* values, int64_t num_rows, int threads) {
  combine(results, width, weight, slot, num_pairs, values, num_rows, threads);
}
}
