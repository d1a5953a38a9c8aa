// A stage (ReLU, depthwise, pointwise) of one edge and one image, forward and backward, from a tile that holds the ReLU
// of its input.
#pragma once

#include "convolution.h"
#include "maps.h"

namespace FPDARTS_ISA {

constexpr int CHUNK = 64;  // pixels of a matrix product or a node at a time: they stay in the first cache

// The sums of one block of a map that is being written: about its first value, by runs, so that few digits are lost.
template <int V> struct MapSums {
    Vec<V> shift{}, sum{}, squares{};
    INLINE void begin(Vec<V> first) { shift = first, sum = squares = Vec<V>{}; }
    INLINE void add(const float* values, int count) {
        constexpr int CHAINS = 4, M = PACK<V>, L = M * V;  // chains of additions, which wait for each other
        const Spread<V> about(shift);
        Vec<L> s[CHAINS] = {}, q[CHAINS] = {};
        int i = 0;
        for (; i + CHAINS * M <= count; i += CHAINS * M) {
            UNROLL for (int k = 0; k < CHAINS; k++) {
                const Vec<L> v = load<L>(values + (i + k * M) * V) - about.all;
                s[k] += v, q[k] += v * v;
            }
        }
        sum += folded<V, L>((s[0] + s[1]) + (s[2] + s[3])), squares += folded<V, L>((q[0] + q[1]) + (q[2] + q[3]));
        for (; i < count; i++) {
            const Vec<V> v = load<V>(values + i * V) - shift;
            sum += v, squares += v * v;
        }
    }
};

// Weights of a stage: depthwise [tap][block][copy][V], pointwise as pointwise_rows reads it (in backward its transpose).
struct StageWeights {
    const float *depthwise, *pointwise;
};

// f with kernel size, dilation and stride as constants.
template <class F> void specialized(int kernel, int dilation, int stride, F&& f) {
    const auto chosen = [&](auto k, auto d) {
        if (stride == 2) f(k, d, Constant<2>{});
        else f(k, d, Constant<1>{});
    };
    if (kernel == 3 && dilation == 1) chosen(Constant<3>{}, Constant<1>{});
    else if (kernel == 3) chosen(Constant<3>{}, Constant<2>{});
    else if (dilation == 1) chosen(Constant<5>{}, Constant<1>{});
    else chosen(Constant<5>{}, Constant<2>{});
}

// Floats from pixel to pixel, row to row and block to block of a result.
struct Steps {
    long pixel, row, block;
    template <int V> static Steps in_blocks(int height, int width) { return {V, width * V, long(height) * width * V}; }
};

// How many images a stage takes at once: two of one block of 8 channels fill vectors of 16 lanes, and where there are no
// fewer pairs than threads none is idle.
template <int V> int images_together(int images, int threads, int blocks, int stride, int width) {
    const bool fit = PACK<V> == SIDE_BY_SIDE && blocks == 1 && stride == 1;
    const bool even = images % SIDE_BY_SIDE == 0 && width % 2 == 0;
    return fit && even && images >= SIDE_BY_SIDE * threads ? SIDE_BY_SIDE : 1;
}

// Rows that are computed together: what one step writes is still in the first cache when the next one reads it.
inline int rows_together(int width) { return std::max(1, 2 * CHUNK / padded(width)); }
inline int pixels_together(int width) { return rows_together(width) * padded(width); }

// Scratch memory of a thread for forward: of rows_together rows, the depthwise result and, where results are written
// past the caches, the pointwise one.
struct ForwardBuffers {
    float *seen, *made = nullptr;

