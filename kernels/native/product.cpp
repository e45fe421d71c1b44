#include "product.h"

std::unique_ptr<Task> product(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out) {
  const auto make = s.format == DENSE ? dense_product : coded_product;
  return make(s, x, num_rows, runs, out);
}

extern "C" {

// `product` by so many threads, or fewer. What time each expert takes is added to spent, unless that is
// null.
void chiasm_linear(
    const Stack* s, const uint16_t* x, int64_t num_rows, int32_t num_runs, const int32_t* expert,
    const int32_t* begin, const int32_t* end, const int32_t* index, int64_t* spent, uint16_t* out,
    int threads) {
  const Runs runs{num_runs, expert, begin, end, index, spent};
  const auto made = product(*s, x, num_rows, runs, out);
#pragma omp parallel num_threads(worth(runs.rows() * s->n * s->k, threads))
  made->work();
}
}
