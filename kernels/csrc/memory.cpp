// Memory of workspaces, kept between steps. A cell's workspace is tens or hundreds of megabytes, and the system hands
// out each of its pages at first touch, zeroed: for a fresh one that takes as long as computing with it. Pages are huge
// where the system has such, which saves most misses of the translation cache.
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "abi.h"

namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;
std::mutex mutex;
std::multimap<size_t, void*> unused;
std::map<void*, size_t> used;
size_t unused_bytes = 0, used_bytes = 0, most_used = 0;

void* take(std::multimap<size_t, void*>::iterator block) {
    void* address = block->second;
    unused_bytes -= block->first;
    unused.erase(block);
    return address;
}

void give_back_smallest() {
    const auto smallest = unused.begin();
    const size_t size = smallest->first;
    munmap(take(smallest), size);
}

void* use(void* block, size_t size) {
    used[block] = size;
    used_bytes += size;
    most_used = std::max(most_used, used_bytes);
    return block;
}

}  // namespace

// At least `bytes`, aligned to a page; null if there is no memory. A kept block serves even if it is much larger: in
// backward each cell's scratch memory finds room where a later cell's workspace was.
EXPORT void* fpdarts_allocate(int64_t bytes) try {
    const size_t size = (size_t(bytes) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = unused.lower_bound(size); found != unused.end() && found->first <= 8 * size) {
        const size_t kept = found->first;
        return use(take(found), kept);
    }
    // Blocks of a batch size that is over would stay for good: no more is kept than half of what was ever in use.
    while (!unused.empty() && used_bytes + size + unused_bytes > std::max(most_used, used_bytes + size) * 3 / 2)
        give_back_smallest();
    void* mapped;
    while ((mapped = mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) ==
           MAP_FAILED) {
        if (unused.empty()) return nullptr;
        give_back_smallest();
    }
    char* area = static_cast<char*>(mapped);
    char* block = area + (HUGE_PAGE - reinterpret_cast<uintptr_t>(area) % HUGE_PAGE) % HUGE_PAGE;
    if (block > area) munmap(area, block - area);
    if (block < area + HUGE_PAGE) munmap(block + size, area + HUGE_PAGE - block);
#ifdef MADV_HUGEPAGE
    madvise(block, size, MADV_HUGEPAGE);
#endif
    return use(block, size);
} catch (...) {  // no exception leaves, see dispatch.cpp
    return nullptr;
}

EXPORT void fpdarts_release(void* block) try {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = used.find(block);
    unused.emplace(found->second, block);
    unused_bytes += found->second, used_bytes -= found->second;
    used.erase(found);
} catch (...) {  // it stays in use
}