    template <int V> static ForwardBuffers take(int width, int blocks, bool past) {
        ForwardBuffers buffer;
        buffer.seen = arena().take(blocks * pixels_together(width) * V);
        if (past) buffer.made = arena().take(blocks * pixels_together(width) * V);
        return buffer;
    }
};

// sums: a block each, of a result in blocks, or null where none are needed. A result past the caches is in blocks. Of N
// images side by side the result is a block of V / N channels for each.
template <int V, int K, int D, int S, int N = 1>
void stage_forward(const float* tile, const Tile& t, StageWeights w, int blocks, float* out, const Steps& steps,
                   const ForwardBuffers& buffer, MapSums<V / N>* sums) {
    constexpr int C = V / N;
    const int height = t.height / S, width = t.width / S, wide = padded(width), lanes = blocks * V;
    const int64_t seen_block = int64_t(pixels_together(width)) * V;
    for (int first = 0; first < height; first += rows_together(width)) {
        const int rows = std::min(rows_together(width), height - first);
        for (int b = 0; b < blocks; b++)
            depthwise_rows<V, K, D, S, false, false>(
                tile + (int64_t(b) * t.pixels() + t.at(first * S, D * (K / 2))) * V, long(t.pitch) * V,
                w.depthwise + b * V * PACK<V>, lanes * PACK<V>, buffer.seen + b * seen_block, wide * V, rows, width);
        const Steps own = buffer.made ? Steps::in_blocks<C>(rows, width) : steps;
        float* made = buffer.made ? buffer.made : out + first * steps.row;
        for (int y = 0; y < rows; y++) {
            float* row = made + y * own.row;
            const auto product = [&](auto&& take) INLINE_LAMBDA {
                pointwise_rows<V, N>(buffer.seen + y * wide * V, seen_block, V, blocks, w.pointwise, lanes * V, blocks,
                                     width, take);
            };
            if constexpr (N == 1)
                product([=](int x, int o, Vec<V> v) INLINE_LAMBDA { store<V>(row + o * own.block + x * own.pixel, v); });
            else if (own.pixel == C)
                product([=](int x, int, Vec<V> a, Vec<V> b) INLINE_LAMBDA {
                    separate<V>(a, b);
                    store<V>(row + x * C, a), store<V>(row + own.block + x * C, b);
                });
            else
                product([=](int x, int, Vec<V> v) INLINE_LAMBDA {
                    Vec<V> other = v;
                    separate<V>(v, other);
                    store<C>(row + x * own.pixel, lanes_of<C, 0, V>(v));
                    store<C>(row + own.block + x * own.pixel, lanes_of<C, 0, V>(other));
                });
        }
        for (int b = 0; b < N * blocks && sums; b++) {
            if (first == 0) sums[b].begin(load<C>(made + b * own.block));
            sums[b].add(made + b * own.block, rows * width);
        }
        for (int b = 0; b < N * blocks && buffer.made; b++)
            copy_past<C>(out + first * steps.row + b * steps.block, buffer.made + b * own.block, own.block);
    }
}

// The same of as many images as are taken together: those side by side have one block.
template <int V, int K, int D, int S>
void stages_forward(int images, const float* tile, const Tile& t, StageWeights w, int blocks, float* out,
                    const Steps& steps, const ForwardBuffers& buffer, MapSums<V>* sums) {
    if constexpr (PACK<V> == SIDE_BY_SIDE && S == 1) {
        if (images > 1)
            return stage_forward<SIDE_BY_SIDE * V, K, D, S, SIDE_BY_SIDE>(tile, t, w, 1, out, steps, buffer, sums);
    }
    stage_forward<V, K, D, S>(tile, t, w, blocks, out, steps, buffer, sums);
}

// Scratch memory of a thread for backward. d_tile: gradient of the depthwise result, with a margin of zeros.
// d_map: gradient of the tile, rows of padded(width). The others are for rows_together rows of the result.
struct StageBuffers {
    float *tile, *d_tile, *d_map, *line, *seen, *drawn;

