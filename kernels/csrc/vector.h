// Vectors of V float lanes, a block of V channels of one pixel each. Plain GCC vector extensions: the same source
// becomes AVX2 or AVX-512, by the flags of the object that it is compiled into.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace FPDARTS_ISA {

#ifdef __AVX512F__
constexpr int REGISTERS = 32;
constexpr int WIDEST = 16;
#else
constexpr int REGISTERS = 16;
constexpr int WIDEST = 8;
#endif

template <int V> struct Lanes;
template <> struct Lanes<8> {
    typedef float type __attribute__((vector_size(32)));
    typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));
};
template <> struct Lanes<16> {
    typedef float type __attribute__((vector_size(64)));
    typedef float loose __attribute__((vector_size(64), aligned(4), may_alias));
};
template <int V> using Vec = typename Lanes<V>::type;

template <int V> INLINE Vec<V> load(const float* p) { return *reinterpret_cast<const typename Lanes<V>::loose*>(p); }
template <int V> INLINE void store(float* p, Vec<V> v) { *reinterpret_cast<typename Lanes<V>::loose*>(p) = v; }
template <int V> INLINE void add_to(float* p, Vec<V> v) { store<V>(p, load<V>(p) + v); }
// The first `count` lanes, or all; zeros behind.
template <int V> INLINE Vec<V> load_some(const float* p, int count) {
    if (count >= V) return load<V>(p);
    Vec<V> v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
}
template <int V> INLINE void store_some(float* p, Vec<V> v, int count) {
    if (count >= V) return store<V>(p, v);
    for (int i = 0; i < count; i++) p[i] = v[i];
}
template <int V> INLINE Vec<V> relu(Vec<V> v) {
    const Vec<V> zero = {};
    return v < zero ? zero : v;  // NaN stays NaN, as in PyTorch
}
template <int V> INLINE Vec<V> maximum(Vec<V> a, Vec<V> b) { return a >= b ? a : b; }

constexpr int PIXELS = 8;  // computed at once; rows of scratch memory are padded to a multiple
INLINE int padded(int width) { return (width + PIXELS - 1) / PIXELS * PIXELS; }

}  // namespace FPDARTS_ISA
