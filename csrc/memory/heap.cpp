#include "heap.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace ppo {
namespace {

constexpr size_t kStep = size_t{64} << 20;  // what is made writable at a time

char* begin_of_page(char* place) {
  return place - reinterpret_cast<uintptr_t>(place) % uintptr_t(sysconf(_SC_PAGESIZE));
}

}  // namespace

bool Heap::open(size_t bytes) {
  bytes = bytes / kStep * kStep;
  // Without access it counts as no memory, even where the system promises only what it has.
  void* found = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return false;
  begin_ = writable_ = static_cast<char*>(found);
  end_ = begin_ + bytes;
  free_.emplace(begin_, bytes);
  return true;
}

void* Heap::take(size_t bytes) try {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::lock_guard<std::mutex> lock(mutex);
  // The first that is large enough: what is in use stays together at the lower end, and pages that
  // have been used are used again. Of 1,000 that are too small this takes 8 us; there are some dozens.
  const auto found = std::find_if(free_.begin(), free_.end(),
                                  [&](const auto& block) { return block.second >= bytes; });
  if (found == free_.end()) return nullptr;
  const auto [place, size] = *found;
  Free one{{place, bytes}};
  Used& used = used_[place];
  if (!make_writable(place + bytes)) {
    used_.erase(place);
    return nullptr;
  }
  auto rest = free_.extract(found);
  if (size > bytes) {
    rest.key() = place + bytes;
    rest.mapped() = size - bytes;
    free_.insert(std::move(rest));
  }
  used = {bytes, one.extract(place)};
  return place;
} catch (const std::bad_alloc&) {
  return nullptr;
}

void Heap::give(void* block) {
  const std::lock_guard<std::mutex> lock(mutex);
  char* const place = static_cast<char*>(block);
  const auto found = used_.find(place);
  if (found == used_.end()) std::abort();  // freed twice
  auto [bytes, node] = std::move(found->second);
  used_.erase(found);
  auto next = free_.lower_bound(place);
  if (next != free_.end() && place + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == place) {
      before->second += bytes;
      return;
    }
  }
  node.mapped() = bytes;
  free_.insert(next, std::move(node));
}

bool Heap::make_writable(char* end) {
  if (end <= writable_) return true;
  const size_t bytes = (size_t(end - writable_) + kStep - 1) / kStep * kStep;
  if (mprotect(writable_, bytes, PROT_READ | PROT_WRITE) != 0) return false;
  writable_ += bytes;
  return true;
}

void Heap::close() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (writable_ == end_ || munmap(writable_, size_t(end_ - writable_)) != 0) return;
  end_ = writable_;
  const auto last = std::prev(free_.end());  // it reached to the end
  if (last->first == end_) {
    free_.erase(last);
  } else {
    last->second = size_t(end_ - last->first);
  }
}

void Heap::release() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [place, bytes] : free_) {
    char* const first = begin_of_page(place + sysconf(_SC_PAGESIZE) - 1);
    char* const last = begin_of_page(std::min(place + bytes, writable_));
    if (first < last) madvise(first, size_t(last - first), MADV_DONTNEED);
  }
}

}  // namespace ppo
