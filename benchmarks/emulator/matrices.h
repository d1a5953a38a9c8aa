// What the lanes of a warp do together: shuffles, and matrices.
#pragma once

#include "memory.h"
#include "numbers.h"

namespace machine {

inline void require_all(Warp& w, u32 mask) {
    if (mask != ALL) fault(*w.block, "only some lanes take part");
}

template <class From> void shuffle(Warp& w, const Instruction& i, u32 mask, From from) {
    u32 a[LANES];
    std::memcpy(a, w.get<u32>(i.operands[1]), sizeof a);
    each(mask, [&](int l) {
        const int source = from(l);
        if (!(mask >> source & 1)) fault(*w.block, "shuffled from a lane that does not take part");
        w.get<u32>(i.operands[0])[l] = a[source];
    });
}
inline void shuffle_butterfly(Warp& w, const Instruction& i, u32 mask) {
    shuffle(w, i, mask, [&](int l) { return (l ^ w.get<u32>(i.operands[2])[l]) & 31; });
}
inline void shuffle_index(Warp& w, const Instruction& i, u32 mask) {
    shuffle(w, i, mask, [&](int l) {
        const u32 c = w.get<u32>(i.operands[3])[l], segment = c >> 8 & 31, first = l & segment;
        const u32 source = first | (w.get<u32>(i.operands[2])[l] & ~segment & 31);
        return source > (first | (c & ~segment & 31)) ? u32(l) : source;
    });
}
inline void add_up(Warp& w, const Instruction& i, u32 mask) {
    u32 sum = 0;
    each(mask, [&](int l) { sum += w.get<u32>(i.operands[1])[l]; });
    each(mask, [&](int l) { w.get<u32>(i.operands[0])[l] = sum; });
}

// 8x8 matrices of 16 bit: row r of matrix m is at the address that lane 8 m + r has.
template <bool TRANSPOSED, bool STORE> void move_matrices(Warp& w, const Instruction& i, u32 mask) {
    require_all(w, mask);
    const u32* addresses = w.get<u32>(i.operands[0]);
    u64 places[LANES];
    std::copy(addresses, addresses + LANES, places);
    count_shared(w, places, i.listed == 8 ? ALL : (1u << 4 * i.listed) - 1, 16);
    for (int m = 0; m < i.listed / 2; m++) {
        u16 rows[8][8];
        u32* registers = w.get<u32>(w.list(i)[2 * m]);
        auto element = [&](int l, int k) -> u16& {
            const int a = l / 4, b = l % 4 * 2 + k;
            return TRANSPOSED ? rows[b][a] : rows[a][b];
        };
        if (STORE)
            for (int l = 0; l < LANES; l++) element(l, 0) = registers[l], element(l, 1) = registers[l] >> 16;
        for (int r = 0; r < 8; r++) {
            const u32 at = addresses[8 * m + r] + i.immediate;
            if (STORE)
                write_shared(w, at, 16, rows[r]);
            else
                read_shared(w, at, 16, rows[r]);
        }
        if (!STORE)
            for (int l = 0; l < LANES; l++) registers[l] = element(l, 0) | u32(element(l, 1)) << 16;
    }
}

// A lane's registers of a matrix that is multiplied from the left, 16 rows of K: bfloat16 in pairs, or tf32.
template <bool TF32, class Register> void left(f32* a, Register number) {
    constexpr int K = TF32 ? 8 : 16;
    for (int l = 0; l < LANES; l++)
        for (int r = 0; r < 4; r++) {
            const u32 value = number(r, l);
            const int row = l / 4 + 8 * (r & 1), half = r >> 1;
            if (TF32)
                a[row * K + l % 4 + 4 * half] = tf32(value);
            else
                for (int k = 0; k < 2; k++) a[row * K + l % 4 * 2 + 8 * half + k] = widened(value >> 16 * k);
        }
}

// d += a b, of 16 rows and columns in groups of 8; a lane has two of each in two rows.
template <int K, class Out, class In> void multiply(const f32* a, const f32* b, int columns, Out out, In in) {
    for (int l = 0; l < LANES; l++)
        for (int r = 0; r < columns / 2; r++) {
            const int row = l / 4 + 8 * (r >> 1 & 1), column = 8 * (r >> 2) + l % 4 * 2 + (r & 1);
            double sum = in(r, l);
            for (int k = 0; k < K; k++) sum += double(a[row * K + k]) * b[k * columns + column];
            *out(r, l) = sum;
        }
}

// A list: 4 registers of the result, 4 of the left, 2 of the right matrix, 4 of what is added to.
template <bool TF32> void product(Warp& w, const Instruction& i, u32 mask) {
    constexpr int K = TF32 ? 8 : 16;
    require_all(w, mask);
    w.block->counts.products += 16 * 8 * K;
    const int* r = w.list(i);
    f32 a[16 * K], b[K * 8];
    left<TF32>(a, [&](int n, int l) { return w.get<u32>(r[4 + n])[l]; });
    for (int l = 0; l < LANES; l++)
        for (int n = 0; n < 2; n++) {
            const u32 value = w.get<u32>(r[8 + n])[l];
            if (TF32)
                b[(l % 4 + 4 * n) * 8 + l / 4] = tf32(value);
            else
                for (int k = 0; k < 2; k++) b[(l % 4 * 2 + 8 * n + k) * 8 + l / 4] = widened(value >> 16 * k);
        }
    multiply<K>(
        a, b, 8, [&](int n, int l) { return w.get<f32>(r[n]) + l; },
        [&](int n, int l) { return w.get<f32>(r[10 + n])[l]; });
}

// An element of a matrix in shared memory, told by a descriptor: swizzled, with K or the other side contiguous.
template <bool TF32> f32 described(Warp& w, u64 descriptor, int other, int k, bool k_contiguous) {
    constexpr int SIZE = TF32 ? 4 : 2, SWIZZLED[] = {16, 128, 64, 32};
    const u32 leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const int width = SWIZZLED[descriptor >> 62];
    const int run = (k_contiguous ? k : other) * SIZE, rows = k_contiguous ? other : k;
    if (descriptor >> 49 & 7) fault(*w.block, "a descriptor with an offset of its base");
    u32 at = (descriptor & 0x3fff) << 4;
    at += rows % 8 * width + run % width;
    if (k_contiguous || width > 16)
        at += rows / 8 * stride + run / width * leading;
    else
        at += rows / 8 * leading + run / width * stride;
    at ^= (at >> 7 & (width / 16 - 1)) << 4;
    u32 value = 0;
    read_shared(w, at, SIZE, &value);
    return TF32 ? tf32(value) : widened(value);
}

// This warp's 16 of the 64 rows. A list: registers of the result, then of the left matrix if it is in registers.
// Operands: descriptors of the right and the left matrix (-1: in registers), whether to add to what is there.
enum { LEFT_TRANSPOSED = 1, RIGHT_TRANSPOSED = 2 };
template <bool TF32> void group_product(Warp& w, const Product& p) {
    constexpr int K = TF32 ? 8 : 16;
    const Instruction& i = *p.instruction;
    const int *r = w.list(i), columns = i.size;
    std::vector<f32> a(16 * K), b(K * columns);
    for (int n = 0; n < columns; n++)
        for (int k = 0; k < K; k++)
            b[k * columns + n] = described<TF32>(w, p.right, n, k, !(i.immediate & RIGHT_TRANSPOSED));
    if (i.operands[1] < 0) {
        left<TF32>(a.data(), [&](int n, int l) { return p.a[n][l]; });
    } else {
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < K; k++)
                a[row * K + k] =
                    described<TF32>(w, p.left, w.number % 4 * 16 + row, k, !(i.immediate & LEFT_TRANSPOSED));
    }
    auto d = [&](int n, int l) { return w.get<f32>(r[n]) + l; };
    multiply<K>(a.data(), b.data(), columns, d, [&](int n, int l) { return p.added ? *d(n, l) : 0.0f; });
}
template <bool TF32> void start_product(Warp& w, const Instruction& i, u32 mask) {
    require_all(w, mask);
    // of 32 bytes a row and column; four warps read the right matrix together
    w.block->counts.products += 16 * (TF32 ? 8 : 16) * i.size;
    w.block->counts.shared += (i.size / 4 + (i.operands[1] >= 0 ? 16 : 0)) / 4;
    Product p{&i, 0, *w.get<u64>(i.operands[0]), {}, *w.get<u8>(i.operands[2]) != 0};
    if (i.operands[1] >= 0)
        p.left = *w.get<u64>(i.operands[1]);
    else
        for (int r = 0; r < 4; r++) std::memcpy(p.a[r], w.get<u32>(w.list(i)[i.size / 2 + r]), sizeof p.a[r]);
    w.products.open.push_back(p);
}
inline void wait_for_products(Warp& w, const Instruction& i, u32) {
    w.products.wait(i.immediate, [&](const Product& p) {
        w.block->now = p.instruction;
        p.instruction->run == start_product<true> ? group_product<true>(w, p) : group_product<false>(w, p);
    });
}

}  // namespace machine
