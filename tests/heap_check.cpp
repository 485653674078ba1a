// Random blocks from csrc/memory/heap.h, by two threads at once: each keeps what was written into it
// until it is freed, and in the end the whole is one again. With an argument, blocks in use are
// overwritten, which must be told (tests/test_heap.py).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "heap.h"

namespace {

constexpr size_t kWhole = size_t{256} << 20;
ppo::Heap heap;

void require(bool holds, const char* what) {
  if (holds) return;
  std::puts(what);
  std::fflush(stdout);
  std::_Exit(1);  // the other thread is at work: nothing it uses may be destroyed
}

struct Block {
  uint64_t* words;
  size_t count;
  uint64_t value;

  void fill() const {
    for (size_t i = 0; i < count; ++i) words[i] = value + i;
  }
  void check() const {
    for (size_t i = 0; i < count; ++i) require(words[i] == value + i, "a block was overwritten");
  }
};

void use(unsigned seed, bool wrong) {
  std::mt19937_64 random(seed);
  std::vector<Block> blocks;
  for (int step = 0; step < 4000; ++step) {
    if (random() % 50 == 0) heap.release();
    const size_t bytes = 1 + random() % (size_t{1} << (10 + random() % 12));
    auto* words = static_cast<uint64_t*>(heap.take(bytes));
    if (words != nullptr) {
      require(reinterpret_cast<uintptr_t>(words) % ppo::Heap::kAlignment == 0, "not aligned");
      require(heap.owns(words), "a block of another heap");
      blocks.push_back({words, bytes / 8, random()});
      blocks.back().fill();
    }
    while (!blocks.empty() && (blocks.size() > 60 || random() % 3 == 0)) {
      std::swap(blocks[random() % blocks.size()], blocks.back());
      blocks.back().check();
      heap.give(blocks.back().words);
      blocks.pop_back();
    }
    if (wrong && step == 2000) {
      for (const Block& block : blocks) {
        if (block.count > 0) block.words[0] ^= 1;
      }
    }
  }
  for (const Block& block : blocks) {
    block.check();
    heap.give(block.words);
  }
}

}  // namespace

int main(int argc, char**) {
  require(heap.take(1) == nullptr, "a block without memory");
  require(heap.open(kWhole), "no addresses");
  int outside;
  require(!heap.owns(&outside), "a block that is not of this heap");
  std::thread other(use, 1, false);
  use(2, argc > 1);
  other.join();
  void* const whole = heap.take(kWhole);
  require(whole != nullptr, "what was freed is not one");
  require(heap.take(1) == nullptr, "more than there is");
  heap.give(whole);
  void* const half = heap.take(kWhole / 2);
  require(half == whole, "not the first that is large enough");
  static_cast<char*>(half)[0] = 1;
  heap.release();
  require(static_cast<char*>(half)[0] == 1, "what is in use was given to the system");

  ppo::Heap closed;
  require(closed.open(kWhole), "no addresses");
  void* const used = closed.take(kWhole / 4);
  closed.close();
  require(closed.owns(used) && closed.take(kWhole / 4) == nullptr, "not closed");
  closed.give(used);
  require(closed.take(kWhole / 4) == used, "what was used is no longer there");
  return 0;
}
