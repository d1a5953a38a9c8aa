// A cell's backward, the same way back. A node's gradient ds yields one set of sums, Σ ds and Σ ds (raw - mean) for each
// operation that feeds it; from these follow the gradients of normalizations, alpha and beta. The gradient of a raw map,
// a ds + b (raw - mean) + c a channel, is formed where it is read.
#pragma once

#include <deque>

#include "gradients.h"

namespace FPDARTS_ISA {

template <int V> class Backward : public Gradients<V> {
    using Base = Gradients<V>;
    using Base::a, Base::l, Base::threads;
    using Base::columns, Base::gradients, Base::gradient_at, Base::between_sums, Base::node_sums, Base::term_sums;
    using Base::d_node, Base::d_input, Base::d_between, Base::factors, Base::result_factors, Base::between_factors;
    using Base::input_factors, Base::terms_of, Base::reduce, Base::unshuffle;
    using typename Base::Used, typename Base::Terms;

   public:
    using Base::Base;

    void run() {
        reduce_last();
        for (int source = l.nodes; source >= 0; source--) {
            if (source < 2 && !a.d_weights && !a.d_x[source]) continue;
            second_stages(source);
            first_stages(source);
            if (source < 2) preprocess(source);
        }
        if (a.d_weights) this->write_weights();
        if (a.d_alpha) this->write_mixing();
    }

   private:
    void reduce_last() {
        const auto terms = terms_of(l.nodes - 1);
        for_images(l.n, threads, [&] {
            return [&](int image, int share) {
                unshuffle(l.nodes - 1, image, nullptr, nullptr);
                reduce(l.nodes - 1, terms, image, share);
            };
        });
    }

    // --- Stages ---

    struct Stage {  // on one edge
        const Operation* o;
        int edge, between;  // between: index among the source's pairs of stages, -1 for the only stage
        Factors f;
        StageWeights weights;
        int64_t depthwise_at, pointwise_at;  // of the gradients
        int row;
    };
    struct Stages {
        std::vector<Stage> all;
        std::deque<Used> used;  // whose weights they point to
    };
    // The open first (0) or second (1) stages of the edges that leave a source.
    Stages stages_of(int source, int which) const {
        Stages stages;
        int pairs = 0;
        for (int column = 0; column < columns; column++) {
            const Operation& o = l.operations[column];
            if (o.kind != CONVOLUTION || o.stages <= which) continue;
            if (this->is_used(o, source)) stages.used.emplace_back(*this, o, which, source, true);
            for (int row : l.leaving[source]) {
                const int between = o.stages == 2 ? pairs++ : -1, taps = o.kernel * o.kernel;
                const Edge& e = l.edges[row];
                if (!this->is_open(e, o.path)) continue;
                const int statistics = o.row[which] + row, weight = o.weight[which];
                stages.all.push_back({&o, row, between,
                                      o.stages == which + 1 ? result_factors(e, column)
                                                            : between_factors(statistics, l.out_pixels),
                                      stages.used.back().weights(row),
                                      gradient_at[weight] + int64_t(row) * taps * l.lanes,
                                      gradient_at[weight + 1] + int64_t(row) * l.lanes * l.lanes, statistics});
            }
        }
        return stages;
    }

    // One edge, and as many images as are taken together. g: gradient of the normalized result.
    template <int K, int D, int S, bool ADD>
    void stage(const StageBuffers& buffer, const Tile& t, const Tile& d, const Stage& stage, const float* g,
               const float* raw, int images, int share) {
        const int64_t block = int64_t(d.height) * d.width * V;
        float *d_depthwise = gradients.of(share, stage.depthwise_at), *d_pointwise = gradients.of(share, stage.pointwise_at);
        with_images<V, S>(images, l.blocks, [&](auto lanes, auto together, int blocks) {
            stage_backward<lanes, K, D, S, ADD, together>(
                buffer, t, d, stage.weights, blocks, d_depthwise, d_pointwise,
                [&](int b, int first, int count, float* to) INLINE_LAMBDA {
                    const int64_t at = b * block + first * V;
                    if constexpr (together > 1) stage.f.template draw_side_by_side<V>(g + at, raw + at, block, count, to);
                    else stage.f.template draw<V>(b, g + at, raw + at, count, to);
                });
        });
    }

    void second_stages(int source) {
        const Stages stages = stages_of(source, 1);
        const Tile t(l.out_size[0], l.out_size[1], MARGIN, 1);
        const int images = this->together(1);
        for_images(l.n / images, threads, [&] {
            const auto buffer = StageBuffers::take<V>(t, t, images * l.blocks);
            return [&, buffer](int group, int share) {
                for (const Stage& s : stages.all) {
                    const int before = s.o->row[0] + s.edge;
                    const int64_t at = l.image(group * images, l.out_pixels);
                    this->fill(buffer.tile, t, images, a.work + l.raw(before) + at, this->normalization(before));
                    const float *g = d_node(l.edges[s.edge].node, s.o->path) + at, *raw = a.work + l.raw(s.row) + at;
                    specialized(s.o->kernel, s.o->dilation, 1, [&](auto k, auto d, auto) {
                        stage<k, d, 1, false>(buffer, t, t, s, g, raw, images, share);
                    });
                    pass_relu(buffer, t, d_between(s.between) + at, before, images, share);
                }
            };
        });
    }

    // Gradient of the normalized map before a second stage, and its sums: where ReLU let it through.
    void pass_relu(const StageBuffers& buffer, const Tile& t, float* out, int row, int images, int share) {
        for (int b = 0; b < l.blocks; b++) {
            Vec<V> sum{}, product{};
            const int64_t map = int64_t(b) * t.height * t.width * V, wide = int64_t(b) * t.height * padded(t.width) * V;
            pass_tile<V>(images, buffer.tile + int64_t(b) * t.pixels() * V, t, buffer.d_map + wide, out + map,
                         l.past_caches(), sum, product);
            between_sums.template add<V>(share, row, b, sum);
            between_sums.template add<V>(share, l.rows + row, b, product);
        }
    }

    // --- A state's gradient: all that leaves it ---

    // A pooling that is used, with the edges that let it through.
    struct Pool {
        const Operation* o;
        Factors f;
        std::vector<const Edge*> edges;
        std::vector<float> scales;
    };
    std::vector<Pool> pools_of(int source) const {
        std::vector<Pool> pools;
        for (int column = 0; column < columns; column++) {
            const Operation& o = l.operations[column];
            if (!o.pools() || !this->is_used(o, source)) continue;
            pools.push_back({&o, pool_factors(o, column, source), {}, {}});
            for (int row : l.leaving[source]) {
                const Edge& e = l.edges[row];
                if (this->is_open(e, o.path))
                    pools.back().edges.push_back(&e), pools.back().scales.push_back(this->scale_of(e, column));
            }
        }
        return pools;
    }

    // A factorized reduction of an open edge.
    struct Skip {
        const Operation* o;
        const Edge* e;
        Factors f;
        std::vector<float> weights;
    };
    std::vector<Skip> skips_of(int source, const Dense<V>& skip) const {
        std::vector<Skip> skips;
        for (int column = 0; column < columns; column++) {
            const Operation& o = l.operations[column];
            if (!o.factorized(l.stride(source))) continue;
            for (int row : l.leaving[source]) {
                const Edge& e = l.edges[row];
                if (this->is_open(e, o.path))
                    skips.push_back({&o, &e, result_factors(e, column), this->skip_matrix(o, skip, row, true)});
            }
        }
        return skips;
    }

    void first_stages(int source) {
        const int stride = l.stride(source), height = l.size_of(source)[0], width = l.size_of(source)[1];
        const Stages stages = stages_of(source, 0);
        const Tile t(height, width, MARGIN, stride), d(l.out_size[0], l.out_size[1], MARGIN, 1), around(height, width, 1, 1);
        std::vector<Terms> terms;
        if (source >= 2) terms = terms_of(source - 2);
        const Dense<V> skip = this->skip_dense();
        const std::vector<Pool> pools = pools_of(source);
        const std::vector<Skip> skips = skips_of(source, skip);
        const int images = this->together(stride);
        for_images(l.n / images, threads, [&] {
            const auto buffer = StageBuffers::take<V>(t, d, images * l.blocks);
            float* pooled = arena().take(around.pixels() * V);
            float* d_pooled = arena().take(around.pixels() * V);
            float* mixed = arena().take(l.out_pixels * V);
            float* pixels = arena().take(CHUNK * skip.rows);
            float* drawn = arena().take(CHUNK * skip.columns);
            float* pixel = arena().take(l.slices * l.lanes);
            float* sent = source < 2 ? nullptr : arena().take(images * l.slices * l.blocks * l.out_pixels * V);
            return [&, buffer, pooled, d_pooled, mixed, pixels, drawn, pixel, sent](int group, int share) {
                const int image = group * images;  // the first one
                const int64_t at = l.image(image, height * width), out_at = l.image(image, l.out_pixels);
                const int64_t size = l.image(1, height * width), apart = source < 2 ? size : l.slices * size;
                for (int slice = 0; slice < l.slices; slice++) {
                    const float* map = a.work + l.state(source, slice) + at;
                    float* d_map = source < 2 ? d_input(source, slice) + at : sent + slice * size;  // images are `apart`
                    bool convolved = false;
                    const auto begin = [&](bool adds) {
                        if (convolved) return;
                        this->fill(buffer.tile, t, images, map, {});
                        if (adds) std::fill_n(buffer.d_map, images * l.blocks * t.height * padded(t.width) * V, 0.0f);
                        convolved = true;
                    };
                    for (const Stage& s : stages.all) {
                        if (s.o->path != slice) continue;
                        // a first stage may write what the others add to; those compiled for second stages can
                        const bool writes = !convolved && stride == 1 && s.o->dilation == 1;
                        begin(!writes);
                        const float* g = s.between < 0 ? d_node(l.edges[s.edge].node, slice) : d_between(s.between);
                        specialized(s.o->kernel, s.o->dilation, stride, [&](auto k, auto dilation, auto strides) {
                            const auto run = [&](auto add) {
                                stage<k, dilation, strides, add>(buffer, t, d, s, g + out_at,
                                                                 a.work + l.raw(s.row) + out_at, images, share);
                            };
                            if constexpr (dilation == 1 && strides == 1) {
                                if (writes) return run(Constant<false>{});
                            }
                            run(Constant<true>{});
                        });
                    }
                    for (const Skip& s : skips) {
                        if (s.o->path != slice) continue;
                        begin(true);
                        skip_backward(skip, s.f, s.weights.data(), map, d_node(s.e->node, slice) + out_at,
                                      a.work + l.raw(s.o->row[0] + s.e->row) + out_at, height, width, buffer.d_map,
                                      pixels, drawn,
                                      gradients.of(share, gradient_at[s.o->weight[0]] +
                                                               int64_t(s.e->row) * skip.rows * skip.columns));
                    }
                    if (convolved) pass_map<V>(images, buffer.d_map, map, l.blocks * height, width, d_map, apart);
                    for (int i = 0; i < images; i++, map += size, d_map += apart) {
                        const int64_t from = out_at + l.image(i, l.out_pixels);
                        if (!convolved) std::fill_n(d_map, size, 0.0f);
                        for (const Pool& p : pools)
                            if (p.o->path == slice)
                                pool_backward(*p.o, p.f, p.edges, p.scales, source, slice, map, around, from, d_map, pooled,
                                              d_pooled, mixed);
                        pass_backward(source, slice, map, from, d_map, mixed);
                        if (source < 2) sum_input(source, slice, image + i, share);
                    }
                }
                for (int i = 0; i < images && source >= 2; i++) {
                    unshuffle(source - 2, image + i, sent + i * apart, pixel);
                    reduce(source - 2, terms, image + i, share);
                }
            };
        });
    }

    // All edges share a pooling's normalization: its gradient is the sum of theirs.
    Factors pool_factors(const Operation& o, int column, int source) const {
        const int row = o.row[0] + source;
        std::vector<double> sum(l.lanes), product(l.lanes);
        for (int edge : l.leaving[source]) {
            const Edge& e = l.edges[edge];
            if (!this->is_open(e, o.path)) continue;
            for (int i = 0; i < l.lanes; i++) {
                sum[i] += this->scale_of(e, column) * node_sums.of(e.node * l.slices + o.path, i);
                product[i] += this->scale_of(e, column) * term_sums.of(edge * columns + column, i);
            }
        }
        return factors(row, 1, l.out_pixels, [&](int i) { return sum[i]; },
                       [&](int i) { return product[i] * a.work[l.inverse(row) + i]; });
    }

    // Σ over edges of scale * their nodes' gradient, of one block.
    void mix(const std::vector<const Edge*>& edges, const std::vector<float>& scales, int slice, int64_t at,
             float* out) const {
        for (size_t k = 0; k < edges.size(); k++) {
            const float* d = d_node(edges[k]->node, slice) + at;
            over_pixels<V>(l.out_pixels, [=, scale = scales[k]](int i, auto lanes) {
                constexpr int L = lanes;
                const Vec<L> drawn = scale * load<L>(d + i * V);
                store<L>(out + i * V, k == 0 ? drawn : load<L>(out + i * V) + drawn);
            });
        }
    }

    void pool_backward(const Operation& o, const Factors& f, const std::vector<const Edge*>& edges,
                       const std::vector<float>& scales, int source, int slice, const float* map, const Tile& t,
                       int64_t out_at, float* d_map, float* tile, float* d_tile, float* mixed) {
        const int stride = l.stride(source), size = t.height * t.width;
        const bool max = o.kind == MAXIMUM;
        std::fill_n(tile, t.pixels() * V, -INFINITY);
        for (int b = 0; b < l.blocks; b++) {
            const int64_t at = out_at + int64_t(b) * l.out_pixels * V;
            const float* raw = a.work + l.raw(o.row[0] + source) + at;
            mix(edges, scales, slice, at, mixed);
            f.template draw<V>(b, mixed, raw, l.out_pixels, mixed);
            std::fill_n(d_tile, t.pixels() * V, 0.0f);
            if (max) {
                copy_into<V>(tile, t, map + int64_t(b) * size * V);
                pool_map_backward<V, true>(tile, raw, t, stride, d_tile, mixed);
            } else {
                pool_map_backward<V, false>(tile, raw, t, stride, d_tile, mixed);
            }
            for (int y = 0; y < t.height; y++)
                for (int x = 0; x < t.width; x++, d_map += V) add_to<V>(d_map, load<V>(d_tile + (t.at(y, 0) + x) * V));
        }
    }

    void pass_backward(int source, int slice, const float* map, int64_t out_at, float* d_map, float* mixed) {
        std::vector<const Edge*> edges;
        std::vector<float> scales;
        for (int row : l.leaving[source])
            if (this->passes(l.edges[row], slice)) {
                edges.push_back(&l.edges[row]), scales.push_back(this->through[row * l.slices + slice]);
            }
        if (edges.empty()) return;
        const int size = l.pixels_of(source);
        for (int b = 0; b < l.blocks; b++) {
            const int64_t at = out_at + int64_t(b) * l.out_pixels * V;
            mix(edges, scales, slice, at, mixed);
            float* to = d_map + int64_t(b) * size * V;
            if (l.stride(source) == 1) {
                over_pixels<V>(size, [=](int i, auto lanes) {
                    constexpr int L = lanes;
                    add_to<L>(to + i * V, load<L>(mixed + i * V));
                });
            } else {
                halve_map_backward<V>(map + int64_t(b) * size * V, a.work + l.bypass(source, slice) + at, l.size[0],
                                      l.size[1], to, mixed);
            }
        }
    }

    // --- Matrix products ---

    void skip_backward(const Dense<V>& d, const Factors& f, const float* weights, const float* map, const float* g,
                       const float* raw, int height, int width, float* d_map, float* pixels, float* drawn, float* own) {
        for (int first = 0; first < l.out_pixels; first += CHUNK) {
            const int count = std::min(CHUNK, l.out_pixels - first);
            for (int b = 0; b < l.blocks; b++) {
                const int64_t at = (int64_t(b) * l.out_pixels + first) * V;
                f.template draw_rows<V>(b, g + at, raw + at, count, drawn + b * V, d.columns);
            }
            if (own) {
                d.gather_map(map, {}, height, width, first, count, pixels);
                d.matrix_gradient(pixels, drawn, count, own);
            }
            d.map_gradient(weights, drawn, height, width, first, count, d_map);
        }
    }

    // Sums of an input state's gradient, for its normalization.
    void sum_input(int source, int slice, int image, int share) {
        const int row = source * l.slices + slice;
        for (int b = 0; b < l.blocks; b++) {
            const int64_t at = l.image(image, l.pixels) + int64_t(b) * l.pixels * V;
            const float *d = d_input(source, slice) + at, *state = a.work + l.state(source, slice) + at;
            Vec<V> sum{}, product{};
            for (int first = 0; first < l.pixels; first += CHUNK) {
                Vec<V> s{}, p{};
                for (int i = first; i < std::min(l.pixels, first + CHUNK); i++) {
                    const Vec<V> gradient = load<V>(d + i * V);
                    s += gradient, p += gradient * load<V>(state + i * V);
                }
                sum += s, product += p;
            }
            between_sums.template add<V>(share, row, b, sum);
            between_sums.template add<V>(share, l.rows + row, b, product);
        }
    }

    void preprocess(int input) {
        const Dense<V> d = this->preprocess_dense(input);
        const auto w = this->preprocess_matrix(input, d, true);
        std::vector<Factors> factors;
        for (int s = 0; s < l.slices; s++) factors.push_back(input_factors(input * l.slices + s));
        for_images(l.n, threads, [&] {
            float* pixels = arena().take(CHUNK * d.rows);
            float* drawn = arena().take(CHUNK * d.columns);
            return [&, pixels, drawn](int image, int share) {
                const float* from = a.x[input] + this->input_at(d, image);
                float* d_x = a.d_x[input] ? a.d_x[input] + this->input_at(d, image) : nullptr;
                for (int first = 0; first < l.pixels; first += CHUNK) {
                    const int count = std::min(CHUNK, l.pixels - first);
                    for (int s = 0; s < l.slices; s++)
                        for (int b = 0; b < l.blocks; b++) {
                            const int64_t at = l.image(image, l.pixels) + (int64_t(b) * l.pixels + first) * V;
                            factors[s].template draw_rows<V>(b, d_input(input, s) + at, a.work + l.state(input, s) + at,
                                                             count, drawn + (s * l.blocks + b) * V, d.columns);
                        }
                    d.gather_pixels(from, l.size[1], first, count, pixels);
                    if (float* own = gradients.of(share, gradient_at[l.preprocess_weight[input]]))
                        d.matrix_gradient(pixels, drawn, count, own);
                    if (d_x) d.image_gradient(w.data(), drawn, pixels, l.size[1], first, count, d_x, l.past_caches());
                }
            };
        });
    }
};

}  // namespace FPDARTS_ISA
