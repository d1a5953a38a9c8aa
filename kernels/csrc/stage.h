// A stage (ReLU, depthwise, pointwise) of one edge and one image, forward and backward, from a tile that holds the ReLU
// of its input.
#pragma once

#include "convolution.h"
#include "maps.h"

namespace FPDARTS_ISA {

constexpr int CHUNK = 64;  // pixels of a matrix product or a node at a time: they stay in the first cache

// Mean and summed squared deviation of one block of a map that is being written. Each run is summed about its first
// value and then merged (Chan et al., 1979): an outlier costs digits of its own run only.
template <int V> struct MapMoments {
    double mean[V], m2[V];
    int count;

    // Of a thread, for as many blocks.
    static MapMoments* take(int blocks) {
        return reinterpret_cast<MapMoments*>(arena().take(blocks * (sizeof(MapMoments) / sizeof(float))));
    }
    INLINE void begin() { std::fill_n(mean, V, 0.0), std::fill_n(m2, V, 0.0), count = 0; }
    INLINE void add(const float* values, int run) {
        constexpr int CHAINS = 4, M = PACK<V>, L = M * V;  // chains of additions, which wait for each other
        const Vec<V> shift = load<V>(values);
        const Spread<V> about(shift);
        Vec<L> s[CHAINS] = {}, q[CHAINS] = {};
        int i = 0;
        for (; i + CHAINS * M <= run; i += CHAINS * M) {
            UNROLL for (int k = 0; k < CHAINS; k++) {
                const Vec<L> v = load<L>(values + (i + k * M) * V) - about.all;
                s[k] += v, q[k] += v * v;
            }
        }
        Vec<V> sum = folded<V, L>((s[0] + s[1]) + (s[2] + s[3])), squares = folded<V, L>((q[0] + q[1]) + (q[2] + q[3]));
        for (; i < run; i++) {
            const Vec<V> v = load<V>(values + i * V) - shift;
            sum += v, squares += v * v;
        }
        const double total = count + run, part = run / total, both = count * part;
        for (int l = 0; l < V; l++) {
            const double own = double(sum[l]) / run, delta = shift[l] + own - mean[l];
            mean[l] += delta * part, m2[l] += squares[l] - own * sum[l] + delta * delta * both;
        }
        count += run;
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

// How many images a stage takes at once: two of one block of 8 channels fill vectors of 16 lanes, and where there are no
// fewer pairs than threads none is idle.
template <int V> int images_together(int images, int threads, int blocks, int stride, int width) {
    const bool fit = PACK<V> == SIDE_BY_SIDE && blocks == 1 && stride == 1;
    const bool even = images % SIDE_BY_SIDE == 0 && width % 2 == 0;
    return fit && even && images >= SIDE_BY_SIDE * threads ? SIDE_BY_SIDE : 1;
}

// Rows that are computed together: what one step writes is still in the first cache when the next one reads it.
inline int rows_together(int width) { return 2 * CHUNK / std::clamp(padded(width), 1, 2 * CHUNK); }
inline int pixels_together(int width) { return rows_together(width) * padded(width); }

// A band of results on its way to where they belong, a part at a time while the next band is computed: stores past the
// caches that come all at once wait for memory, and the multiply-adds behind them wait for the stores.
template <int V> class Leaving {
   public:
    // Runs (of images or blocks) of as many pixels, and in each as many planes, which become channels side by side.
    struct Band {
        const float* from;
        int64_t from_run, from_plane;
        float* to;
        int64_t to_run;
        int runs, planes, pixels;
        bool past;  // the caches
    };
    ~Leaving() { rest(); }
    // parts: in how many calls of `some` it shall be gone.
    void begin(const Band& next, int parts) {
        rest();
        band = next, at = 0;
        part = divide_up(next.pixels * next.runs, parts * PACK<V>) * PACK<V>;
    }
    INLINE void some() {
        if (band.runs) copy(part);
    }

   private:
    Band band{};
    int part = 0, at = 0;

    void rest() {
        while (band.runs) copy(band.pixels);
    }
    INLINE void copy(int most) {
        const int count = std::min(most, band.pixels - at), planes = band.planes;
        float* to = band.to + int64_t(at) * planes * V;
        const float* from = band.from + int64_t(at) * V;
        if (planes == 1 && band.past)
            copy_past<V>(to, from, int64_t(count) * V);
        else if (band.past)
            weave(from, to, count, [](float* p, auto v) INLINE_LAMBDA { store_past<sizeof v / sizeof *p>(p, v); });
        else
            weave(from, to, count, [](float* p, auto v) INLINE_LAMBDA { store<sizeof v / sizeof *p>(p, v); });
        if ((at += count) < band.pixels) return;
        at = 0, band.from += band.from_run, band.to += band.to_run, band.runs--;
    }
    template <class Store> INLINE void weave(const float* from, float* to, int count, Store&& store) {
        const int planes = band.planes;
        for (int i = 0; i < count; i++, from += V) {
            int p = 0;
            if constexpr (PACK<V> == 2) {  // as far as all of them begin where a vector may
                for (; planes % 2 == 0 && p < planes; p += 2, to += 2 * V)
                    store(to, joined<V>(load<V>(from + p * band.from_plane), load<V>(from + (p + 1) * band.from_plane)));
            }
            for (; p < planes; p++, to += V) store(to, load<V>(from + p * band.from_plane));
        }
    }
};

// Of a thread, for forward: room for the depthwise result of rows_together rows, and, where results are written past the
// caches, for two bands of them: that which is computed, and the one before it, which is leaving.
template <int V> struct ForwardBuffers {
    float *seen, *made[2] = {};
    int turn = 0;
    Leaving<V> leaving;

    // planes: of a band of results that goes past the caches; 0 where none does.
    ForwardBuffers(int width, int blocks, int planes) : seen(arena().take(blocks * pixels_together(width) * V)) {
        for (int i = 0; i < 2 && planes; i++) made[i] = arena().take(planes * pixels_together(width) * V);
    }
    float* next() { return made[turn ^= 1]; }
};

// Rows of depthwise outputs that share what they load.
constexpr int rows_at_once(int dilation, int stride) { return stride == 1 ? 2 * dilation : 2; }
// Into how many parts stage_band cuts its work.
inline int parts_of_band(int blocks, int rows, int dilation, int stride) {
    return blocks * divide_up(rows, rows_at_once(dilation, stride)) + rows;
}

// Rows of a result, from row `first` on, to `made`, its blocks `block` apart. between() is called after each part of the
// work. Of N images side by side the result is a block of V / N channels for each.
template <int V, int K, int D, int S, int N, class Between>
void stage_band(const float* tile, const Tile& t, StageWeights w, int blocks, int first, int rows, float* seen,
                float* made, int64_t block, Between&& between) {
    constexpr int C = V / N, R = rows_at_once(D, S);
    const int width = t.width / S, wide = padded(width), lanes = blocks * V;
    const int64_t seen_block = int64_t(pixels_together(width)) * V;
    for (int b = 0; b < blocks; b++)
        for (int y = 0; y < rows; y += R) {
            depthwise_rows<V, K, D, S, false, false>(
                tile + (int64_t(b) * t.pixels() + t.at((first + y) * S, D * (K / 2))) * V, long(t.pitch) * V,
                w.depthwise + b * V * PACK<V>, lanes * PACK<V>, seen + b * seen_block + y * wide * V, wide * V,
                std::min(R, rows - y), width);
            between();
        }
    for (int y = 0; y < rows; y++) {
        float* row = made + y * width * C;
        const auto product = [&](auto&& take) INLINE_LAMBDA {
            pointwise_rows<V, N>(seen + y * wide * V, seen_block, V, blocks, w.pointwise, lanes * V, blocks, width, take);
        };
        if constexpr (N == 1)
            product([=](int x, int o, Vec<V> v) INLINE_LAMBDA { store<V>(row + o * block + x * V, v); });
        else
            product([=](int x, int, Vec<V> a, Vec<V> b) INLINE_LAMBDA {
                separate<V>(a, b);
                store<V>(row + x * C, a), store<V>(row + block + x * C, b);
            });
        between();
    }
}

// A whole result, in blocks. moments: a block each, or null where none are needed.
template <int V, int K, int D, int S, int N = 1>
void stage_forward(const float* tile, const Tile& t, StageWeights w, int blocks, float* out,
                   ForwardBuffers<V / N>& buffer, MapMoments<V / N>* moments) {
    constexpr int C = V / N;
    const int height = t.height / S, width = t.width / S, together = rows_together(width);
    for (int first = 0; first < height; first += together) {
        const int rows = std::min(together, height - first);
        float *here = out + first * width * C, *past = buffer.next(), *made = past ? past : here;
        const int64_t whole = int64_t(height) * width * C, block = past ? rows * width * C : whole;
        stage_band<V, K, D, S, N>(tile, t, w, blocks, first, rows, buffer.seen, made, block,
                                  [&]() INLINE_LAMBDA { buffer.leaving.some(); });
        for (int b = 0; b < N * blocks && moments; b++) {
            if (first == 0) moments[b].begin();
            moments[b].add(made + b * block, rows * width);
        }
        if (past)
            buffer.leaving.begin({made, block, 0, here, whole, N * blocks, 1, rows * width, true},
                                 parts_of_band(blocks, rows, D, S));
    }
}

// f of a vector's lanes and of how many images they hold, as constants; images that are taken together have one block.
template <int V, int S, class F> INLINE void with_images(int images, int blocks, F&& f) {
    if constexpr (PACK<V> == SIDE_BY_SIDE && S == 1) {
        if (images > 1) return f(Constant<SIDE_BY_SIDE * V>{}, Constant<SIDE_BY_SIDE>{}, 1);
    }
    f(Constant<V>{}, Constant<1>{}, blocks);
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
