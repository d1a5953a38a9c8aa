// Memory of workspaces, kept between steps. A cell's workspace is tens or hundreds of megabytes, and the system hands
// out each of its pages at first touch, zeroed: for a fresh one that takes as long as computing with it. Pages are huge
// where the system has such, which saves most misses of the translation cache.
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;
std::mutex mutex;
std::multimap<size_t, void*> unused;
std::map<void*, size_t> used;

}  // namespace

// At least `bytes`, aligned to a page; null if there is no memory. A kept block serves if it is not over twice as large.
EXPORT void* fpdarts_allocate(int64_t bytes) {
    const size_t size = (size_t(bytes) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = unused.lower_bound(size); found != unused.end() && found->first <= 2 * size) {
        void* block = found->second;
        used[block] = found->first;
        unused.erase(found);
        return block;
    }
    // none fits: what is kept is of another batch size, likely for good
    for (const auto& [kept, block] : unused) munmap(block, kept);
    unused.clear();
    char* area = static_cast<char*>(
        mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (area == MAP_FAILED) return nullptr;
    char* block = area + (HUGE_PAGE - reinterpret_cast<uintptr_t>(area) % HUGE_PAGE) % HUGE_PAGE;
    if (block > area) munmap(area, block - area);
    if (block < area + HUGE_PAGE) munmap(block + size, area + HUGE_PAGE - block);
#ifdef MADV_HUGEPAGE
    madvise(block, size, MADV_HUGEPAGE);
#endif
    used[block] = size;
    return block;
}

EXPORT void fpdarts_release(void* block) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = used.find(block);
    unused.emplace(found->second, block);
    used.erase(found);
}
