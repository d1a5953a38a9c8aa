// The parts of a cell as functions of their own, with the cell's kernels: to be tested and timed alone. Maps are
// (N, H, W, C) in memory; a slice of them is brought into blocks first, which a cell's own planes are already.
#pragma once

#include "engine.h"

namespace FPDARTS_ISA {

constexpr int BAND = 4096;         // floats of a part's band of results

template <int V> class Parts {
    const PartArguments& a;
    int n, c, edges, stride, size[2], out_size[2], pixels, out_pixels, blocks, lanes, together, threads;

   public:
    explicit Parts(const PartArguments& arguments)
        : a(arguments), n(a.images), c(a.channels), edges(a.edges), stride(a.stride), blocks(divide_up(c, V)),
          lanes(blocks * V), threads(std::clamp<int64_t>(a.threads, 1, std::max(1, n))) {
        size[0] = a.height, size[1] = a.width;
        for (int i = 0; i < 2; i++) out_size[i] = divide_up(size[i], stride);
        pixels = size[0] * size[1], out_pixels = out_size[0] * out_size[1];
        // of fewer than V channels results are written in another way
        together = c == V ? images_together<V>(n, threads, blocks, stride, size[1]) : 1;
    }

    void stage() {
        const auto weights = stage_weights(false);
        // an odd size at stride 2 is computed as the even one above it: the padding is zero anyway
        const Tile t = stage_tile(), d = out_tile();
        const int wide = edges * c, inputs = a.own ? edges : 1, planes = edges * blocks;
        // of so few rows that two bands stay in the first cache
        const int tall = std::min(rows_together(d.width), std::max(2, BAND / std::max(1, together * d.width * wide)));
        const int each_plane = tall * d.width * V;
        const int64_t each = int64_t(out_pixels) * wide, each_tile = int64_t(together) * blocks * t.pixels() * V;
        const bool whole = c % V == 0;  // else the lanes behind c would overwrite the next edge's
        for_images(n / together, threads, [&] {
            float* tiles = arena().take(inputs * each_tile);
            ForwardBuffers<V> buffer(d.width, together * blocks, together * planes);
            return [&, tiles, buffer](int group, int) mutable {
                const int image = group * together;  // the first one
                for (int i = 0; i < inputs; i++) fill(tiles + i * each_tile, t, image, i);
                for (int first = 0; first < d.height; first += tall) {
                    const int rows = std::min(tall, d.height - first), pixels = rows * d.width;
                    float *made = buffer.next(), *to = a.out + image * each + int64_t(first) * d.width * wide;
                    for (int e = 0; e < edges; e++)
                        specialized(a.kernel, a.dilation, stride, [&](auto k, auto dilation, auto s) {
                            with_images<V, s>(together, blocks, [&](auto lanes, auto images, int count) {
                                const int64_t block = images == 1 ? each_plane : int64_t(planes) * each_plane;
                                stage_band<lanes, k, dilation, s, images>(
                                    tiles + e % inputs * each_tile, t, weights.of(e), count, first, rows, buffer.seen,
                                    made + int64_t(e) * blocks * each_plane, block,
                                    [&]() INLINE_LAMBDA { buffer.leaving.some(); });
                            });
                        });
                    if (whole)
                        buffer.leaving.begin({made, int64_t(planes) * each_plane, each_plane, to, each, together, planes,
                                              pixels, n * each >= KEPT},
                                             edges * parts_of_band(blocks, rows, a.dilation, stride));
                    else
                        for (int e = 0; e < edges; e++)
                            scatter(to + e * c, wide, pixels, made + int64_t(e) * blocks * each_plane, each_plane);
                }
            };
        });
    }

    void stage_gradient() {
        const auto weights = stage_weights(true);
        const Tile t = stage_tile(), d = out_tile();
        const int64_t each_out = int64_t(out_pixels) * edges * c;
        const int64_t each = int64_t(a.kernel * a.kernel + lanes) * lanes, taps = int64_t(a.kernel) * a.kernel * lanes;
        WeightSums gradients(threads, a.d_depthwise ? edges * each : 0);
        for_images(n / together, threads, [&] {
            const auto buffer = StageBuffers::take<V>(t, d, together * blocks);
            const int map = together * blocks * t.height * padded(t.width) * V;
            return [&, buffer, map](int group, int share) {
                const int image = group * together;  // the first one
                for (int e = 0; e < edges; e++) {
                    const bool fresh = e == 0 || a.own;
                    if (fresh) fill(buffer.tile, t, image, e), std::fill_n(buffer.d_map, map, 0.0f);
                    const float* d_out = a.d_out + image * each_out + e * c;
                    float* own = gradients.of(share, e * each);
                    float* d_pointwise = own ? own + taps : nullptr;
                    specialized(a.kernel, a.dilation, stride, [&](auto k, auto dilation, auto s) {
                        with_images<V, s>(together, blocks, [&](auto lanes, auto images, int count) {
                            stage_backward<lanes, k, dilation, s, true, images>(
                                buffer, t, d, weights.of(e), count, own, d_pointwise,
                                [&](int b, int first, int pixels, float* to) INLINE_LAMBDA {
                                    const float* from = d_out + int64_t(first) * edges * c + b * V;
                                    for (int i = 0; i < pixels; i++, from += edges * c)
                                        if constexpr (images > 1)
                                            store_side_by_side<V>(to + i * lanes, load<V>(from), load<V>(from + each_out));
                                        else
                                            store<V>(to + i * V, load_some<V>(from, c - b * V));
                                });
                        });
                    });
                    if (a.d_x && (a.own || e == edges - 1)) write_input_gradient(buffer, t, image, e);
                }
            };
        });
        if (!a.d_depthwise) return;
        gradients.gather();
        for (int e = 0; e < edges; e++) {
            const int rows = a.kernel * a.kernel;
            for (int i = 0; i < rows + c; i++)
                for (int k = 0; k < c; k++)
                    (i < rows ? a.d_depthwise[(int64_t(e) * rows + i) * c + k]
                              : a.d_pointwise[(int64_t(e) * c + i - rows) * c + k]) = gradients[e * each + i * lanes + k];
        }
    }

    void pooling() {
        const Tile t(size[0], size[1], 1, 1);
        for_images(n, threads, [&] {
            float *tile = arena().take(t.pixels() * V), *map = arena().take(blocks * pixels * V);
            float* out = arena().take(blocks * out_pixels * V);
            return [&, tile, map, out](int image, int) {
                gather(a.x + int64_t(image) * pixels * a.step, a.step, pixels, map);
                for (int b = 0; b < blocks; b++) pool(tile, t, map, b, out);
                scatter(a.out + int64_t(image) * out_pixels * c, c, out_pixels, out, out_pixels * V);
            };
        });
    }

    void pooling_gradient() {
        const Tile t(size[0], size[1], 1, 1);
        for_images(n, threads, [&] {
            float *tile = arena().take(t.pixels() * V), *d_tile = arena().take(t.pixels() * V);
            float *map = arena().take(blocks * pixels * V), *d_out = arena().take(blocks * out_pixels * V);
            float* out = arena().take(blocks * out_pixels * V);
            return [&, tile, d_tile, map, d_out, out](int image, int) {
                gather(a.x + int64_t(image) * pixels * a.step, a.step, pixels, map);
                gather(a.d_out + int64_t(image) * out_pixels * c, c, out_pixels, d_out);
                for (int b = 0; b < blocks; b++) {
                    pool(tile, t, map, b, out);
                    std::fill_n(d_tile, t.pixels() * V, 0.0f);
                    const float *value = out + b * out_pixels * V, *d = d_out + b * out_pixels * V;
                    if (a.kind == MAXIMUM) pool_map_backward<V, true>(tile, value, t, stride, d_tile, d);
                    else pool_map_backward<V, false>(tile, value, t, stride, d_tile, d);
                    for (int y = 0; y < t.height; y++)
                        std::copy_n(d_tile + t.at(y, 0) * V, t.width * V, map + (b * pixels + y * t.width) * V);
                }
                scatter(a.d_x + int64_t(image) * pixels * c, c, pixels, map, pixels * V);
            };
        });
    }

    // a.terms: a map of c channels each; a.slices: the slice that each is added to.
    void node() {
        const int slices = a.partial, wide = slices * c;
        for_images(n, threads, [&] {
            float* parts = arena().take(slices * V);
            return [&, parts](int image, int) {
                for (int64_t i = int64_t(image) * pixels; i < int64_t(image + 1) * pixels; i++)
                    for (int b = 0; b < blocks; b++) {
                        for (int s = 0; s < slices; s++) store<V>(parts + s * V, Vec<V>{});
                        for (int t = 0; t < a.count; t++)
                            add_to<V>(parts + a.slices[t] * V,
                                      a.coefficients[t] * load_some<V>(a.terms[t] + i * c + b * V, c - b * V));
                        shuffle_pixel<V>(parts, V, slices, b, c, a.out + i * wide);
                    }
            };
        });
    }

    void node_gradient() {
        const int slices = a.partial, wide = slices * c;
        std::vector<std::vector<double>> sums(Shares::count(threads), std::vector<double>(a.count));
        for_images(n, threads, [&] {
            float* parts = arena().take(slices * V);
            return [&, parts](int image, int share) {
                for (int64_t i = int64_t(image) * pixels; i < int64_t(image + 1) * pixels; i++)
                    for (int b = 0; b < blocks; b++) {
                        unshuffle_pixel<V>(a.d_out + i * wide, slices, b, c, parts, V);
                        for (int t = 0; t < a.count; t++) {
                            const int64_t at = i * c + b * V;
                            const Vec<V> d = load<V>(parts + a.slices[t] * V);
                            store_some<V>(a.d_terms[t] + at, a.coefficients[t] * d, c - b * V);
                            const Vec<V> product = d * load_some<V>(a.terms[t] + at, c - b * V);
                            for (int k = 0; k < V; k++) sums[share][t] += product[k];
                        }
                    }
            };
        });
        for (int t = 0; t < a.count; t++) {
            double total = 0;
            for (const auto& own : sums) total += own[t];
            a.d_coefficients[t] = total;
        }
    }

   private:
    struct Weights {
        std::vector<float> depthwise, pointwise;
        size_t each_depthwise, each_pointwise;
        StageWeights of(int e) const { return {&depthwise[each_depthwise * e], &pointwise[each_pointwise * e]}; }
    };
    Weights stage_weights(bool transposed) const {
        Weights w;
        const int taps = a.kernel * a.kernel;
        w.depthwise = PackedWeights<V>::depthwise(a.depthwise, edges, taps, c, lanes, false, together > 1);
        w.each_depthwise = w.depthwise.size() / edges, w.each_pointwise = together * PackedWeights<V>::matrix_size(c, c);
        w.pointwise.resize(w.each_pointwise * edges);
        for (int e = 0; e < edges; e++)
            PackedWeights<V>::product(a.pointwise + int64_t(e) * c * c, c, transposed, together,
                                      &w.pointwise[w.each_pointwise * e]);
        return w;
    }
    Tile stage_tile() const { return Tile(out_size[0] * stride, out_size[1] * stride, MARGIN, stride); }
    Tile out_tile() const { return Tile(out_size[0], out_size[1], MARGIN, 1); }

    void fill(float* tile, const Tile& t, int image, int e) const {
        const int wide = a.step, offset = a.own ? e * c : 0;
        if (together > 1) {
            const int64_t apart = int64_t(pixels) * wide;
            for (int y = 0; y < size[0]; y++) {
                const float* from = a.x + (int64_t(image) * pixels + y * size[1]) * wide + offset;
                float* to = tile + t.at(y, 0) * SIDE_BY_SIDE * V;
                for (int x = 0; x < size[1]; x++, from += wide, to += SIDE_BY_SIDE * V)
                    store_side_by_side<V>(to, relu<V>(load<V>(from)), relu<V>(load<V>(from + apart)));
            }
            return;
        }
        for (int b = 0; b < blocks; b++)
            for (int y = 0; y < size[0]; y++) {
                const float* from = a.x + (int64_t(image) * pixels + y * size[1]) * wide + offset + b * V;
                float* to = tile + (int64_t(b) * t.pixels() + t.at(y, 0)) * V;
                for (int x = 0; x < size[1]; x++)
                    store<V>(to + x * V, relu<V>(load_some<V>(from + int64_t(x) * wide, c - b * V)));
            }
    }
    void write_input_gradient(const StageBuffers& buffer, const Tile& t, int image, int e) const {
        const int wide = a.own ? edges * c : c, offset = a.own ? e * c : 0;
        if constexpr (PACK<V> == SIDE_BY_SIDE) {
            constexpr int L = SIDE_BY_SIDE * V;
            const int64_t apart = int64_t(pixels) * wide;
            for (int y = 0; y < size[0] && together > 1; y++) {
                float* to = a.d_x + (int64_t(image) * pixels + y * size[1]) * wide + offset;
                const float *seen = buffer.tile + t.at(y, 0) * L, *d = buffer.d_map + int64_t(y) * padded(t.width) * L;
                for (int x = 0; x < size[1]; x++, to += wide) {
                    Vec<L> one = where_positive<L>(load<L>(seen + x * L), load<L>(d + x * L)), other = one;
                    separate<L>(one, other);
                    store<V>(to, lanes_of<V, 0, L>(one)), store<V>(to + apart, lanes_of<V, 0, L>(other));
                }
            }
            if (together > 1) return;
        }
        for (int b = 0; b < blocks; b++)
            for (int y = 0; y < size[0]; y++) {
                float* to = a.d_x + (int64_t(image) * pixels + y * size[1]) * wide + offset + b * V;
                const float* seen = buffer.tile + (int64_t(b) * t.pixels() + t.at(y, 0)) * V;
                const float* d = buffer.d_map + (int64_t(b) * t.height + y) * padded(t.width) * V;
                for (int x = 0; x < size[1]; x++)
                    store_some<V>(to + int64_t(x) * wide, where_positive<V>(load<V>(seen + x * V), load<V>(d + x * V)),
                                  c - b * V);
            }
    }

    void pool(float* tile, const Tile& t, const float* map, int b, float* out) const {
        std::fill_n(tile, t.pixels() * V, a.kind == MAXIMUM ? -INFINITY : 0.0f);
        copy_into<V>(tile, t, map + int64_t(b) * pixels * V);
        if (a.kind == MAXIMUM) pool_map<V, true>(tile, t, stride, out + b * out_pixels * V);
        else pool_map<V, false>(tile, t, stride, out + b * out_pixels * V);
    }

    // c channels of pixels that are `wide` apart, into blocks, and back from blocks that are `block` apart.
    void gather(const float* from, int wide, int map, float* to) const {
        for (int i = 0; i < map; i++, from += wide)
            for (int b = 0; b < blocks; b++) store<V>(to + (int64_t(b) * map + i) * V, load_some<V>(from + b * V, c - b * V));
    }
    void scatter(float* to, int wide, int map, const float* from, int64_t block) const {
        for (int i = 0; i < map; i++, to += wide)
            for (int b = 0; b < blocks; b++) store_some<V>(to + b * V, load<V>(from + b * block + i * V), c - b * V);
    }
};

}  // namespace FPDARTS_ISA
