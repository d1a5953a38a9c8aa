// Whole maps of one image and block: tiles with a margin, poolings, and the channel shuffle.
#pragma once

#include <vector>

#include "convolution.h"

namespace FPDARTS_ISA {

// A map with a margin that stays zero. Rows are wide enough for what depthwise_rows reads at either stride.
struct Tile {
    int height, width, pitch;  // pitch in pixels
    Tile(int height, int width, int margin, int stride)
        : height(height), width(width), pitch(padded(divide_up(width, stride)) * stride + 2 * margin), margin(margin) {}
    int margin;
    int pixels() const { return (height + 2 * margin) * pitch; }
    // Where a convolution that reaches `reach` pixels around reads row y from.
    long at(int y, int reach) const { return long(y + margin - reach) * pitch + margin - reach; }
};

// What is done to a map where it is read, (value - mean) scale + shift a channel; nothing by default.
struct Normalization {
    const float *mean = nullptr, *scale = nullptr, *shift = nullptr;  // [lanes]; no shift: 0

    template <int V> struct Block {
        Spread<V> mean, scale, shift;
        template <int L> INLINE Vec<L> apply(Vec<L> v) const {
            return (v - mean.template as<L>()) * scale.template as<L>() + shift.template as<L>();
        }
    };
    template <int V> INLINE Block<V> block(int b) const {
        const Vec<V> zero{};
        return {Spread<V>(mean ? load<V>(mean + b * V) : zero), Spread<V>(mean ? load<V>(scale + b * V) : zero + 1.0f),
                Spread<V>(shift ? load<V>(shift + b * V) : zero)};
    }
    template <int V> INLINE Vec<V> apply(int b, Vec<V> v) const {
        if (mean) v = (v - load<V>(mean + b * V)) * load<V>(scale + b * V);
        return shift ? v + load<V>(shift + b * V) : v;
    }
};

// One block of a map into a tile whose margin is filled already.
template <int V> void copy_into(float* tile, const Tile& t, const float* map) {
    for (int y = 0; y < t.height; y++) std::copy_n(map + y * t.width * V, t.width * V, tile + t.at(y, 0) * V);
}
// The same of all blocks, normalized; and its ReLU.
template <int V, bool RELU = true>
void fill_tile(float* tile, const Tile& t, int blocks, const float* map, const Normalization& normalization) {
    for (int b = 0; b < blocks; b++) {
        const auto own = normalization.block<V>(b);
        for (int y = 0; y < t.height; y++) {
            float* to = tile + (int64_t(b) * t.pixels() + t.at(y, 0)) * V;
            const float* from = map + (int64_t(b) * t.height + y) * t.width * V;
            over_pixels<V>(t.width, [=](int x, auto lanes) {
                constexpr int L = lanes;
                fetch_ahead(from + x * V);
                const Vec<L> value = own.template apply<L>(load<L>(from + x * V));
                store<L>(to + x * V, RELU ? relu<L>(value) : value);
            });
        }
    }
}

// Maps of two images, one behind the other, each of one block, into a tile of images side by side. An even width.
template <int V> void fill_side_by_side(float* tile, const Tile& t, const float* map, const Normalization& normalization) {
    constexpr int L = SIDE_BY_SIDE * V;
    const auto own = normalization.block<V>(0);
    const int64_t image = int64_t(t.height) * t.width * V;
    for (int y = 0; y < t.height; y++) {
        float* to = tile + t.at(y, 0) * L;
        const float* from = map + int64_t(y) * t.width * V;
        for (int x = 0; x < t.width; x += 2) {
            fetch_ahead(from + x * V), fetch_ahead(from + image + x * V);
            Vec<L> a = relu<L>(own.template apply<L>(load<L>(from + x * V)));
            Vec<L> b = relu<L>(own.template apply<L>(load<L>(from + image + x * V)));
            interleave<L>(a, b);
            store<L>(to + x * L, a), store<L>(to + (x + 1) * L, b);
        }
    }
}

// Scratch memory of a thread; its pages are touched once, not at every call.
class Arena {
   public:
    // Begins anew; what was taken before is void.
    void reset() { next = 0; }
    // Zeros. Pieces of one phase are asked for in one order, so that each meets its memory of the time before.
    float* take(size_t floats) {
        if (next == pieces.size()) pieces.emplace_back();
        std::vector<float>& piece = pieces[next++];
        piece.assign(floats + 32, 0.0f);  // for the alignment, and for what outer reads behind the end
        return piece.data() + (64 - reinterpret_cast<uintptr_t>(piece.data()) % 64) % 64 / 4;
    }

