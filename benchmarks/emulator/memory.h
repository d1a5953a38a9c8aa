// Memory of the kernel's tensors, and shared memory, of which is known who wrote and read it since the last barrier.
#pragma once

#include "machine.h"

namespace machine {

inline bool accessible(Warp& w, u64 p, int bytes, const char* what) {
    Block& b = *w.block;
    if (p % bytes) return fault(b, std::string("misaligned ") + what, p), false;
    const auto& memory = b.launch->memory;
    if (memory.empty() || (p >= b.last.begin && p + bytes <= b.last.end)) return true;
    for (const Range& range : memory)
        if (p >= range.begin && p + bytes <= range.end) return b.last = range, true;
    return fault(b, std::string(what) + " outside of the kernel's tensors", p), false;
}

// Whether another warp wrote there since the last barrier, which is right where it writes the same.
inline bool look(Warp& w, u32 at, int bytes, bool write) {
    Block& b = *w.block;
    bool twice = false;
    for (Shadow* s = &b.shadows[at]; s < &b.shadows[at] + bytes; s++) {
        if (s->written == b.barriers && s->writer != w.number) {
            if (!write) return fault(b, "race: read what another warp writes", at), false;
            twice = true;
        }
        if (write) {
            if (s->read == b.barriers && s->reader != w.number)
                return fault(b, "race: written while another warp reads", at), false;
            s->written = b.barriers, s->writer = w.number, s->there = true;
        } else {
            if (!s->there) return fault(b, "read before it is written", at), false;
            s->reader = s->read == b.barriers && s->reader != w.number ? SEVERAL : w.number, s->read = b.barriers;
        }
    }
    return twice;
}

inline bool in_shared(Warp& w, u32 at, int bytes, const char* what) {
    Block& b = *w.block;
    if (at % bytes) return fault(b, std::string("misaligned ") + what, at), false;
    if (u64(at) + bytes > b.shared.size()) return fault(b, std::string(what) + " outside of shared memory", at), false;
    return true;
}
inline void read_shared(Warp& w, u32 at, int bytes, void* to) {
    if (!in_shared(w, at, bytes, "shared load")) return;
    look(w, at, bytes, false);
    std::memcpy(to, &w.block->shared[at], bytes);
}
inline void write_shared(Warp& w, u32 at, int bytes, const void* from) {
    if (!in_shared(w, at, bytes, "shared store")) return;
    u8* to = &w.block->shared[at];
    if (look(w, at, bytes, true) && std::memcmp(to, from, bytes))
        fault(*w.block, "race: two warps write different values", at);
    std::memcpy(to, from, bytes);
}

// Counts what the lanes of a warp access together. A tensor begins with a line, as it would on a GPU.
inline void count_global(Warp& w, const u64* addresses, u32 mask) {
    const Block& b = *w.block;
    u64 lines[LANES], begin = 0;
    int count = 0;
    if (mask) {
        const u64 p = addresses[__builtin_ctz(mask)];
        for (const Range& range : b.launch->memory)
            if (p >= range.begin && p < range.end) begin = range.begin;
    }
    each(mask, [&](int l) {
        const u64 line = (addresses[l] - begin) >> 7;
        for (int k = count; k-- > 0;)
            if (lines[k] == line) return;
        lines[count++] = line;
    });
    w.block->counts.global += count;
}
inline void count_shared(Warp& w, const u64* addresses, u32 mask, int bytes) {
    const int together = bytes == 16 ? 8 : bytes == 8 ? 16 : LANES, words = bytes < 4 ? 1 : bytes / 4;
    for (int first = 0; first < LANES; first += together) {
        u64 wanted[32][LANES];  // words, by banks
        int counts[32] = {}, most = 0;
        for (int l = first; l < first + together; l++)
            for (int k = 0; k < words && (mask >> l & 1); k++) {
                const u64 word = (addresses[l] >> 2) + k;
                int& count = counts[word & 31];
                if (std::find(wanted[word & 31], wanted[word & 31] + count, word) == wanted[word & 31] + count)
                    wanted[word & 31][count++] = word, most = std::max(most, count);
            }
        w.block->counts.shared += most;
    }
}

// Of a vector of numbers of SIZE bytes. A list: registers, each with its size.
template <int SIZE, bool SHARED, bool STORE> void move(Warp& w, const Instruction& i, u32 mask) {
    const int *to = w.list(i), count = i.listed / 2, bytes = SIZE * count;
    u64 addresses[LANES];
    each(mask, [&](int l) {
        addresses[l] = i.immediate + (SHARED ? w.get<u32>(i.operands[0])[l] : w.get<u64>(i.operands[0])[l]);
    });
    SHARED ? count_shared(w, addresses, mask, bytes) : count_global(w, addresses, mask);
    each(mask, [&](int l) {
        const u64 p = addresses[l];
        if (SHARED && STORE)  // of lanes that store to one place the last one does, be it a warp's or another's
            for (int k = l + 1; k < LANES; k++)
                if (mask >> k & 1 && addresses[k] == p) return;
        u8 data[16] = {};
        auto place = [&](int j) { return w.registers + to[2 * j] + l * to[2 * j + 1]; };
        if (STORE)
            for (int j = 0; j < count; j++) std::memcpy(data + j * SIZE, place(j), SIZE);
        if (SHARED) {
            if (STORE) return write_shared(w, p, bytes, data);
            read_shared(w, p, bytes, data);
        } else {
            if (!accessible(w, p, bytes, STORE ? "store" : "load")) return;
            if (STORE) return void(std::memcpy(reinterpret_cast<void*>(p), data, bytes));
            std::memcpy(data, reinterpret_cast<void*>(p), bytes);
        }
        for (int j = 0; j < count; j++) {
            u64 number = 0;
            std::memcpy(&number, data + j * SIZE, SIZE);
            std::memcpy(place(j), &number, to[2 * j + 1]);
        }
    });
}

// A list: registers of all parameters, -1: not of this size. Operands: result, the parameter's number.
template <int SIZE> void load_parameter(Warp& w, const Instruction& i, u32 mask) {
    each(mask, [&](int l) {
        const u64 which = w.get<u64>(i.operands[1])[l];
        const int from = which < u64(i.listed) ? w.list(i)[which] : -1;
        if (from < 0) return fault(*w.block, "no parameter", which);
        std::memcpy(w.registers + i.operands[0] + l * SIZE, w.registers + from + l * SIZE, SIZE);
    });
}

inline void start_copy(Warp& w, const Instruction& i, u32 mask) {
    u64 from[LANES], to[LANES];
    u32 read = 0;
    each(mask, [&](int l) {
        from[l] = w.get<u64>(i.operands[1])[l] + i.target, to[l] = w.get<u32>(i.operands[0])[l] + i.immediate;
        read |= u32(w.get<u32>(i.operands[2])[l] > 0) << l;
    });
    count_global(w, from, read), count_shared(w, to, mask, i.size);
    each(mask, [&](int l) {
        Copy copy{u32(to[l]), i.size, {}};
        const int bytes = std::min<int>(w.get<u32>(i.operands[2])[l], i.size);  // the rest is 0
        if (!in_shared(w, copy.to, i.size, "copy")) return;
        if (bytes) {
            if (!accessible(w, from[l], i.size, "copy")) return;
            std::memcpy(copy.data, reinterpret_cast<void*>(from[l]), bytes);
        }
        look(w, copy.to, i.size, true);
        for (int b = 0; b < i.size; b++) {  // until it is there
            w.block->shadows[copy.to + b].there = false;
            w.block->shared[copy.to + b] = 0xff;
        }
        w.copies.open.push_back(copy);
    });
}
inline void arrive(Warp& w, const Copy& copy) {
    look(w, copy.to, copy.bytes, true);
    std::memcpy(&w.block->shared[copy.to], copy.data, copy.bytes);
}

inline void atomic_add(Warp& w, const Instruction& i, u32 mask) {
    each(mask, [&](int l) {
        const u64 p = w.get<u64>(i.operands[1])[l] + i.immediate;
        if (accessible(w, p, 4, "atomic"))
            w.get<u32>(i.operands[0])[l] =
                __atomic_fetch_add(reinterpret_cast<u32*>(p), w.get<u32>(i.operands[2])[l], __ATOMIC_ACQ_REL);
    });
}

}  // namespace machine
