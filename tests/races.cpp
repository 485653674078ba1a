// The thread pool under ThreadSanitizer (`make sanitize`): calls of every size, from one thread and
// from several at once. With an argument, threads count in one number without a lock, which must be
// reported.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

void call(int64_t count, int threads) {
  std::vector<int64_t> results(static_cast<size_t>(count), 0);
  ppo::parallel_for(count, threads, [&](int64_t i) { results[size_t(i)] += i + 1; });
  for (int64_t i = 0; i < count; ++i) {
    if (results[size_t(i)] != i + 1) {
      std::printf("task %lld of %lld was not done once\n", static_cast<long long>(i),
                  static_cast<long long>(count));
      std::exit(1);
    }
  }
}

void calls() {
  for (int repeat = 0; repeat < 200; ++repeat) {
    for (int64_t count : {0, 1, 2, 3, 64, 1000}) call(count, 1 + repeat % 5);
  }
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    int64_t number = 0;
    ppo::parallel_for(100000, 2, [&](int64_t) { ++number; });
    return number == 0;
  }
  calls();
  std::thread other(calls), another(calls);
  calls();
  other.join();
  another.join();
  return 0;
}
