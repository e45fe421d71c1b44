// The pairs of a dispatch's tokens and a shard's experts.
#pragma once
#include <cstdint>

extern "C" {

// The pairs of the experts [first, first + num_experts), by expert and within one by token. ids and
// weights are [num_tokens, k]. rows: the tokens that have pairs, ascending. For each pair its token, the
// place of that among rows, and its weight; counts: the pairs of each expert. Returns how many pairs
// there are, and sets num_rows. Room is needed for num_tokens rows and num_tokens * k pairs.
int64_t chiasm_pairs(
    const int32_t* ids, const float* weights, int64_t num_tokens, int64_t k, int32_t first,
    int32_t num_experts, int32_t* rows, int64_t* num_rows, int32_t* token, int64_t* slot,
    float* weight, int32_t* counts);
}
