#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace ppo {
namespace {

struct Job {
  Task task;
  const void* context;
  int64_t count;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
  }
};

// libgomp's entry point for `#pragma omp parallel` (other runtimes have it too), which torch brings
// into the global scope; or null. https://gcc.gnu.org/onlinedocs/libgomp/Implementing-PARALLEL-construct.html
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

OpenMpParallel openmp_parallel() {
  static const auto found =
      reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// Where there is no such runtime, and in a forked child, in which OpenMP's threads are missing and
// waited for all the same: workers of our own, started when first needed, asleep between jobs. While
// they have a job, another caller does all of its tasks itself.
class Pool {
 public:
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work();
    helpers = start_workers(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      seats_ = helpers;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // a worker that has not woken yet is no longer needed
    done_.wait(lock, [this] { return busy_ == 0; });
    job_ = nullptr;
  }

 private:
  int start_workers(int wanted) {
    try {
      for (; started_ < wanted; ++started_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: the tasks are done by fewer.
    }
    return started_ < wanted ? started_ : wanted;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++busy_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;  // held through a job
  int started_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int seats_ = 0;  // workers still wanted for the job
  int busy_ = 0;   // workers at work on it
};

// Never destroyed: workers sleep on its members until the process ends. A forked child has no
// workers and perhaps a locked mutex, so it leaves its copy alone and makes a new one.
std::atomic<Pool*> current{nullptr};
std::atomic<bool> forked{false};
// Registered when the library is loaded: torch may start its threads, and the process fork, before
// the first kernel runs.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  current.store(nullptr);
  forked.store(true);
});

Pool& pool() {
  Pool* existing = current.load();
  if (existing != nullptr) return *existing;
  Pool* made = new Pool;
  if (current.compare_exchange_strong(existing, made)) return *made;
  delete made;
  return *existing;
}

}  // namespace

void run_tasks(int64_t count, int threads, Task task, const void* context) {
  Job job{task, context, count};
  const int64_t helpers = (count < threads ? count : threads) - 1;
  if (helpers <= 0) return job.work();
  if (openmp_parallel() == nullptr || forked) return pool().run(job, static_cast<int>(helpers));
  // As many threads as torch takes: for another number, the runtime would end some and start some.
  openmp_parallel()([](void* job) { static_cast<Job*>(job)->work(); }, &job, unsigned(threads), 0);
}

}  // namespace ppo
