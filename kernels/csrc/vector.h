// Vectors of V float lanes, a block of V channels of one pixel each. Plain GCC vector extensions: the same source
// becomes AVX2 or AVX-512, by the flags of the object that it is compiled into.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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
    typedef float loose __attribute__((vector_size(32), aligned(4)));
};
template <> struct Lanes<16> {
    typedef float type __attribute__((vector_size(64)));
    typedef float loose __attribute__((vector_size(64), aligned(4)));
};
template <int V> using Vec = typename Lanes<V>::type;

template <int V> INLINE Vec<V> load(const float* p) { return *reinterpret_cast<const typename Lanes<V>::loose*>(p); }
template <int V> INLINE void store(float* p, Vec<V> v) { *reinterpret_cast<typename Lanes<V>::loose*>(p) = v; }
template <int V> INLINE void add_to(float* p, Vec<V> v) { store<V>(p, load<V>(p) + v); }
// Past the caches, which have no room for what is read again only when all images have been seen: no line is fetched
// to be overwritten. p is a multiple of the vector; a thread that has done so fences before others read.
template <int V> INLINE void store_past(float* p, Vec<V> v) {
#ifdef __AVX512F__
    if constexpr (V == 16) return _mm512_stream_ps(p, __m512(v));
    else
#endif
        _mm256_stream_ps(p, __m256(v));
}
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
// Of a map that is read from one end to the other. Took 2 to 5 % off a search step on an Intel Xeon, where its memory was
// busier more.
INLINE void fetch_ahead(const float* p) {
    constexpr int PAGES = 2;
    __builtin_prefetch(p + PAGES * 1024, 0, 2);  // into the second cache
}
template <int V> INLINE Vec<V> relu(Vec<V> v) {
    const Vec<V> zero = {};
    return v < zero ? zero : v;  // NaN stays NaN, as in PyTorch
}
template <int V> INLINE Vec<V> where_positive(Vec<V> condition, Vec<V> v) {
    const Vec<V> zero = {};
    return condition > zero ? v : zero;
}
template <int V> INLINE Vec<V> maximum(Vec<V> a, Vec<V> b) { return (a >= b) | (a != a) ? a : b; }  // or NaN

// Keeps a value in a register: the compiler would load it again at each of its uses.
template <class T> INLINE void hold(T& v) {
#ifdef __AVX512F__
    asm volatile("" : "+v"(v));
#else
    asm volatile("" : "+x"(v));
#endif
}

// Pixels that fit one vector: of 8 channels two, where vectors have 16 lanes.
template <int V> constexpr int PACK = WIDEST / V;

// A value a channel, once and as often as pixels fit a vector; made before a loop, taken in it.
template <int V> struct Spread {
    Vec<V> one;
    Vec<PACK<V> * V> all;
    INLINE explicit Spread(Vec<V> v) : one(v) {
        if constexpr (PACK<V> == 1) {
            all = v;
        } else {
            alignas(64) float copies[PACK<V> * V];
            for (int i = 0; i < PACK<V>; i++) store<V>(copies + i * V, v);
            all = load<PACK<V> * V>(copies);
        }
    }
    template <int L> INLINE Vec<L> as() const {
        if constexpr (L == V) return one;
        else return all;
    }
};

// V of the lanes, those from FIRST on.
template <int V, int FIRST, int L, size_t... I> INLINE Vec<V> lanes_of(Vec<L> v, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(v, v, int(FIRST + I)...);
#else
    return Vec<V>{v[FIRST + I]...};
#endif
}
template <int V, int FIRST, int L> INLINE Vec<V> lanes_of(Vec<L> v) {
    return lanes_of<V, FIRST, L>(v, std::make_index_sequence<V>());
}

// Of pixels side by side, which begin where one of them may.
template <int V> INLINE void store_past(float* p, Vec<2 * V> v) {
    store_past<V>(p, lanes_of<V, 0, 2 * V>(v)), store_past<V>(p + V, lanes_of<V, V, 2 * V>(v));
}

template <int V, size_t... I> INLINE Vec<2 * V> joined(Vec<V> a, Vec<V> b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, int(I)...);
#else
    return Vec<2 * V>{(I < V ? a[I % V] : b[I % V])...};
#endif
}
// The lanes of a, then those of b.
template <int V> INLINE Vec<2 * V> joined(Vec<V> a, Vec<V> b) {
    return joined<V>(a, b, std::make_index_sequence<2 * V>());
}