    template <int V> static StageBuffers take(const Tile& t, const Tile& d, int blocks) {
        const int together = pixels_together(d.width);
        StageBuffers buffer;
        buffer.tile = arena().take(blocks * t.pixels() * V);
        buffer.d_tile = arena().take(blocks * d.pixels() * V);
        buffer.d_map = arena().take(blocks * t.height * padded(t.width) * V);
        buffer.line = arena().take(padded(d.width) * V);
        buffer.seen = arena().take(blocks * together * V);
        buffer.drawn = arena().take(blocks * together * V);
        return buffer;
    }
};

template <int V, int K, int D, int PY, int PX>
INLINE void stage_parity(const float* d, long d_pitch, const float* w, int lanes, float* d_map, int y, int width,
                         float* line) {
    if (!depthwise_parity_row<V, K, D, PY, PX>(d, d_pitch, w, lanes * PACK<V>, line, width)) return;
    float* to = d_map + (int64_t(2 * y + PY) * padded(2 * width) + PX) * V;
    for (int x = 0; x < width; x++) add_to<V>(to + 2 * x * V, load<V>(line + x * V));
}

// buffer.d_map (+)= gradient of the tile. draw(block, first pixel, count, to): gradient of the result. d_depthwise
// [tap][lanes] and d_pointwise [input lane][output lane] are added to, or null where they are not needed; of N images side
// by side, by channel.
template <int V, int K, int D, int S, bool ADD, int N = 1, class Draw>
void stage_backward(const StageBuffers& buffer, const Tile& t, const Tile& d, StageWeights w, int blocks,
                    float* d_depthwise, float* d_pointwise, Draw&& draw) {
    constexpr int P = D * (K / 2);
    const int height = d.height, width = d.width, wide = padded(width), lanes = blocks * V;
    const int together = rows_together(width);
    const int64_t block = int64_t(together) * wide * V;
    const long pitch = long(t.pitch) * V, d_pitch = long(d.pitch) * V, map_pitch = long(padded(t.width)) * V;
    const bool needed = d_depthwise != nullptr;
    int done = 0;
    for (int first = 0; first < height; first += together) {
        const int rows = std::min(together, height - first);
        for (int b = 0; b < blocks; b++) {
            float *drawn = buffer.drawn + b * block, *seen = buffer.seen + b * block;
            if (width == wide) draw(b, first * width, rows * width, drawn);
            for (int r = 0; r < rows && width != wide; r++) draw(b, (first + r) * width, width, drawn + r * wide * V);
            if (needed)
                depthwise_rows<V, K, D, S, false, false>(
                    buffer.tile + (int64_t(b) * t.pixels() + t.at(first * S, P)) * V, pitch,
                    w.depthwise + b * V * PACK<V>, lanes * PACK<V>, seen, wide * V, rows, width);
        }
        for (int r = 0; r < rows; r++) {
            float* to = buffer.d_tile + d.at(first + r, 0) * V;
            const int64_t d_block = int64_t(d.pixels()) * V;
            pointwise_rows<V, N>(buffer.drawn + r * wide * V, block, V, blocks, w.pointwise, lanes * V, blocks, width,
                                 [=](int x, int o, Vec<V> v) INLINE_LAMBDA { store<V>(to + o * d_block + x * V, v); });
        }
        if (needed)
            outer<V, N>(buffer.seen, block, V, blocks, buffer.drawn, block, V, blocks, rows * wide, d_pointwise, lanes / N);
        const int ready = S == 2 ? 0 : first + rows == height ? height : std::max(done, first + rows - P);
        for (int b = 0; b < blocks; b++) {
            const float* d_tile = buffer.d_tile + int64_t(b) * d.pixels() * V;
            if (needed)
                depthwise_weight<V, K, D, S, N>(buffer.tile + (int64_t(b) * t.pixels() + t.at(first * S, P)) * V, pitch,
                                                d_tile + d.at(first, 0) * V, d_pitch, rows, width,
                                                d_depthwise + b * V / N, lanes / N);
            if (done < ready)
                depthwise_rows<V, K, D, 1, true, ADD>(d_tile + d.at(done, P) * V, d_pitch, w.depthwise + b * V * PACK<V>,
                                                      lanes * PACK<V>, buffer.d_map + (b * t.height + done) * map_pitch,
                                                      map_pitch, ready - done, width);
        }
        done = ready;
    }
    if constexpr (S == 2) {
        for (int b = 0; b < blocks; b++) {
            float* d_map = buffer.d_map + b * t.height * map_pitch;
            const float* own = w.depthwise + b * V * PACK<V>;
            for (int y = 0; y < height; y++) {
                const float* from = buffer.d_tile + (int64_t(b) * d.pixels() + d.at(y, 0)) * V;
                stage_parity<V, K, D, 0, 0>(from, d_pitch, own, lanes, d_map, y, width, buffer.line);
                stage_parity<V, K, D, 0, 1>(from, d_pitch, own, lanes, d_map, y, width, buffer.line);
                stage_parity<V, K, D, 1, 0>(from, d_pitch, own, lanes, d_map, y, width, buffer.line);
                stage_parity<V, K, D, 1, 1>(from, d_pitch, own, lanes, d_map, y, width, buffer.line);
            }
        }
    }
}

}  // namespace FPDARTS_ISA
