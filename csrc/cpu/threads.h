// Threads: torch's own, those of the OpenMP runtime that it has loaded. After each of torch's parallel
// loops they spin for milliseconds, and would hold the cores against any other threads.
#pragma once

#include <cstdint>

namespace ppo {

using Task = void (*)(const void* context, int64_t index);

// Calls task(context, i) for each i of [0, count) on up to `threads` threads, the caller's among
// them, and returns when all are done. Which thread takes which i is not fixed, so a task must
// write only what belongs to its i; sums are then merged by the caller in order of i, and no result
// depends on the number of threads. Tasks must not throw. Safe after fork().
void run_tasks(int64_t count, int threads, Task task, const void* context);

// A template over a lambda type has internal linkage, like the lambda: safe in per-ISA code.
template <class Body>
static inline void parallel_for(int64_t count, int threads, const Body& body) {
  run_tasks(
      count, threads,
      [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
}

}  // namespace ppo