// The sum of a vector's pixels.
template <int V, int L> INLINE Vec<V> folded(Vec<L> v) {
    if constexpr (L == V) {
        return v;
    } else {
        static_assert(L == 2 * V);
        return lanes_of<V, 0, L>(v) + lanes_of<V, V, L>(v);
    }
}

template <int V> struct Indices;
template <> struct Indices<8> { typedef int type __attribute__((vector_size(32))); };
template <> struct Indices<16> { typedef int type __attribute__((vector_size(64))); };

// Lanes of a and, from V on, of b.
template <int V> INLINE Vec<V> pick(Vec<V> a, Vec<V> b, typename Indices<V>::type lanes) {
#ifdef __clang__
    Vec<V> out;
    for (int i = 0; i < V; i++) out[i] = lanes[i] < V ? a[lanes[i]] : b[lanes[i] - V];
    return out;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// (a, b) -> a0 b0 a1 b1 .., in two vectors, and back.
template <int V> INLINE void interleave(Vec<V>& a, Vec<V>& b) {
    typename Indices<V>::type low, high;
    UNROLL for (int i = 0; i < V; i++) low[i] = i / 2 + i % 2 * V, high[i] = low[i] + V / 2;
    const Vec<V> first = pick<V>(a, b, low);
    b = pick<V>(a, b, high), a = first;
}
template <int V> INLINE void separate(Vec<V>& a, Vec<V>& b) {
    typename Indices<V>::type even, odd;
    UNROLL for (int i = 0; i < V; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const Vec<V> first = pick<V>(a, b, even);
    b = pick<V>(a, b, odd), a = first;
}

// N = 2 images side by side, of 8 channels in vectors of 16: lanes 2c and 2c + 1 are channel c of the one and the other.
// Their pixels lie where vectors begin, and two of them are what vectors of a single image's pixels hold: see separate.
constexpr int SIDE_BY_SIDE = 2;
// Channels' sums over what a vector holds of them: pixels, or images.
template <int V, int N, int L> INLINE Vec<V / N> folded_channels(Vec<L> v) {
    if constexpr (N == 1) {
        return folded<V, L>(v);
    } else {
        Vec<L> odd = v;
        separate<L>(v, odd);
        return lanes_of<V / N, 0, L>(v) + lanes_of<V / N, 0, L>(odd);
    }
}
// A pixel of two images.
template <int V> INLINE void store_side_by_side(float* p, Vec<V> a, Vec<V> b) {
    interleave<V>(a, b);
    store<V>(p, a), store<V>(p + V, b);
}

// The first V lanes, each as often as pixels fit a vector.
template <int V, int L> INLINE Vec<L> repeated(Vec<L> v) {
    if constexpr (L == V) return v;
    typename Indices<L>::type lanes;
    UNROLL for (int i = 0; i < L; i++) lanes[i] = i / (L / V);
    return pick<L>(v, v, lanes);
}

template <int I> using Constant = std::integral_constant<int, I>;

// f(first pixel, lanes as a constant) over a run of pixels that lie side by side, as many at a time as fit a vector.
template <int V, class F> INLINE void over_pixels(int count, F&& f) {
    int i = 0;
    for (; i + PACK<V> <= count; i += PACK<V>) f(i, Constant<PACK<V> * V>{});
    if constexpr (PACK<V> > 1) {
        for (; i < count; i++) f(i, Constant<V>{});
    }
}

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// A run of blocks, stored past the caches; `to` is a multiple of V floats, `floats` too.
template <int V> INLINE void copy_past(float* to, const float* from, int64_t floats) {
    int64_t i = 0;
    if (reinterpret_cast<uintptr_t>(to) % (4 * WIDEST)) store_past<8>(to, load<8>(from)), i = 8;
    for (; i + WIDEST <= floats; i += WIDEST) store_past<WIDEST>(to + i, load<WIDEST>(from + i));
    if (i < floats) store_past<8>(to + i, load<8>(from + i));
}

constexpr int PIXELS = 8;  // vectors of pixels computed at once
// Rows of scratch memory have room for what is computed beyond their end.
INLINE int padded(int width) {
    const int step = width > PIXELS ? PIXELS * WIDEST / 8 : PIXELS;
    return (width + step - 1) / step * step;
}

}  // namespace FPDARTS_ISA
