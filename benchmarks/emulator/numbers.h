// Arithmetic, each lane for itself.
#pragma once

#include "machine.h"

#include <limits>

namespace machine {

template <class T, class F> inline T bits_of(F f) {
    T t;
    static_assert(sizeof t == sizeof f);
    std::memcpy(&t, &f, sizeof t);
    return t;
}
inline f32 widened(u16 x) { return bits_of<f32>(u32(x) << 16); }  // bfloat16
inline u16 rounded(f32 x) {
    const u32 b = bits_of<u32>(x);
    return std::isnan(x) ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline f32 tf32(u32 x) { return bits_of<f32>(x & 0xffffe000u); }  // the tensor cores ignore the rest
inline f32 maximum(f32 a, f32 b) { return a > b || (a == b && !std::signbit(a)) || std::isnan(b) ? a : b; }
inline f32 maximum_or_nan(f32 a, f32 b) {
    return std::isnan(a) || std::isnan(b) ? std::numeric_limits<f32>::quiet_NaN() : maximum(a, b);
}
template <class F> inline u32 in_pairs(u32 a, u32 b, F f) {
    return rounded(f(widened(a), widened(b))) | u32(rounded(f(widened(a >> 16), widened(b >> 16)))) << 16;
}
inline f32 relu(f32 x) { return x < 0 ? 0.0f : x; }

struct bf16 {
    u16 bits;
    operator f32() const { return widened(bits); }
};

template <class T> void comparisons(const std::string& kind) {
    auto named = [&](const char* name) { return std::string("setp.") + name + "." + kind; };
    two<u8, T, T>(named("eq"), [](T a, T b) { return a == b; });
    two<u8, T, T>(named("ne"), [](T a, T b) { return a < b || a > b; });
    two<u8, T, T>(named("lt"), [](T a, T b) { return a < b; });
    two<u8, T, T>(named("le"), [](T a, T b) { return a <= b; });
    two<u8, T, T>(named("gt"), [](T a, T b) { return a > b; });
    two<u8, T, T>(named("ge"), [](T a, T b) { return a >= b; });
    two<u8, T, T>(named("neu"), [](T a, T b) { return !(a == b); });
    two<u8, T, T>(named("nan"), [](T a, T b) { return !(a == a && b == b); });
}

template <class F> void compare_pairs(const std::string& name, F) {
    operations["setp." + name + ".bf16x2"] = [](Warp& w, const Instruction& i, u32 mask) {
        u8 *low = w.get<u8>(i.operands[0]), *high = w.get<u8>(i.operands[1]);
        const u32 *a = w.get<u32>(i.operands[2]), *b = w.get<u32>(i.operands[3]);
        each(mask, [=](int l) {
            low[l] = F{}(widened(a[l]), widened(b[l]));
            high[l] = F{}(widened(a[l] >> 16), widened(b[l] >> 16));
        });
    };
}

template <class T, class Wide> void integers(const std::string& kind) {
    constexpr int BITS = 8 * sizeof(T);
    two<T, T, T>("add." + kind, [](T a, T b) { return T(u64(a) + u64(b)); });
    two<T, T, T>("sub." + kind, [](T a, T b) { return T(u64(a) - u64(b)); });
    two<T, T, T>("mul.lo." + kind, [](T a, T b) { return T(u64(a) * u64(b)); });
    two<T, T, T>("mul.hi." + kind, [](T a, T b) { return T(Wide(a) * Wide(b) >> BITS); });
    three<T, T, T, T>("mad.lo." + kind, [](T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); });
    two<T, T, T>("div." + kind, [](T a, T b) { return b ? T(a / b) : T(-1); });
    two<T, T, T>("rem." + kind, [](T a, T b) { return b ? T(a % b) : a; });
    two<T, T, T>("min." + kind, [](T a, T b) { return std::min(a, b); });
    two<T, T, T>("max." + kind, [](T a, T b) { return std::max(a, b); });
    one<T, T>("neg." + kind, [](T a) { return T(-u64(a)); });
    two<T, T, u32>("shr." + kind, [](T a, u32 b) { return T(b < BITS ? a >> b : a < 0 ? -1 : 0); });
    if constexpr (sizeof(T) < 8) {
        two<Wide, T, T>("mul.wide." + kind, [](T a, T b) { return Wide(Wide(a) * b); });
        three<Wide, T, T, Wide>("mad.wide." + kind, [](T a, T b, Wide c) { return Wide(Wide(a) * b + c); });
    }
    comparisons<T>(kind);
}

template <class T> void logic(const std::string& kind) {
    two<T, T, T>("and." + kind, [](T a, T b) { return T(a & b); });
    two<T, T, T>("or." + kind, [](T a, T b) { return T(a | b); });
    two<T, T, T>("xor." + kind, [](T a, T b) { return T(a ^ b); });
    one<T, T>("mov." + kind, [](T a) { return a; });
    if (kind == "pred") return one<T, T>("not.pred", [](T a) { return T(!a); });
    one<T, T>("not." + kind, [](T a) { return T(~a); });
    two<T, T, u32>("shl." + kind, [](T a, u32 b) { return T(b < 8 * sizeof(T) ? u64(a) << b : 0); });
    three<T, T, T, u8>("selp." + kind, [](T a, T b, u8 p) { return p ? a : b; });
    comparisons<T>(kind);
}

template <class D, class A> void conversion(const std::string& kinds) {
    one<D, A>("cvt." + kinds, [](A a) { return D(a); });
}

// len bits of a from position at on, sign or zero extended
template <class T> inline T field(T a, u32 at, u32 len) {
    constexpr u32 BITS = 8 * sizeof(T);
    at &= 255, len &= 255;
    if (!len) return 0;
    const bool sign = std::is_signed_v<T> && a < 0;
    if (at >= BITS) return sign ? -1 : 0;
    const u32 unused = BITS - std::min(len, BITS - at);
    return T(T(u64(T(a >> at)) << unused) >> unused);
}

inline u32 permuted(u32 a, u32 b, u32 selector) {
    const u64 both = u64(b) << 32 | a;
    u32 d = 0;
    for (int k = 0; k < 4; k++) {
        const u32 n = selector >> 4 * k & 15;
        u32 byte = both >> 8 * (n & 7) & 255;
        if (n & 8) byte = byte & 128 ? 255 : 0;
        d |= byte << 8 * k;
    }
    return d;
}

inline void arithmetic() {
    integers<s16, s32>("s16"), integers<u16, u32>("u16"), integers<s32, s64>("s32"), integers<u32, u64>("u32");
    integers<s64, __int128>("s64"), integers<u64, unsigned __int128>("u64");
    logic<u8>("pred"), logic<u16>("b16"), logic<u32>("b32"), logic<u64>("b64");
    comparisons<f32>("f32"), comparisons<bf16>("bf16");
    compare_pairs("gt", [](f32 a, f32 b) { return a > b; });
    compare_pairs("lt", [](f32 a, f32 b) { return a < b; });
    compare_pairs("ne", [](f32 a, f32 b) { return a < b || a > b; });
    compare_pairs("neu", [](f32 a, f32 b) { return a != b; });
    compare_pairs("nan", [](f32 a, f32 b) { return std::isnan(a) || std::isnan(b); });
    two<f32, f32, f32>("add.f32", [](f32 a, f32 b) { return a + b; });
    two<f32, f32, f32>("sub.f32", [](f32 a, f32 b) { return a - b; });
    two<f32, f32, f32>("mul.f32", [](f32 a, f32 b) { return a * b; });
    two<f32, f32, f32>("div.f32", [](f32 a, f32 b) { return a / b; });
    three<f32, f32, f32, f32>("fma.f32", [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
    two<f32, f32, f32>("max.f32", [](f32 a, f32 b) { return maximum(a, b); });
    two<f32, f32, f32>("max.NaN.f32", [](f32 a, f32 b) { return maximum_or_nan(a, b); });
    two<u32, u32, u32>("max.NaN.bf16x2", [](u32 a, u32 b) { return in_pairs(a, b, maximum_or_nan); });
    one<f32, f32>("neg.f32", [](f32 a) { return -a; });
    one<f32, f32>("sqrt.f32", [](f32 a) { return std::sqrt(a); });
    two<u32, u32, u32>("add.s16x2", [](u32 a, u32 b) { return ((a + b) & 0xffff) | ((a >> 16) + (b >> 16)) << 16; });
    conversion<f32, bf16>("f32.bf16"), conversion<f32, s32>("f32.s32"), conversion<f32, u32>("f32.u32");
    conversion<u64, u32>("u64.u32"), conversion<u32, u64>("u32.u64"), conversion<u16, u64>("u16.u64");
    conversion<u16, u32>("u16.u32"), conversion<u32, u16>("u32.u16"), conversion<u64, u16>("u64.u16");
    conversion<s64, s32>("s64.s32"), conversion<s32, s16>("s32.s16"), conversion<s64, s16>("s64.s16");
    one<s16, s16>("cvt.s16.s8", [](s16 a) { return s16(s8(a)); });
    one<s32, s32>("cvt.s32.s8", [](s32 a) { return s32(s8(a)); });
    one<u16, f32>("cvt.bf16.f32", [](f32 a) { return rounded(a); });
    two<u32, f32, f32>("cvt.bf16x2.f32", [](f32 a, f32 b) { return u32(rounded(a)) << 16 | rounded(b); });
    two<u32, f32, f32>("cvt.relu.bf16x2.f32",
                       [](f32 a, f32 b) { return u32(rounded(relu(a))) << 16 | rounded(relu(b)); });
    three<u32, u32, u32, u32>("bfe.u32", [](u32 a, u32 at, u32 len) { return field(a, at, len); });
    three<u64, u64, u32, u32>("bfe.u64", [](u64 a, u32 at, u32 len) { return field(a, at, len); });
    three<s32, s32, u32, u32>("bfe.s32", [](s32 a, u32 at, u32 len) { return field(a, at, len); });
    three<s64, s64, u32, u32>("bfe.s64", [](s64 a, u32 at, u32 len) { return field(a, at, len); });
    three<u32, u32, u32, u32>("prmt.b32", [](u32 a, u32 b, u32 s) { return permuted(a, b, s); });
    three<u32, u32, u32, u32>("shf.l.wrap.b32",
                              [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) << (c & 31) >> 32); });
    two<u32, u16, u16>("pack.b32", [](u16 a, u16 b) { return u32(b) << 16 | a; });
    two<u64, u32, u32>("pack.b64", [](u32 a, u32 b) { return u64(b) << 32 | a; });
}

template <class Half, class Whole> void unpack(Warp& w, const Instruction& i, u32 mask) {
    Whole whole[LANES];
    std::memcpy(whole, w.get<Whole>(i.operands[2]), sizeof whole);
    for (int h = 0; h < 2; h++)
        if (i.operands[h] >= 0)
            each(mask, [&](int l) { w.get<Half>(i.operands[h])[l] = whole[l] >> 8 * sizeof(Half) * h; });
}

}  // namespace machine
