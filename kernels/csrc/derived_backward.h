// Backward of a derived cell, the same way back. A state's gradient yields the sums, Σ g and Σ g (raw - mean), of the
// normalizations that feed it; from these follow theirs, formed where they are read. What no output depends on is left.
#pragma once

#include "derived.h"

namespace FPDARTS_ISA {

template <int V> class DerivedBackward : public Derived<V> {
    using Base = Derived<V>;
    using Base::a, Base::l, Base::training, Base::threads;
    using typename Base::Packed;

   public:
    explicit DerivedBackward(const CellArguments& arguments)
        : Base(arguments), sums(threads, 2 * l.rows, l.lanes), gradients(threads, 0) {
        int64_t at = 0;
        gradient_at.resize(l.weights);
        const auto reserve = [&](int weight, int64_t floats) { gradient_at[weight] = at, at += floats; };
        for (int i = 0; i < 2; i++) {
            const Dense<V> d = this->preprocess_dense(i);
            reserve(l.preprocess_weight[i], int64_t(d.rows) * d.columns);
        }
        const Dense<V> skip = this->skip_dense();
        for (const DerivedEdge& e : l.edges) {
            if (e.factorized()) reserve(e.weight[0], int64_t(skip.rows) * skip.columns);
            for (int stage = 0; e.kind == CONVOLUTION && stage < e.stages; stage++) {
                reserve(e.weight[stage], int64_t(e.kernel) * e.kernel * l.lanes);
                reserve(e.weight[stage] + 1, int64_t(l.lanes) * l.lanes);
            }
        }
        if (a.d_weights) gradients = WeightSums(threads, at);
    }

    static int64_t scratch(const DerivedLayout<V>& l) {
        size_t pairs = 0;
        for (int state = 0; state < l.nodes + 2; state++) pairs = std::max(pairs, l.leaving[state].size());
        return 2 * l.plane + int64_t(l.nodes + pairs) * l.out_plane;
    }

    void run() {
        last_nodes();
        for (int state = l.nodes + 1; state >= 0; state--) {
            if (l.live_leaving(state).empty()) continue;
            if (state < 2 && !a.d_weights && !a.d_x[state]) continue;
            second_stages(state);
            first_stages(state);
            if (state < 2) preprocess(state);
        }
        if (a.d_weights) write_weights();
    }

   private:
    Totals sums;  // of the gradient g of a normalization's result: Σ g [row], Σ g (raw - mean) [rows + row]
    WeightSums gradients;
    std::vector<int64_t> gradient_at;  // [weight]

    float* d_state(int state, int image) const {
        const int64_t at = state < 2 ? state * l.plane : 2 * l.plane + (state - 2) * l.out_plane;
        return a.scratch + at + l.image(image, l.pixels_of(state));
    }
    float* d_between(int i, int image) const {  // of the i-th pair of stages of a state
        return a.scratch + 2 * l.plane + int64_t(l.nodes + i) * l.out_plane + l.image(image, l.out_pixels);
    }
    Factors factors(int row) const {
        const float *scale = a.weights[l.scale_weight[row]], *inverse = a.work + l.table(1, row);
        return Factors::of(
            l.lanes, a.work + l.table(0, row), inverse, training, double(l.n) * (row < 2 ? l.pixels : l.out_pixels),
            [&](int k) { return k < l.c ? scale[k] : 0; }, [&](int k) { return sums.of(row, k); },
            [&](int k) { return sums.of(l.rows + row, k) * inverse[k]; });
    }

    struct Stage {
        const DerivedEdge* e;
        int which, between;  // between: index among the state's pairs of stages, -1 for the only stage
        Factors f;
        Packed weights;
    };
    std::vector<Stage> stages_of(int state, int which) const {
        std::vector<Stage> stages;
        int pairs = 0;
        for (int i : l.live_leaving(state)) {
            const DerivedEdge& e = l.edges[i];
            if (e.kind != CONVOLUTION || e.stages <= which) continue;
            const int between = e.stages == 2 ? pairs++ : -1;
            stages.push_back({&e, which, between, factors(e.row[which]), Packed(*this, e, which, true)});
        }
        return stages;
    }
    // One edge and image. g: gradient of the normalized result, times `scale`.
    template <bool ADD>
    void stage(const StageBuffers& buffer, const Tile& t, const Tile& d, const Stage& s, const float* g, float scale,
               int image, int share) {
        const float* raw = this->raw(s.e->row[s.which], image);
        const int weight = s.e->weight[s.which];
        const int64_t block = int64_t(l.out_pixels) * V;
        specialized(s.e->kernel, s.e->dilation, s.which ? 1 : s.e->stride, [&](auto k, auto dilation, auto stride) {
            stage_backward<V, k, dilation, stride, ADD>(
                buffer, t, d, s.weights.get(), l.blocks, gradients.of(share, gradient_at[weight]),
                gradients.of(share, gradient_at[weight + 1]),
                [&](int b, int first, int count, float* to) INLINE_LAMBDA {
                    s.f.template draw<V>(b, g + b * block + first * V, raw + b * block + first * V, count, to, scale);
                });
        });
    }

    void second_stages(int state) {
        const auto stages = stages_of(state, 1);
        if (stages.empty()) return;
        const Tile t(l.out_size[0], l.out_size[1], MARGIN, 1);
        for_images(l.n, threads, [&] {
            const auto buffer = StageBuffers::take<V>(t, t, l.blocks);
            return [&, buffer](int image, int share) {
                for (const Stage& s : stages) {
                    const int before = s.e->row[0];
                    fill_tile<V>(buffer.tile, t, l.blocks, this->raw(before, image), this->normalization(before));
                    stage<false>(buffer, t, t, s, d_state(s.e->node + 2, image), this->path_scale(*s.e, image), image,
                                 share);
                    pass_relu(buffer, t, before, image, d_between(s.between, image), share);
                }
            };
        });
    }

    // Gradient of the normalized map before a second stage: where ReLU let it through.
    void pass_relu(const StageBuffers& buffer, const Tile& t, int row, int image, float* out, int share) {
        const float *raw = this->raw(row, image), *means = a.work + l.table(0, row);
        for (int b = 0; b < l.blocks; b++) {
            const Vec<V> mean = load<V>(means + b * V);
            Vec<V> sum{}, product{};
            for (int y = 0; y < t.height; y++, out += t.width * V, raw += t.width * V) {
                const float* seen = buffer.tile + (int64_t(b) * t.pixels() + t.at(y, 0)) * V;
                const float* d = buffer.d_map + (int64_t(b) * t.height + y) * padded(t.width) * V;
                Vec<V> line_sum{}, line_product{};
                for (int x = 0; x < t.width; x++) {
                    const Vec<V> passed = where_positive<V>(load<V>(seen + x * V), load<V>(d + x * V));
                    store<V>(out + x * V, passed);
                    line_sum += passed, line_product += passed * (load<V>(raw + x * V) - mean);
                }
                sum += line_sum, product += line_product;
            }
            sums.template add<V>(share, row, b, sum);
            sums.template add<V>(share, l.rows + row, b, product);
        }
    }

    // --- A state's gradient: of the output, and all that leaves it ---

    void last_nodes() {
        std::vector<int> last;
        for (int state = 2; state < l.nodes + 2; state++)
            if (l.is_live(state) && l.live_leaving(state).empty()) last.push_back(state);
        for_images(l.n, threads, [&] {
            return [&](int image, int share) {
                for (int state : last) begin_state(state, image), reduce(state, image, share);
            };
        });
    }

    // The output's gradient of a state that is part of it; else zeros.
    void begin_state(int state, int image) {
        float* to = d_state(state, image);
        const int map = l.pixels_of(state);
        if (l.place[state] < 0) {
            std::fill_n(to, int64_t(l.blocks) * map * V, 0.0f);
            return;
        }
        const float* from = a.d_out + int64_t(image) * map * l.wide() + l.place[state] * l.c;
        for (int b = 0; b < l.blocks; b++)
            for (int i = 0; i < map; i++, to += V)
                store<V>(to, load_some<V>(from + int64_t(i) * l.wide() + b * V, l.c - b * V));
    }

    // Adds what a state's gradient is to the normalizations that feed it.
    void reduce(int state, int image, int share) {
        if (state < 2) return reduce_row(state, state, 1, image, share);
        for (int edge = 2 * (state - 2); edge < 2 * (state - 1); edge++)
            if (const int row = l.edges[edge].result_row(); row >= 0)
                reduce_row(state, row, this->path_scale(l.edges[edge], image), image, share);
    }
    void reduce_row(int state, int row, float scale, int image, int share) {
        if (scale == 0) return;
        const int map = l.pixels_of(state);
        const float *d = d_state(state, image), *raw = this->raw(row, image);
        for (int b = 0; b < l.blocks; b++) {
            const Vec<V> mean = load<V>(a.work + l.table(0, row) + b * V);
            Vec<V> sum{}, product{};
            for (int first = 0; first < map; first += CHUNK) {
                Vec<V> s{}, p{};
                const int count = std::min(CHUNK, map - first);
                for (int i = 0; i < count; i++, d += V, raw += V) s += load<V>(d), p += load<V>(d) * (load<V>(raw) - mean);
                sum += s, product += p;
            }
            sums.template add<V>(share, row, b, scale * sum);
            sums.template add<V>(share, l.rows + row, b, scale * product);
        }
    }

    struct Skip {
        const DerivedEdge* e;
        Factors f;
        std::vector<float> weights;
    };

    void first_stages(int state) {
        const auto edges = l.live_leaving(state);
        const auto stages = stages_of(state, 0);
        const Dense<V> skip = this->skip_dense();
        std::vector<Skip> skips;
        for (int i : edges)
            if (const DerivedEdge& e = l.edges[i]; e.factorized())
                skips.push_back({&e, factors(e.row[0]), this->packed(skip, e.weight[0], true)});
        const int height = l.size_of(state)[0], width = l.size_of(state)[1], stride = l.edges[edges[0]].stride;
        const Tile t(height, width, MARGIN, stride), d(l.out_size[0], l.out_size[1], MARGIN, 1);
        for_images(l.n, threads, [&] {
            const auto buffer = StageBuffers::take<V>(t, d, l.blocks);
            const PoolBuffers pool(l, height, width);
            float *pixels = arena().take(CHUNK * skip.rows), *drawn = arena().take(CHUNK * skip.columns);
            return [&, buffer, pool, pixels, drawn](int image, int share) {
                begin_state(state, image);
                if (!stages.empty() || !skips.empty()) {
                    fill_tile<V>(buffer.tile, t, l.blocks, this->state(state, image), this->reading(state));
                    std::fill_n(buffer.d_map, int64_t(l.blocks) * height * padded(width) * V, 0.0f);
                }
                for (const Stage& s : stages) {
                    const bool only = s.between < 0;
                    stage<true>(buffer, t, d, s, only ? d_state(s.e->node + 2, image) : d_between(s.between, image),
                                only ? this->path_scale(*s.e, image) : 1, image, share);
                }
                for (const Skip& s : skips) skip_backward(skip, s, state, image, buffer.d_map, pixels, drawn, share);
                if (!stages.empty() || !skips.empty()) add_passed(buffer, t, d_state(state, image));
                for (int i : edges) {
                    const DerivedEdge& e = l.edges[i];
                    if (e.identity()) add_identity(e, image);
                    else if (e.pools()) pool_backward(e, pool, image);
                }
                reduce(state, image, share);
            };
        });
    }

    // What convolutions sent back, where ReLU let their input through.
    void add_passed(const StageBuffers& buffer, const Tile& t, float* to) const {
        for (int b = 0; b < l.blocks; b++)
            for (int y = 0; y < t.height; y++, to += t.width * V) {
                const float* seen = buffer.tile + (int64_t(b) * t.pixels() + t.at(y, 0)) * V;
                const float* from = buffer.d_map + (int64_t(b) * t.height + y) * padded(t.width) * V;
                over_pixels<V>(t.width, [=](int x, auto lanes) {
                    constexpr int L = lanes;
                    add_to<L>(to + x * V, where_positive<L>(load<L>(seen + x * V), load<L>(from + x * V)));
                });
            }
    }

    void add_identity(const DerivedEdge& e, int image) const {
        float* to = d_state(e.source, image);
        const float* from = d_state(e.node + 2, image);
        for (int i = 0; i < l.blocks * l.out_pixels; i++) add_to<V>(to + i * V, load<V>(from + i * V));
    }

    void skip_backward(const Dense<V>& d, const Skip& s, int state, int image, float* d_map, float* pixels, float* drawn,
                       int share) {
        const int height = l.size_of(state)[0], width = l.size_of(state)[1];
        const float *g = d_state(s.e->node + 2, image), *raw = this->raw(s.e->row[0], image);
        const float scale = this->path_scale(*s.e, image);
        for (int first = 0; first < l.out_pixels; first += CHUNK) {
            const int count = std::min(CHUNK, l.out_pixels - first);
            for (int b = 0; b < l.blocks; b++) {
                const int64_t at = (int64_t(b) * l.out_pixels + first) * V;
                s.f.template draw_rows<V>(b, g + at, raw + at, count, drawn + b * V, d.columns, scale);
            }
            if (float* own = gradients.of(share, gradient_at[s.e->weight[0]])) {
                d.gather_map(this->state(state, image), this->reading(state), height, width, first, count, pixels);
                d.matrix_gradient(pixels, drawn, count, own);
            }
            d.map_gradient(s.weights.data(), drawn, height, width, first, count, d_map);
        }
    }

    struct PoolBuffers {
        Tile t;
        float *tile, *d_tile, *pooled, *d_pooled;
        PoolBuffers(const DerivedLayout<V>& l, int height, int width) : t(height, width, 1, 1) {
            tile = arena().take(t.pixels() * V), d_tile = arena().take(t.pixels() * V);
            pooled = arena().take(l.out_pixels * V), d_pooled = arena().take(l.out_pixels * V);
        }
    };
    void pool_backward(const DerivedEdge& e, const PoolBuffers& buffer, int image) const {
        const Tile& t = buffer.t;
        const float scale = this->path_scale(e, image);
        if (scale == 0) return;
        float* to = d_state(e.source, image);
        const float* g = d_state(e.node + 2, image);
        std::fill_n(buffer.tile, t.pixels() * V, -INFINITY);
        for (int b = 0; b < l.blocks; b++, g += l.out_pixels * V) {
            for (int i = 0; i < l.out_pixels; i++) store<V>(buffer.d_pooled + i * V, scale * load<V>(g + i * V));
            std::fill_n(buffer.d_tile, t.pixels() * V, 0.0f);
            if (e.kind == MAXIMUM) {
                this->fill_pool(buffer.tile, t, e.source, b, image);
                pool_map<V, true>(buffer.tile, t, e.stride, buffer.pooled);
                pool_map_backward<V, true>(buffer.tile, buffer.pooled, t, e.stride, buffer.d_tile, buffer.d_pooled);
            } else {
                pool_map_backward<V, false>(buffer.tile, buffer.pooled, t, e.stride, buffer.d_tile, buffer.d_pooled);
            }
            for (int y = 0; y < t.height; y++)
                for (int x = 0; x < t.width; x++, to += V) add_to<V>(to, load<V>(buffer.d_tile + (t.at(y, 0) + x) * V));
        }
    }

    void preprocess(int input) {
        const Dense<V> d = this->preprocess_dense(input);
        const auto w = this->packed(d, l.preprocess_weight[input], true);
        const Factors f = factors(input);
        for_images(l.n, threads, [&] {
            float *pixels = arena().take(CHUNK * d.rows), *drawn = arena().take(CHUNK * d.columns);
            return [&, pixels, drawn](int image, int share) {
                const float* from = a.x[input] + this->input_at(d, image);
                float* d_x = a.d_x[input] ? a.d_x[input] + this->input_at(d, image) : nullptr;
                const float *g = d_state(input, image), *raw = this->raw(input, image);
                for (int first = 0; first < l.pixels; first += CHUNK) {
                    const int count = std::min(CHUNK, l.pixels - first);
                    for (int b = 0; b < l.blocks; b++) {
                        const int64_t at = (int64_t(b) * l.pixels + first) * V;
                        f.draw_rows<V>(b, g + at, raw + at, count, drawn + b * V, d.columns);
                    }
                    d.gather_pixels(from, l.size[1], first, count, pixels);
                    if (float* own = gradients.of(share, gradient_at[l.preprocess_weight[input]]))
                        d.matrix_gradient(pixels, drawn, count, own);
                    if (d_x) d.image_gradient(w.data(), drawn, pixels, l.size[1], first, count, d_x, l.past_caches());
                }
            };
        });
    }

    // --- Results ---

    void write_weights() {
        gradients.gather();
        for (int i = 0; i < 2; i++)
            if (!l.live_leaving(i).empty()) {
                write_dense(this->preprocess_dense(i), l.preprocess_weight[i]);
                write_normalization(i);
            }
        for (const DerivedEdge& e : l.edges) {
            if (!e.live) continue;
            if (e.factorized()) write_dense(this->skip_dense(), e.weight[0]), write_normalization(e.row[0]);
            for (int stage = 0; e.kind == CONVOLUTION && stage < e.stages; stage++) {
                const int taps = e.kernel * e.kernel, weight = e.weight[stage];
                for (int k = 0; k < l.c; k++) {
                    for (int tap = 0; tap < taps; tap++)
                        a.d_weights[weight][k * taps + tap] = gradients[gradient_at[weight] + tap * l.lanes + k];
                    for (int i = 0; i < l.c; i++)
                        a.d_weights[weight + 1][k * l.c + i] = gradients[gradient_at[weight + 1] + i * l.lanes + k];
                }
                write_normalization(e.row[stage]);
            }
        }
    }
    void write_dense(const Dense<V>& d, int weight) const {
        d.each([&](int64_t to, bool odd, int64_t at) {
            a.d_weights[weight + odd][to] = gradients[gradient_at[weight] + at];
        });
    }
    void write_normalization(int row) const {
        for (int k = 0; k < l.c; k++) {
            a.d_weights[l.scale_weight[row]][k] = sums.of(l.rows + row, k) * a.work[l.table(1, row) + k];
            a.d_weights[l.scale_weight[row] + 1][k] = sums.of(row, k);
        }
    }
};

}  // namespace FPDARTS_ISA
