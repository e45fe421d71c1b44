// Products of few rows with low-precision matrices, which are read once, as they are stored.
//
// Sums within a group are exact; those over groups are float32, in one order, so a row's result does
// not depend on the other rows, nor on the number of threads.
#include <memory>
#include <mutex>

#include "clock.h"
#include "product.h"

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
    const int64_t chunk = chunk_rows(s, runs.count), chunks = (s.n + chunk - 1) / chunk;
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

}  // namespace

std::unique_ptr<Task> coded_product(
    const Stack& s, const uint16_t* x, int64_t num_rows, const Runs& runs, uint16_t* out) {
  using Made = std::unique_ptr<Task>;
  if (s.format == INT8) return Made(new Linear<INT8>(s, x, num_rows, runs, out));
  if (s.format == INT4) return Made(new Linear<INT4>(s, x, num_rows, runs, out));
  return Made(new Linear<TCQ2>(s, x, num_rows, runs, out));
}

extern "C" {

// The bits of the registers that the products are written for; 0: what the compiler makes of it.
int chiasm_lanes() { return LANES; }
}
