#include "torch_memory.h"

#ifdef __linux__

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "heap.h"

// torch has one function that allocates the memory of tensors, in its lowest library, c10, and no
// way to replace it but a C++ class of its headers, whose layout is another in each version. So the
// two functions of the C library that it calls are replaced where c10 keeps their addresses, in its
// global offset table, as tools that trace memory do (System V ABI, "Global Offset Table").
namespace ppo {
namespace {

constexpr size_t kLarge = size_t{128} << 10;  // where glibc's own malloc begins with mmap

Heap* heap = nullptr;  // never destroyed: tensors live to the very end of a process

int allocate(void** out, size_t alignment, size_t bytes) {
  if (bytes >= kLarge && alignment <= Heap::kAlignment) {
    if (void* const found = heap->take(bytes)) {
      *out = found;
      return 0;
    }
  }
  return posix_memalign(out, alignment, bytes);
}

void deallocate(void* block) {
  if (heap->owns(block)) return heap->give(block);
  free(block);
}

#if defined(__x86_64__)
constexpr unsigned kSlots[] = {R_X86_64_JUMP_SLOT, R_X86_64_GLOB_DAT};
#elif defined(__aarch64__)
constexpr unsigned kSlots[] = {R_AARCH64_JUMP_SLOT, R_AARCH64_GLOB_DAT};
#else
constexpr unsigned kSlots[] = {0, 0};  // no relocation is of this type
#endif

struct Library {  // one that is loaded
  uintptr_t base = 0;
  uintptr_t read_only = 0, read_only_end = 0;  // once it is relocated
  const ElfW(Dyn)* dynamic = nullptr;

  uintptr_t value(ElfW(Sxword) tag) const {
    for (const auto* entry = dynamic; entry->d_tag != DT_NULL; ++entry) {
      if (entry->d_tag == tag) return entry->d_un.d_val;
    }
    return 0;
  }
  template <class T>
  const T* table(ElfW(Sxword) tag) const {
    const uintptr_t found = value(tag);  // glibc has made an address of it, others not
    return reinterpret_cast<const T*>(found < base ? base + found : found);
  }

  // Calls `visit(slot)` for each place that holds the address of the function of that name.
  template <class Visit>
  void slots_of(const char* function, const Visit& visit) const {
    const auto* const symbols = table<ElfW(Sym)>(DT_SYMTAB);
    const auto* const names = table<char>(DT_STRTAB);
    for (const auto& [start, bytes] : {std::pair(DT_JMPREL, DT_PLTRELSZ), {DT_RELA, DT_RELASZ}}) {
      const auto* const entries = table<ElfW(Rela)>(start);
      for (size_t i = 0; i < value(bytes) / sizeof(ElfW(Rela)); ++i) {
        const auto type = ELF64_R_TYPE(entries[i].r_info);
        if (type != kSlots[0] && type != kSlots[1]) continue;
        const char* const name = names + symbols[ELF64_R_SYM(entries[i].r_info)].st_name;
        if (std::strcmp(name, function) == 0) {
          visit(reinterpret_cast<void**>(base + entries[i].r_offset));
        }
      }
    }
  }
};

int find_c10(dl_phdr_info* info, size_t, void* found) {
  const char* const file = std::strrchr(info->dlpi_name, '/');
  if (file == nullptr || std::strcmp(file, "/libc10.so") != 0) return 0;
  auto& library = *static_cast<Library*>(found);
  library.base = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = library.base + header.p_vaddr;
    if (header.p_type == PT_DYNAMIC) {
      library.dynamic = reinterpret_cast<const ElfW(Dyn)*>(begin);
    } else if (header.p_type == PT_GNU_RELRO) {
      library.read_only = begin;
      library.read_only_end = begin + header.p_memsz;
    }
  }
  return 1;
}

// Whether the function is the C library's, or, as long as it was never called, c10's own way to it.
// Those of other allocators and of tools that watch memory are not ours to replace.
bool is_of_c_library(const void* function, const Library& c10) {
  Dl_info of{}, libc{};
  if (dladdr(function, &of) == 0 || dladdr(reinterpret_cast<void*>(&getpid), &libc) == 0) {
    return false;
  }
  return of.dli_fbase == libc.dli_fbase || of.dli_fbase == reinterpret_cast<void*>(c10.base);
}

bool put(void** slot, void* function, const Library& library) {
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto place = reinterpret_cast<uintptr_t>(slot);
  void* const first = reinterpret_cast<void*>(place - place % page);
  if (mprotect(first, page, PROT_READ | PROT_WRITE) != 0) return false;
  __atomic_store_n(slot, function, __ATOMIC_RELEASE);
  if (place >= library.read_only && place < library.read_only_end) {
    mprotect(first, page, PROT_READ);
  }
  return true;
}

std::string install() {
  Library c10;
  if (dl_iterate_phdr(find_c10, &c10) == 0 || c10.dynamic == nullptr) return "torch has no libc10.so";
  int allocating = 0, freeing = 0, others = 0;
  const auto look = [&](int& count) {
    return [&](void** slot) { ++(is_of_c_library(*slot, c10) ? count : others); };
  };
  c10.slots_of("posix_memalign", look(allocating));
  c10.slots_of("free", look(freeing));
  if (others > 0) return "another allocator, or a tool, allocates torch's memory";
  if (allocating == 0 || freeing == 0) return "torch's libc10.so does not call posix_memalign";
  // More than it will ever have, as room comes in pieces.
  const size_t machine = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  auto* const made = new Heap;
  if (!made->open(2 * machine)) {
    delete made;
    return "the system refuses the addresses (ulimit -v)";
  }
  heap = made;
  pthread_atfork([] { heap->mutex.lock(); }, [] { heap->mutex.unlock(); },
                 [] { heap->mutex.unlock(); });
  // `free` first: nothing comes from the heap before it goes back there.
  bool all = true;
  const auto replace = [&](auto* function) {
    return [&c10, &all, function](void** slot) {
      all = all && put(slot, reinterpret_cast<void*>(function), c10);
    };
  };
  c10.slots_of("free", replace(&deallocate));
  if (all) c10.slots_of("posix_memalign", replace(&allocate));
  return all ? "" : "the system keeps torch's table of functions from being written";
}

}  // namespace

std::string keep_large_tensors() {
  static const std::string why_not = install();
  return why_not;
}

void release_large_tensors() {
  if (heap != nullptr) heap->release();
}

}  // namespace ppo

#else

namespace ppo {

std::string keep_large_tensors() { return "for Linux only"; }
void release_large_tensors() {}

}  // namespace ppo

#endif
