// Where torch's tensors on a CPU come from.
#pragma once

#include <cstdint>
#include <string>

namespace ppo {

// From now on, in the whole process, torch's tensors of 128 KiB and more are blocks of one `Heap`,
// which keeps what is freed. Returns why that cannot be, or nothing. A limit of addresses (RLIMIT_AS)
// that is set later does not hold for them.
std::string keep_large_tensors();

// Whether this address is of such a tensor.
bool is_in_heap(uintptr_t address);

// Gives the system the memory of those that have been freed.
void release_large_tensors();

}  // namespace ppo
