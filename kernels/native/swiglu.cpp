#include "swiglu.h"

extern "C" {

// out [rows, width] from rows of gate, then up.
void chiasm_swiglu(
    const uint16_t* gate_up, int64_t rows, int64_t width, uint16_t* out, int threads) {
#pragma omp parallel for num_threads(worth(8 * rows * width, threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    swiglu(gate_up + 2 * row * width, width, out + row * width);
}
}
