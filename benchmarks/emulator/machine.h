// What a kernel, its blocks and its warps are, and how an operation is written for all lanes of a warp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace machine {

using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using f32 = float;
constexpr int LANES = 32;
constexpr u32 ALL = ~0u;
constexpr int MANY = 50;  // faults, after which a launch ends

struct Warp;
struct Instruction;
using Operation = void (*)(Warp&, const Instruction&, u32 mask);

struct Instruction {
    Operation run;
    int predicate, negated;  // register, -1: none
    int operands[4];         // registers
    int list, listed;        // more registers (and, of loads and stores, their sizes), in Kernel::lists
    s64 immediate;
    int size;    // of copies: bytes, of products: columns
    int target;  // of branches, an instruction; of copies the source's offset
    int line;    // in program.py's text
};

struct Kernel {
    std::vector<Instruction> instructions;
    std::vector<int> lists;
    std::vector<u8> registers;  // as they are at the beginning, with constants
};

struct Range {
    u64 begin, end;
};

// What takes time on a GPU, summed over warps.
struct Counts {
    u64 instructions = 0;
    u64 global = 0;    // lines of 128 bytes that pass through the first-level cache
    u64 shared = 0;    // passes through shared memory, of 128 bytes where no two words want one bank
    u64 products = 0;  // multiply-adds of matrices
};

struct Launch {
    const Kernel* kernel;
    u32 grid[3];
    int warps, shared;
    std::vector<Range> memory;  // that may be accessed, empty: not looked at
    std::mutex telling;
    std::string told;
    std::atomic<int> faults{0};
    Counts counts;
};

// Who last wrote and read a byte of shared memory, between which barriers.
struct Shadow {
    int written = -1, writer = -1, read = -1, reader = -1;
    bool there = false;
};
constexpr int SEVERAL = -2;  // readers

struct Block {
    Launch* launch;
    u32 at[3];
    std::vector<u8> shared;
    std::vector<Shadow> shadows;
    int barriers = 0;
    Counts counts;
    const Instruction* now = nullptr;
    Range last{0, 0};  // where memory was accessed last
};

struct Copy {
    u32 to;
    int bytes;
    u8 data[16];
};
struct Product {
    const Instruction* instruction;
    u64 left, right;  // descriptors of matrices in shared memory
    u32 a[4][LANES];  // the left one where it is in registers, which the assembler keeps until they are read
    bool added;
};
template <class T> struct Groups {  // of what is waited for in groups
    std::vector<T> open;
    std::vector<std::vector<T>> committed;
    void commit() {
        committed.push_back(std::move(open));
        open.clear();
    }
    template <class F> void wait(size_t kept, F deliver) {
        while (committed.size() > kept) {
            for (T& entry : committed.front()) deliver(entry);
            committed.erase(committed.begin());
        }
    }
    bool waited_for() const {
        return open.empty() && std::all_of(committed.begin(), committed.end(), [](auto& g) { return g.empty(); });
    }
};

struct Lanes {  // that run together
    u32 mask;
    int at;
};
struct Warp {
    u8* registers;
    Block* block;
    int number;
    Lanes now{ALL, 0};
    std::vector<Lanes> others;
    bool ended = false;
    Groups<Copy> copies;
    Groups<Product> products;

    template <class T> T* get(int offset) { return reinterpret_cast<T*>(registers + offset); }
    const int* list(const Instruction& i) const { return block->launch->kernel->lists.data() + i.list; }
};

inline void fault(Block& b, const std::string& what, u64 where = 0) {
    Launch& launch = *b.launch;
    std::lock_guard<std::mutex> lock(launch.telling);
    if (launch.faults++ >= 3) return;
    launch.told += what + (where ? " at " + std::to_string(where) : "") + ", line " +
                   std::to_string(b.now ? b.now->line : -1) + ", block";
    for (u32 at : b.at) launch.told += " " + std::to_string(at);
    launch.told += "\n";
}

template <class F> inline void each(u32 mask, F f) {
    if (mask == ALL)
        for (int l = 0; l < LANES; l++) f(l);
    else
        for (int l = 0; l < LANES; l++)
            if (mask >> l & 1) f(l);
}

inline std::unordered_map<std::string, Operation> operations;  // by the names that program.py gives them

// d = f(a), f(a, b) and f(a, b, c) in each lane
template <class D, class A, class F> void one(const std::string& name, F) {
    operations[name] = [](Warp& w, const Instruction& i, u32 mask) {
        D* d = w.get<D>(i.operands[0]);
        const A* a = w.get<A>(i.operands[1]);
        each(mask, [=](int l) { d[l] = F{}(a[l]); });
    };
}
template <class D, class A, class B, class F> void two(const std::string& name, F) {
    operations[name] = [](Warp& w, const Instruction& i, u32 mask) {
        D* d = w.get<D>(i.operands[0]);
        const A* a = w.get<A>(i.operands[1]);
        const B* b = w.get<B>(i.operands[2]);
        each(mask, [=](int l) { d[l] = F{}(a[l], b[l]); });
    };
}
template <class D, class A, class B, class C, class F> void three(const std::string& name, F) {
    operations[name] = [](Warp& w, const Instruction& i, u32 mask) {
        D* d = w.get<D>(i.operands[0]);
        const A* a = w.get<A>(i.operands[1]);
        const B* b = w.get<B>(i.operands[2]);
        const C* c = w.get<C>(i.operands[3]);
        each(mask, [=](int l) { d[l] = F{}(a[l], b[l], c[l]); });
    };
}

}  // namespace machine
