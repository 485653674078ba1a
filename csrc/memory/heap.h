// Large blocks of memory that stay with the process when they are freed, all in one range of
// addresses. Small blocks stand elsewhere, so none of them comes to lie between two large ones, and
// a block fits where one as large was freed: of an aligned block glibc's malloc asks for 96 bytes
// more than it gives back. While a model was trained, it had as much room in pieces as in use
// (bench/notes/cpu.md).
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <unordered_map>

namespace ppo {

class Heap {
 public:
  static constexpr size_t kAlignment = 64;

  // Reserves so many bytes of addresses; false where the system refuses them.
  bool open(size_t bytes);

  // A block of at least so many bytes, not initialized; null where there is no room.
  void* take(size_t bytes);
  // Frees a block that `take` returned. Nothing is allocated for it, so it cannot fail.
  void give(void* block);
  bool owns(const void* block) const { return block >= begin_ && block < end_; }

  // Gives the system the pages of what is free; the addresses stay.
  void release();
  // Gives it the addresses that have never been used. Those count where they are limited (RLIMIT_AS).
  void close();

  // Held while the process forks: the child's copy has to be whole.
  std::mutex mutex;

 private:
  using Free = std::map<char*, size_t>;
  struct Used {
    size_t bytes;
    Free::node_type node;  // for when it is free again
  };

  bool make_writable(char* end);

  char* begin_ = nullptr;
  char* end_ = nullptr;
  char* writable_ = nullptr;  // up to here; beyond, nothing has been used yet
  Free free_;                 // no two of them side by side; what was never used is the last
  std::unordered_map<char*, Used> used_;
};

}  // namespace ppo
