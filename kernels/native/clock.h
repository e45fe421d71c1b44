// Which matrix of a stack time is spent on.
#pragma once
#include <omp.h>

#include <chrono>
#include <cstdint>

// Adds the time that it lives, in nanoseconds, to spent[matrix]; each thread of a team counts for its
// share of it, so that the sums are of time as it passes. Nothing when spent is null.
class Clock {
  using Time = std::chrono::steady_clock;
  int64_t* to;
  Time::time_point start;

 public:
  Clock(int64_t* spent, int64_t matrix)
      : to(spent ? spent + matrix : nullptr), start(to ? Time::now() : Time::time_point()) {}
  Clock(const Clock&) = delete;
  ~Clock() {
    if (!to) return;
    const std::chrono::nanoseconds spent = Time::now() - start;
    const int64_t share = spent.count() / omp_get_num_threads();
#pragma omp atomic
    *to += share;
  }
};
