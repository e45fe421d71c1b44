// Products of rows with stacks of matrices, made first and then taken on by a team of threads.
#pragma once
#include <omp.h>

#include <memory>

#include "formats.h"

// Rows index[begin[r]], .., index[end[r] - 1] of x go through matrix expert[r], which takes spent of it
// (clock.h), or nobody asks.
struct Runs {
  int32_t count;
  const int32_t *expert, *begin, *end, *index;
  int64_t* spent;

  int64_t rows() const {
    int64_t all = 0;
    for (int32_t r = 0; r < count; ++r) all += end[r] - begin[r];
    return all;
  }
};

// All threads of a team call work().
struct Task {
  virtual void work() const = 0;
  virtual ~Task() = default;
};

// Rows of a matrix that a thread of a team takes at a time, when so many matrices are read: what it
// fetches ahead at their end is another's; but there must be some for every thread.
inline int64_t chunk_rows(const Stack& s, int64_t num_matrices) {
  const int64_t share = num_matrices * s.n * s.row_bytes() / (8 * omp_get_num_threads());
  const int64_t bytes = std::clamp<int64_t>(share, 64 << 10, 512 << 10);
  return std::max<int64_t>(4, bytes / s.row_bytes() / 4 * 4);
}

// Row i of out [.., n] = row index[i] of x [num_rows, k] times a matrix transposed: that of expert[r]
// for i in [begin[r], end[r]); rows of no run are left alone. x and out are bfloat16. Matrices of any
// format; bfloat16 ones only where chiasm_has_bfloat16.
std::unique_ptr<Task> product(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out);

// Its two kinds.
std::unique_ptr<Task> dense_product(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out);
std::unique_ptr<Task> coded_product(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out);
