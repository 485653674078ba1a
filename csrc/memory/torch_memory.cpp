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

// torch allocates the memory of all tensors in one function of its lowest library, c10. To replace
// that takes a C++ class of torch's headers, whose layout differs between versions. So the two
// functions of the C library that it calls are replaced where c10 keeps their addresses, in its global
// offset table, as tools that trace memory do (System V ABI, "Global Offset Table").
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

const auto page_size = uintptr_t(sysconf(_SC_PAGESIZE));

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
      library.read_only = begin / page_size * page_size;
      library.read_only_end = (begin + header.p_memsz) / page_size * page_size;
    }
  }
  return 1;
}

// Where the library begins that this address is in; null where it is in none.
const void* library_at(const void* address) {
  Dl_info found{};
  return dladdr(address, &found) == 0 ? nullptr : found.dli_fbase;
}

// Whether the function is not the C library's: another allocator's, or of a tool that watches memory.
// Before its first call a slot leads to a stub of c10's own; and to one of the executable, which only
// says that it uses the function too, where that was linked for fixed addresses.
bool is_of_others(void* function, const Library& c10, const void* libc) {
  Dl_info found{};
  ElfW(Sym)* symbol = nullptr;
  if (dladdr1(function, &found, reinterpret_cast<void**>(&symbol), RTLD_DL_SYMENT) == 0) return true;
  if (found.dli_fbase == libc || found.dli_fbase == library_at(c10.dynamic)) return false;
  return symbol == nullptr || symbol->st_shndx != SHN_UNDEF;
}

bool put(void** slot, void* function, const Library& library) {
  const auto place = reinterpret_cast<uintptr_t>(slot);
  void* const page = reinterpret_cast<void*>(place / page_size * page_size);
  if (mprotect(page, page_size, PROT_READ | PROT_WRITE) != 0) return false;
  __atomic_store_n(slot, function, __ATOMIC_RELEASE);
  if (place >= library.read_only && place < library.read_only_end) {
    mprotect(page, page_size, PROT_READ);
  }
  return true;
}

std::string install() {
  Library c10;
  if (dl_iterate_phdr(find_c10, &c10) == 0 || c10.dynamic == nullptr) return "torch has no libc10.so";
  void* const glibc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
  if (glibc == nullptr) return "the C library is not glibc";
  const void* const libc = library_at(dlsym(glibc, "posix_memalign"));
  int allocating = 0, freeing = 0, others = 0;
  const auto look = [&](int& count) {
    return [&, libc](void** slot) {
      ++count;
      others += is_of_others(*slot, c10, libc);
    };
  };
  c10.slots_of("posix_memalign", look(allocating));
  c10.slots_of("free", look(freeing));
  if (allocating == 0 || freeing == 0) return "this build of torch brings its own allocator";
  if (others > 0) return "another allocator, or a tool, allocates torch's memory";
  // More than it will ever have, as room comes in pieces.
  const size_t machine = size_t(sysconf(_SC_PHYS_PAGES)) * page_size;
  auto* const made = new Heap;
  if (!made->open(2 * machine)) {
    delete made;
    return "the system refuses the addresses (ulimit -v)";
  }
  heap = made;
  pthread_atfork([] { heap->mutex.lock(); }, [] { heap->mutex.unlock(); },
                 [] {
                   heap->mutex.unlock();
                   heap->close();  // a child may limit its addresses, as those do that run programs
                 });
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

bool is_in_heap(uintptr_t address) {
  return heap != nullptr && heap->owns(reinterpret_cast<void*>(address));
}

void release_large_tensors() {
  if (heap != nullptr) heap->release();
}

}  // namespace ppo

#else

namespace ppo {

std::string keep_large_tensors() { return "for Linux only"; }
bool is_in_heap(uintptr_t) { return false; }
void release_large_tensors() {}

}  // namespace ppo

#endif
