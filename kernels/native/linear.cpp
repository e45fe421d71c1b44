// Products of few rows with low-precision matrices, which are read once, as they are stored; and whole
// experts made of them.
//
// Sums within a group are exact; those over groups are float32, in one order, so a row's result does
// not depend on the other rows, nor on the number of threads.
#include <memory>
#include <mutex>
#include <vector>

#include "clock.h"
#include "swiglu.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && !defined(CHIASM_GENERIC)
#define LANES 512
#include "laid.h"
#elif defined(__AVX2__) && defined(__FMA__) && !defined(CHIASM_GENERIC)
#define LANES 256
#include "wide.h"
#else
#define LANES 0
#endif

namespace {

constexpr int64_t CHUNK_BYTES = 256 << 10;  // of a matrix that a thread takes at a time
constexpr int64_t COMBINED = 512;           // columns that a thread adds up at a time

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

// A piece of work: rows [begin, end) of one matrix times some rows of x.
struct Part {
  int64_t expert, begin, end, rows;
  const int32_t* index;
  uint16_t* out;
};

#if LANES == 512
#include "avx512.h"
#elif LANES == 256
#include "avx2.h"
#else
#include "generic.h"
#endif

// A product that a team of threads takes on: all of them call work() with the same arguments.
struct Task {
  virtual void work() const = 0;
  virtual ~Task() = default;
};

template <int F>
struct Linear : Task {
  const Stack& s;
  const uint16_t* x;
  int64_t num_rows;
  Runs runs;
  uint16_t* out;
  Laid<F> laid;
  std::unique_ptr<Table> table;

  Linear(const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out)
      : s(s), x(x), num_rows(num_rows), runs(runs), out(out), laid(s.k, num_rows) {
    if (F == TCQ2) table.reset(new Table(s.table, 0x80));
  }

  void work() const override {
    const int64_t chunk = std::max<int64_t>(2, CHUNK_BYTES / s.row_bytes() / 2 * 2);
    const int64_t chunks = (s.n + chunk - 1) / chunk;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) laid.fill(row, x + row * s.k, s.k);
    // Dynamic: a core may be another process's for a while, and its share must not wait for it.
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < runs.count * chunks; ++item) {
      const int64_t run = item / chunks, first = runs.begin[run], begin = item % chunks * chunk;
      Part part;
      part.expert = runs.expert[run];
      part.rows = runs.end[run] - first;
      part.index = runs.index + first;
      part.begin = begin;
      part.end = std::min(s.n, begin + chunk);
      part.out = out + first * s.n;
      const Clock clock(runs.spent, part.expert);
      multiply<F>(s, laid, table.get(), part);
    }
  }
};

std::unique_ptr<Task> linear(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out) {
  using Made = std::unique_ptr<Task>;
  if (s.format == INT8) return Made(new Linear<INT8>(s, x, num_rows, runs, out));
  if (s.format == INT4) return Made(new Linear<INT4>(s, x, num_rows, runs, out));
  return Made(new Linear<TCQ2>(s, x, num_rows, runs, out));
}

// Adds weight[i] * row i of `results` to row slot[i] of `values`, by ascending i.
void combine(
    const uint16_t* results, int64_t width, const float* weight, const int64_t* slot, int64_t count,
    float* values) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < width; first += COMBINED) {
    const int64_t end = std::min(width, first + COMBINED);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = first; j < end; ++j)
        values[slot[i] * width + j] += widen(results[i * width + j]) * weight[i];
  }
}

}  // namespace

extern "C" {

// Row i of out [.., n] = row index[i] of x [num_rows, k] times a matrix transposed: that of expert[r]
// for i in [begin[r], end[r]); rows of no run are left alone. x and out are bfloat16. What time each
// expert takes is added to spent, unless that is null.
void chiasm_linear(
    const Stack* s, const uint16_t* x, int64_t num_rows, int32_t num_runs, const int32_t* expert,
    const int32_t* begin, const int32_t* end, const int32_t* index, int64_t* spent, uint16_t* out,
    int threads) {
  const Runs runs{num_runs, expert, begin, end, index, spent};
  const auto product = linear(*s, x, num_rows, runs, out);
#pragma omp parallel num_threads(worth(runs.rows() * s->n * s->k, threads))
  product->work();
}

// Whole experts, down(silu(gate(x)) * up(x)), of few pairs of a token and an expert. Pair i is of row
// index[i] of x [num_rows, gate_up.k] and of the expert whose run holds it; weight[i] times its result
// is added to row slot[i] of `values`.
void chiasm_experts(
    const Stack* gate_up, const Stack* down, const uint16_t* x, int64_t num_rows, int32_t num_runs,
    const int32_t* expert, const int32_t* begin, const int32_t* end, const int32_t* index,
    int64_t* spent, const float* weight, const int64_t* slot, float* values, int threads) {
  Runs runs{num_runs, expert, begin, end, index, spent};
  const int64_t pairs = runs.rows(), width = down->k, out = down->n;
  using Values = std::unique_ptr<uint16_t[]>;  // not a vector, which would be set to zero first
  const Values both(new uint16_t[pairs * 2 * width]), inner(new uint16_t[pairs * width]),
      results(new uint16_t[pairs * out]);
  std::vector<int32_t> straight(pairs);
  for (int64_t i = 0; i < pairs; ++i) straight[i] = int32_t(i);
  const auto first = linear(*gate_up, x, num_rows, runs, both.get());
  runs.index = straight.data();
  const auto second = linear(*down, inner.get(), pairs, runs, results.get());
#pragma omp parallel num_threads(worth(pairs * 2 * width * gate_up->k, threads))
  {
    first->work();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs; ++i)
      swiglu(both.get() + 2 * i * width, width, inner.get() + i * width);
    second->work();
    combine(results.get(), out, weight, slot, pairs, values);
  }
}

// The bits of the registers that the products are written for; 0: what the compiler makes of it.
int chiasm_lanes() { return LANES; }
}