   private:
    std::vector<std::vector<float>> pieces;
    size_t next = 0;
};

inline Arena& arena() {
    static thread_local Arena own;
    return own;
}

INLINE int valid(int i, int size) { return 3 - (i == 0) - (i == size - 1); }

// 3x3 pooling of a tile with a margin of 1, filled with -INFINITY (maximum) or 0 (average).
template <int V, bool MAX> void pool_map(const float* tile, const Tile& t, int stride, float* out) {
    const long pitch = long(t.pitch) * V;
    for (int y = 0; y < t.height; y += stride) {
        for (int x = 0; x < t.width; x += stride, out += V) {
            const float* from = tile + y * pitch + x * V;
            Vec<V> value = load<V>(from);
            UNROLL for (int k = 1; k < 9; k++) {
                const Vec<V> tap = load<V>(from + k / 3 * pitch + k % 3 * V);
                value = MAX ? maximum<V>(value, tap) : value + tap;
            }
            if (!MAX) value *= 1.0f / (valid(y, t.height) * valid(x, t.width));
            store<V>(out, value);
        }
    }
}

// Adds the gradient of pool_map to `d`, a tile of the same form. d_out: of the output. The first of equal maxima gets
// it, as in PyTorch.
template <int V, bool MAX>
void pool_map_backward(const float* tile, const float* out, const Tile& t, int stride, float* d, const float* d_out) {
    const long pitch = long(t.pitch) * V;
    for (int y = 0, i = 0; y < t.height; y += stride) {
        for (int x = 0; x < t.width; x += stride, i++) {
            float* to = d + y * pitch + x * V;
            Vec<V> gradient = load<V>(d_out + i * V);
            if (MAX) {
                const float* from = tile + y * pitch + x * V;
                const Vec<V> value = load<V>(out + i * V);
                UNROLL for (int k = 0; k < 9; k++) {
                    const long tap = k / 3 * pitch + k % 3 * V;
                    const auto here = load<V>(from + tap) == value;
                    add_to<V>(to + tap, here ? gradient : Vec<V>{});
                    gradient = here ? Vec<V>{} : gradient;
                }
            } else {
                gradient *= 1.0f / (valid(y, t.height) * valid(x, t.width));
                UNROLL for (int k = 0; k < 9; k++) add_to<V>(to + k / 3 * pitch + k % 3 * V, gradient);
            }
        }
    }
}

// 2x2 maximum at stride 2 of a plain map, and its gradient into a plain map.
template <int V> void halve_map(const float* in, int height, int width, float* out) {
    for (int y = 0; y < height; y += 2)
        for (int x = 0; x < width; x += 2, out += V) {
            const float *a = in + (y * width + x) * V, *b = a + width * V;
            store<V>(out, maximum<V>(maximum<V>(load<V>(a), load<V>(a + V)), maximum<V>(load<V>(b), load<V>(b + V))));
        }
}

template <int V>
void halve_map_backward(const float* in, const float* out, int height, int width, float* d, const float* d_out) {
    for (int y = 0, i = 0; y < height; y += 2)
        for (int x = 0; x < width; x += 2, i++) {
            Vec<V> gradient = load<V>(d_out + i * V);
            const Vec<V> value = load<V>(out + i * V);
            UNROLL for (int k = 0; k < 4; k++) {
                const long at = ((y + k / 2) * width + x + k % 2) * V;
                const auto here = load<V>(in + at) == value;
                add_to<V>(d + at, here ? gradient : Vec<V>{});
                gradient = here ? Vec<V>{} : gradient;
            }
        }
}

// --- Gradients where ReLU let a map through: of one image, or of two side by side, whose maps are one behind the other.
// convolved: of the ReLU's result, rows of padded(width) pixels. ---

// Gradients of images are `apart`. height: of all blocks.
template <int V>
void pass_map(int images, const float* convolved, const float* map, int height, int width, float* d_map, int64_t apart) {
    const int64_t image = int64_t(height) * width * V;
    for (int y = 0; y < height; y++, convolved += images * padded(width) * V, map += width * V, d_map += width * V) {
        if constexpr (PACK<V> == SIDE_BY_SIDE) {
            constexpr int L = SIDE_BY_SIDE * V;
            for (int x = 0; x < width && images > 1; x += 2) {
                Vec<L> one = load<L>(convolved + x * L), other = load<L>(convolved + (x + 1) * L);
                separate<L>(one, other);
                store<L>(d_map + x * V, where_positive<L>(load<L>(map + x * V), one));
                store<L>(d_map + apart + x * V, where_positive<L>(load<L>(map + image + x * V), other));
            }
            if (images > 1) continue;
        }
        over_pixels<V>(width, [=](int x, auto lanes) {
            constexpr int L = lanes;
            store<L>(d_map + x * V, where_positive<L>(load<L>(map + x * V), load<L>(convolved + x * V)));
        });
    }
}

// One block, from a tile that holds the result, stored past the caches or not; and its sums: of the gradient, and of it
// times the result.
template <int V>
void pass_tile(int images, const float* tile, const Tile& t, const float* convolved, float* out, bool past, Vec<V>& sum,
               Vec<V>& product) {
    const auto write = [=](float* p, auto v) INLINE_LAMBDA {
        if (past) store_past<V>(p, v);
        else store<sizeof v / sizeof *p>(p, v);
    };
    constexpr int L = PACK<V> * V;
    const int64_t image = int64_t(t.height) * t.width * V;
    for (int y = 0; y < t.height; y++, convolved += images * padded(t.width) * V, out += t.width * V) {
        const float* seen = tile + t.at(y, 0) * images * V;
        Vec<L> line_sum{}, line_product{};
        const auto passed = [&](int x, auto lanes) INLINE_LAMBDA {
            constexpr int now = lanes;
            const Vec<now> value = load<now>(seen + x), gradient = where_positive<now>(value, load<now>(convolved + x));
            if constexpr (now == L) line_sum += gradient, line_product += gradient * value;
            else sum += gradient, product += gradient * value;
            return gradient;
        };
        if constexpr (PACK<V> == SIDE_BY_SIDE) {
            for (int x = 0; x < t.width && images > 1; x += 2) {
                Vec<L> one = passed(x * L, Constant<L>{}), other = passed((x + 1) * L, Constant<L>{});
                separate<L>(one, other);
                write(out + x * V, one), write(out + image + x * V, other);
            }
            if (images > 1) {
                sum += folded_channels<L, SIDE_BY_SIDE, L>(line_sum);
                product += folded_channels<L, SIDE_BY_SIDE, L>(line_product);
                continue;
            }
        }
        over_pixels<V>(t.width, [&](int x, auto lanes) { write(out + x * V, passed(x * V, lanes)); });
        sum += folded<V, L>(line_sum), product += folded<V, L>(line_product);
    }
}

// A pixel's slices -> its channels in shuffled order, out[K * channel + slice], of block `block` of c channels; or back.
// slices: K rows of `step` floats apart. `wide`: K * c channels of the pixel.
template <int V> INLINE void shuffle_pixel(const float* slices, long step, int count, int block, int c, float* wide) {
    float* to = wide + count * block * V;
    if (count == 2 && (block + 1) * V <= c) {
        Vec<V> a = load<V>(slices), b = load<V>(slices + step);
        interleave<V>(a, b);
        store<V>(to, a), store<V>(to + V, b);
    } else if (count == 4 && (block + 1) * V <= c) {
        Vec<V> s[4];
        UNROLL for (int i = 0; i < 4; i++) s[i] = load<V>(slices + i * step);
        interleave<V>(s[0], s[2]), interleave<V>(s[1], s[3]);
        interleave<V>(s[0], s[1]), interleave<V>(s[2], s[3]);
        UNROLL for (int i = 0; i < 4; i++) store<V>(to + i * V, s[i]);
    } else {
        for (int l = 0; l < std::min(V, c - block * V); l++)
            for (int s = 0; s < count; s++) to[count * l + s] = slices[s * step + l];
    }
}
template <int V> INLINE void unshuffle_pixel(const float* wide, int count, int block, int c, float* slices, long step) {
    const float* from = wide + count * block * V;
    if (count == 2 && (block + 1) * V <= c) {
        Vec<V> a = load<V>(from), b = load<V>(from + V);
        separate<V>(a, b);
        store<V>(slices, a), store<V>(slices + step, b);
    } else if (count == 4 && (block + 1) * V <= c) {
        Vec<V> s[4];
        UNROLL for (int i = 0; i < 4; i++) s[i] = load<V>(from + i * V);
        separate<V>(s[0], s[1]), separate<V>(s[2], s[3]);
        separate<V>(s[0], s[2]), separate<V>(s[1], s[3]);
        UNROLL for (int i = 0; i < 4; i++) store<V>(slices + i * step, s[i]);
    } else {
        for (int s = 0; s < count; s++) {
            store<V>(slices + s * step, Vec<V>{});
            for (int l = 0; l < std::min(V, c - block * V); l++) slices[s * step + l] = from[count * l + s];
        }
    }
}

}  // namespace FPDARTS_ISA
