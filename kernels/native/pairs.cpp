// Tokens to pairs of a token and an expert, and the pairs' results back to tokens: one pass each, where
// torch takes one for every step.
//
// A product and a sum round by themselves, and a row's terms are added in the order of its pairs, so
// the bits are those of `index_add_` in turns.
#include <vector>

#include "formats.h"
#include "pairs.h"

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
#pragma omp parallel for num_threads(worth(num_pairs * width, threads)) schedule(dynamic, CHUNK)
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

int64_t chiasm_pairs(
    const int32_t* ids, const float* weights, int64_t num_tokens, int64_t k, int32_t first,
    int32_t num_experts, int32_t* rows, int64_t* num_rows, int32_t* token, int64_t* slot,
    float* weight, int32_t* counts) {
  std::vector<int64_t> next(num_experts + 1);
  std::fill(counts, counts + num_experts, 0);
  for (int64_t i = 0; i < num_tokens * k; ++i) {
    const int32_t expert = ids[i] - first;
    if (expert >= 0 && expert < num_experts) ++counts[expert];
  }
  for (int32_t e = 0; e < num_experts; ++e) next[e + 1] = next[e] + counts[e];
  const int64_t num_pairs = next[num_experts];
  *num_rows = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    bool is_mine = false;
    for (int64_t i = t * k; i < (t + 1) * k; ++i) {
      const int32_t expert = ids[i] - first;
      if (expert < 0 || expert >= num_experts) continue;
      const int64_t place = next[expert]++;
      token[place] = int32_t(t);
      slot[place] = *num_rows;
      weight[place] = weights[i];
      is_mine = true;
    }
    if (is_mine) rows[(*num_rows)++] = int32_t(t);
  }
  return num_pairs;
}

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
