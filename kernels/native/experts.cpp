// Whole experts of few pairs of a token and an expert, in one call.
#include <memory>
#include <vector>

#include "pairs.h"
#include "product.h"
#include "swiglu.h"

namespace {

constexpr int64_t COMBINED = 512;  // columns that a thread adds up at a time

// A shard's pairs, and one run of them for each expert that has any.
struct Pairs {
  std::vector<int32_t> token, straight;
  std::vector<int64_t> slot;
  std::vector<float> weight;
  std::vector<int32_t> expert, begin, end;
  int64_t count, num_rows, longest = 0;  // pairs; tokens that have any; the pairs of one expert at most

  Pairs(
      const int32_t* ids, const float* weights, int64_t num_tokens, int64_t k, int32_t first,
      int32_t num_experts, int32_t* rows)
      : token(num_tokens * k), slot(token.size()), weight(token.size()) {
    std::vector<int32_t> counts(num_experts);
    count = chiasm_pairs(
        ids, weights, num_tokens, k, first, num_experts, rows, &num_rows, token.data(), slot.data(),
        weight.data(), counts.data());
    for (int32_t i = 0; i < count; ++i) straight.push_back(i);
    for (int32_t e = 0, at = 0; e < num_experts; at += counts[e++]) {
      if (!counts[e]) continue;
      expert.push_back(e);
      begin.push_back(at);
      end.push_back(at + counts[e]);
      longest = std::max<int64_t>(longest, counts[e]);
    }
  }

  Runs runs(const std::vector<int32_t>& index, int64_t* spent) const {
    return {
        int32_t(expert.size()), expert.data(), begin.data(), end.data(), index.data(), spent};
  }
};

// Row r of `values`: weight[i] times row i of `results` for all i with slot[i] = r, by ascending i.
void combine(const uint16_t* results, int64_t width, const Pairs& pairs, float* values) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < width; first += COMBINED) {
    const int64_t end = std::min(width, first + COMBINED);
    for (int64_t r = 0; r < pairs.num_rows; ++r)
      std::fill(values + r * width + first, values + r * width + end, 0.0f);
    for (int64_t i = 0; i < pairs.count; ++i)
      for (int64_t j = first; j < end; ++j)
        values[pairs.slot[i] * width + j] += widen(results[i * width + j]) * pairs.weight[i];
  }
}

}  // namespace

extern "C" {

// The partial of a shard of experts [first, first + num_experts): weighted sums of
// down(silu(gate(x)) * up(x)). x is [num_tokens, gate_up.k]; ids and weights are [num_tokens, k].
// rows: the tokens that have experts here, ascending; values [their number, down.n], float32. Returns
// that number, or -1 and does nothing more if an expert has over `most` tokens. Room is needed for
// num_tokens of each.
int64_t chiasm_experts(
    const Stack* gate_up, const Stack* down, const uint16_t* x, int64_t num_tokens,
    const int32_t* ids, const float* weights, int64_t k, int32_t first, int32_t num_experts,
    int64_t most, int64_t* spent, int32_t* rows, float* values, int threads) {
  const Pairs pairs(ids, weights, num_tokens, k, first, num_experts, rows);
  if (pairs.longest > most) return -1;
  if (!pairs.count) return 0;
  const int64_t width = down->k, out = down->n;
  using Values = std::unique_ptr<uint16_t[]>;  // not a vector, which would be set to zero first
  const Values both(new uint16_t[pairs.count * 2 * width]), inner(new uint16_t[pairs.count * width]),
      results(new uint16_t[pairs.count * out]);
  const auto upper = product(*gate_up, x, num_tokens, pairs.runs(pairs.token, spent), both.get());
  const auto lower =
      product(*down, inner.get(), pairs.count, pairs.runs(pairs.straight, spent), results.get());
#pragma omp parallel num_threads(worth(pairs.count * 2 * width * gate_up->k, threads))
  {
    upper->work();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs.count; ++i)
      swiglu(both.get() + 2 * i * width, width, inner.get() + i * width);
    lower->work();
    combine(results.get(), out, pairs, values);
  }
  return pairs.num_rows;
}
}
