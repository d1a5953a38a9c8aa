// A cell's backward, the same way back. A node's gradient ds yields one set of sums, Σ ds and Σ ds (raw - mean) for each
// operation that feeds it; from these follow the gradients of normalizations, alpha and beta. The gradient of a raw map,
// a ds + b (raw - mean) + c a channel, is formed where it is read.
#pragma once

#include <deque>

#include "engine.h"

namespace FPDARTS_ISA {

// Sums of channels, gathered by each thread for itself.
class Totals {
   public:
    Totals(int threads, int rows, int lanes)
        : threads(threads), rows(rows), lanes(lanes), values(size_t(threads) * rows * lanes) {}
    template <int V> INLINE void add(int thread, int row, int block, Vec<V> sum) {
        double* to = &values[(size_t(thread) * rows + row) * lanes + block * V];
        for (int k = 0; k < V; k++) to[k] += sum[k];
    }
    double of(int row, int lane) const {
        double total = 0;
        for (int t = 0; t < threads; t++) total += values[(size_t(t) * rows + row) * lanes + lane];
        return total;
    }
    double over_lanes(int row) const {
        double total = 0;
        for (int k = 0; k < lanes; k++) total += of(row, k);
        return total;
    }

   private:
    int threads, rows, lanes;
    std::vector<double> values;
};

template <int V> class Backward : public Engine<V> {
    using Base = Engine<V>;
    using Base::a, Base::l, Base::training, Base::threads;
    using typename Base::Dense, typename Base::Used;

   public:
    explicit Backward(const CellArguments& arguments)
        : Base(arguments, !arguments.given_mean),
          columns(l.operations.size()),
          node_sums(threads, l.nodes * l.slices, l.lanes),
          term_sums(threads, l.edges.size() * columns, l.lanes),
          pass_sums(threads, l.edges.size() * l.slices, l.lanes),
          between_sums(threads, 2 * l.rows, l.lanes),
          gradients(threads) {
        int64_t at = 0;
        const auto reserve = [&](int64_t floats) { return at += floats, at - floats; };
        for (int i = 0; i < 2; i++) {
            const Dense d = this->preprocess_dense(i);
            gradient_at.push_back(reserve(int64_t(d.rows) * d.columns));
            if (d.two) gradient_at.push_back(gradient_at.back());
        }
        const Dense skip = this->skip_dense();
        for (const Operation& o : l.operations) {
            for (int stage = 0; stage < o.stages; stage++) {
                gradient_at.push_back(reserve(int64_t(l.edges.size()) * o.kernel * o.kernel * l.lanes));
                gradient_at.push_back(reserve(int64_t(l.edges.size()) * l.lanes * l.lanes));
            }
            if (o.kind == SKIP && l.strided)
                gradient_at.insert(gradient_at.end(), 2, reserve(int64_t(l.strided) * skip.rows * skip.columns));
        }
        if (a.d_weights)
            for (auto& own : gradients) own.resize(at);
    }

    static int64_t scratch(const Layout<V>& l) {
        int64_t two_stages = 0, leaving = 0;
        for (const Operation& o : l.operations) two_stages += o.stages == 2;
        for (const auto& rows : l.leaving) leaving = std::max<int64_t>(leaving, rows.size());
        return (l.nodes * l.slices + two_stages * leaving) * l.out_plane + 2 * l.slices * l.plane;
    }

    void run() {
        reduce_last();
        for (int source = l.nodes; source >= 0; source--) {
            if (source < 2 && !a.d_weights && !a.d_x[source]) continue;
            second_stages(source);
            first_stages(source);
            if (source < 2) preprocess(source);
        }
        if (a.d_weights) write_weights();
        if (a.d_alpha) write_mixing();
    }

   private:
    int columns;
    // Σ ds [node, slice]; Σ ds (raw - mean) [edge, operation]; Σ ds x of what passes as it is [edge, slice]; and of the
    // gradient dy between two stages, or of an input state, Σ dy [row] and Σ dy normalized [rows + row].
    Totals node_sums, term_sums, pass_sums, between_sums;
    std::vector<std::vector<float>> gradients;  // [thread], padded like what they are gradients of
    std::vector<int64_t> gradient_at;           // [weight]

    // --- Where gradients of maps lie in the scratch memory ---

    float* d_node(int node, int slice) const { return a.scratch + (node * l.slices + slice) * l.out_plane; }
    float* d_input(int source, int slice) const {
        return a.scratch + l.nodes * l.slices * l.out_plane + (source * l.slices + slice) * l.plane;
    }
    float* d_between(int i) const {  // of the i-th pair of stages of a source
        return a.scratch + l.nodes * l.slices * l.out_plane + 2 * l.slices * l.plane + i * l.out_plane;
    }

    // --- Gradients of normalizations ---

    // d_raw = g factor + (raw - mean) slope + shift, each [lanes].
    struct Factors {
        std::vector<float> factor, slope, shift, mean;
    };
    // k: what the normalized value is multiplied by. sum, product: Σ g and Σ g normalized, of a lane.
    template <class Sum, class Product>
    Factors factors(int row, double k, double count, Sum&& sum, Product&& product) const {
        Factors f;
        for (int i = 0; i < l.lanes; i++) {
            const double inverse = a.work[l.inverse(row) + i];
            f.mean.push_back(a.work[l.mean(row) + i]);
            f.factor.push_back(k * inverse);
            f.slope.push_back(training ? -k * inverse * inverse * product(i) / count : 0);
            f.shift.push_back(training ? -k * inverse * sum(i) / count : 0);
        }
        return f;
    }
    double count(int pixels) const { return double(l.n) * pixels; }

    // Of an operation's result on an edge.
    Factors result_factors(const Edge& e, int column) const {
        const Operation& o = l.operations[column];
        const int row = l.result_row(o, e);
        return factors(
            row, this->scale_of(e, column), count(l.out_pixels),
            [&](int i) { return node_sums.of(e.node * l.slices + o.path, i); },
            [&](int i) { return term_sums.of(e.row * columns + column, i) * a.work[l.inverse(row) + i]; });
    }
    Factors between_factors(int row, int pixels) const {
        return factors(
            row, 1, count(pixels), [&](int i) { return between_sums.of(row, i); },
            [&](int i) { return between_sums.of(l.rows + row, i); });
    }
    // Of an input, which was normalized in place.
    Factors input_factors(int row) const {
        Factors f = between_factors(row, l.pixels);
        for (int i = 0; i < l.lanes; i++) f.slope[i] /= a.work[l.inverse(row) + i], f.mean[i] = 0;
        return f;
    }
    // Pixels of one block: g and raw -> d_raw.
    INLINE static void draw(const Factors& f, int block, const float* g, const float* raw, int count, float* out) {
        const Spread<V> factor(load<V>(&f.factor[block * V])), slope(load<V>(&f.slope[block * V]));
        const Spread<V> shift(load<V>(&f.shift[block * V])), mean(load<V>(&f.mean[block * V]));
        over_pixels<V>(count, [=](int i, auto lanes) {
            constexpr int L = lanes;
            const Vec<L> centred = load<L>(raw + i * V) - mean.template as<L>();
            store<L>(out + i * V, factor.template as<L>() * load<L>(g + i * V) +
                                      (slope.template as<L>() * centred + shift.template as<L>()));
        });
    }

    // The same, to pixels `step` apart.
    INLINE static void draw_rows(const Factors& f, int block, const float* g, const float* raw, int count, float* out,
                                 int step) {
        const Vec<V> factor = load<V>(&f.factor[block * V]), slope = load<V>(&f.slope[block * V]);
        const Vec<V> shift = load<V>(&f.shift[block * V]), mean = load<V>(&f.mean[block * V]);
        for (int i = 0; i < count; i++)
            store<V>(out + i * step, factor * load<V>(g + i * V) + (slope * (load<V>(raw + i * V) - mean) + shift));
    }

    // --- Sums of a node's gradient ---

    struct Terms {  // of one slice
        std::vector<int64_t> planes;
        std::vector<const float*> means;  // [lanes], null for 0
        std::vector<int> rows;            // of term_sums, or of pass_sums from columns * edges on
    };
    std::vector<Terms> terms_of(int node) const {
        std::vector<Terms> terms(l.slices);
        const auto add = [&](int slice, int64_t plane, const float* mean, int row) {
            terms[slice].planes.push_back(plane), terms[slice].means.push_back(mean), terms[slice].rows.push_back(row);
        };
        for (int row : l.into[node]) {
            const Edge& e = l.edges[row];
            for (int s = 0; s < l.slices; s++)
                if (a.d_alpha && this->passes(e, s))
                    add(s, l.bypass(e.source, s), nullptr, columns * l.edges.size() + row * l.slices + s);
            for (int i = 0; i < columns; i++) {
                const Operation& o = l.operations[i];
                const int result = l.result_row(o, e);
                if (result >= 0 && this->is_open(e, o.path))
                    add(o.path, l.raw(result), a.work + l.mean(result), row * columns + i);
            }
        }
        return terms;
    }

    void reduce(int node, const std::vector<Terms>& terms, int image, int thread) {
        const int map = l.out_pixels, first_pass = columns * l.edges.size();
        for (int s = 0; s < l.slices; s++)
            for (int b = 0; b < l.blocks; b++) {
                const Terms& t = terms[s];
                const int64_t at = l.image(image, map) + int64_t(b) * map * V;
                const float* d = d_node(node, s) + at;
                const int count = t.planes.size();
                Vec<V> sum{};
                for (int first = 0; first < map; first += CHUNK) {
                    Vec<V> part{};
                    for (int i = first; i < std::min(map, first + CHUNK); i++) part += load<V>(d + i * V);
                    sum += part;
                }
                node_sums.template add<V>(thread, node * l.slices + s, b, sum);
                for (int first = 0; first < count; first += 4) {
                    const float* from[4];
                    Vec<V> sums[4] = {};
                    const auto mean_of = [&](int k) {  // the last ones repeat, and are not used
                        const int term = std::min(first + k, count - 1);
                        from[k] = a.work + t.planes[term] + at;
                        return Spread<V>(t.means[term] ? load<V>(t.means[term] + b * V) : Vec<V>{});
                    };
                    const Spread<V> mean[4] = {mean_of(0), mean_of(1), mean_of(2), mean_of(3)};
                    for (int i = 0; i < map; i += CHUNK) {
                        constexpr int L = PACK<V> * V;
                        Vec<L> parts[4] = {};
                        over_pixels<V>(std::min(CHUNK, map - i), [&](int j, auto lanes) {
                            constexpr int now = lanes;
                            UNROLL for (int k = 0; k < 4; k++) {
                                const Vec<now> product = load<now>(d + (i + j) * V) *
                                                         (load<now>(from[k] + (i + j) * V) - mean[k].template as<now>());
                                if constexpr (now == L) parts[k] += product;
                                else sums[k] += product;
                            }
                        });
                        UNROLL for (int k = 0; k < 4; k++) sums[k] += folded<V, L>(parts[k]);
                    }
                    for (int k = 0; k < std::min(4, count - first); k++) {
                        const int row = t.rows[first + k];
                        if (row >= first_pass) pass_sums.template add<V>(thread, row - first_pass, b, sums[k]);
                        else term_sums.template add<V>(thread, row, b, sums[k]);
                    }
                }
            }
    }

    // Gradient of an image of a node: its channels of d_out, and what the edges that leave it sent back (slice by
    // slice; null for the last node), into the slices that were summed.
    void unshuffle(int node, int image, const float* sent, float* pixel) {
        const int map = l.out_pixels, wide = l.nodes * l.shape.channels;
        const float* from = a.d_out + int64_t(image) * map * wide + node * l.shape.channels;
        const int slices = l.slices, blocks = l.blocks, c = l.c;
        const int64_t plane = l.out_plane, block = int64_t(map) * V;
        float* to = d_node(node, 0) + l.image(image, map);
        for (int i = 0; i < map; i++, from += wide, to += V) {
            __builtin_prefetch(from + 16 * wide);  // a line of every pixel: no pattern that is followed far enough
            const float* channels = from;
            if (sent) {
                for (int s = 0; s < slices; s++)
                    for (int b = 0; b < blocks; b++) {
                        const Vec<V> more = load<V>(sent + (s * blocks + b) * block + i * V);
                        store_some<V>(pixel + s * c + b * V, load_some<V>(from + s * c + b * V, c - b * V) + more, c - b * V);
                    }
                channels = pixel;
            }
            for (int b = 0; b < blocks; b++) unshuffle_pixel<V>(channels, slices, b, c, to + b * block, plane);
        }
    }

    void reduce_last() {
        const auto terms = terms_of(l.nodes - 1);
        for_images(l.n, threads, [&](int thread) {
            return [&, thread](int image) {
                unshuffle(l.nodes - 1, image, nullptr, nullptr);
                reduce(l.nodes - 1, terms, image, thread);
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
            if (this->is_used(o, source)) stages.used.emplace_back(*this, o, which, true);
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

    // One edge and image. g: gradient of the normalized result.
    template <int K, int D, int S, bool ADD>
    void stage(const StageBuffers& buffer, const Tile& t, const Tile& d, const Stage& stage, const float* g,
               const float* raw, int thread) {
        float* own = a.d_weights ? gradients[thread].data() : nullptr;
        const int64_t block = int64_t(d.height) * d.width * V;
        stage_backward<V, K, D, S, ADD>(
            buffer, t, d, stage.weights, l.blocks, own ? own + stage.depthwise_at : nullptr,
            own ? own + stage.pointwise_at : nullptr, [&](int b, int first, int count, float* to) INLINE_LAMBDA {
                draw(stage.f, b, g + b * block + first * V, raw + b * block + first * V, count, to);
            });
    }

    void second_stages(int source) {
        const Stages stages = stages_of(source, 1);
        const Tile t(l.out_size[0], l.out_size[1], MARGIN, 1);
        for_images(l.n, threads, [&](int thread) {
            const auto buffer = StageBuffers::take<V>(t, t, l.blocks);
            return [&, buffer, thread](int image) {
                for (const Stage& s : stages.all) {
                    const int before = s.o->row[0] + s.edge;
                    const int64_t at = l.image(image, l.out_pixels);
                    this->fill(buffer.tile, t, a.work + l.raw(before) + at, a.work + l.mean(before),
                               a.work + l.inverse(before));
                    const float *g = d_node(l.edges[s.edge].node, s.o->path) + at, *raw = a.work + l.raw(s.row) + at;
                    specialized(s.o->kernel, s.o->dilation, 1, [&](auto k, auto d, auto) {
                        stage<k, d, 1, false>(buffer, t, t, s, g, raw, thread);
                    });
                    pass_relu(buffer, t, d_between(s.between) + at, before, thread);
                }
            };
        });
    }

    // Gradient of the normalized map before a second stage: where ReLU let it through.
    void pass_relu(const StageBuffers& buffer, const Tile& t, float* out, int row, int thread) {
        for (int b = 0; b < l.blocks; b++) {
            Vec<V> sum{}, product{};
            for (int y = 0; y < t.height; y++) {
                const float* seen = buffer.tile + (int64_t(b) * t.pixels() + t.at(y, 0)) * V;
                const float* d = buffer.d_map + (int64_t(b) * t.height + y) * padded(t.width) * V;
                constexpr int L = PACK<V> * V;
                Vec<L> line_sum{}, line_product{};
                over_pixels<V>(t.width, [&](int x, auto lanes) {
                    constexpr int now = lanes;
                    const Vec<now> value = load<now>(seen + x * V);
                    const Vec<now> passed = where_positive<now>(value, load<now>(d + x * V));
                    store<now>(out + x * V, passed);
                    if constexpr (now == L) line_sum += passed, line_product += passed * value;
                    else sum += passed, product += passed * value;
                });
                out += t.width * V;
                sum += folded<V, L>(line_sum), product += folded<V, L>(line_product);
            }
            between_sums.template add<V>(thread, row, b, sum);
            between_sums.template add<V>(thread, l.rows + row, b, product);
        }
    }

    // --- A state's gradient: all that leaves it ---

    void first_stages(int source) {
        const int stride = l.stride(source), height = l.size_of(source)[0], width = l.size_of(source)[1];
        const Stages stages = stages_of(source, 0);
        const Tile t(height, width, MARGIN, stride), d(l.out_size[0], l.out_size[1], MARGIN, 1), around(height, width, 1, 1);
        std::vector<Terms> terms;
        if (source >= 2) terms = terms_of(source - 2);
        const Dense skip = this->skip_dense();
        struct Pool {
            const Operation* o;
            Factors f;
            std::vector<const Edge*> edges;
            std::vector<float> scales;
        };
        struct Skip {
            const Operation* o;
            const Edge* e;
            Factors f;
            std::vector<float> weights;
        };
        std::vector<Pool> pools;
        std::vector<Skip> skips;
        for (int column = 0; column < columns; column++) {
            const Operation& o = l.operations[column];
            if (!this->is_used(o, source)) continue;
            const bool pool = o.kind == MAXIMUM || o.kind == AVERAGE;
            if (pool) pools.push_back({&o, pool_factors(o, column, source), {}, {}});
            const bool strided_skip = o.kind == SKIP && stride == 2;
            for (int row : l.leaving[source]) {
                const Edge& e = l.edges[row];
                if (!this->is_open(e, o.path)) continue;
                if (pool) pools.back().edges.push_back(&e), pools.back().scales.push_back(this->scale_of(e, column));
                if (strided_skip)
                    skips.push_back({&o, &e, result_factors(e, column), this->skip_matrix(o, skip, row, true)});
            }
        }
        for_images(l.n, threads, [&](int thread) {
            const auto buffer = StageBuffers::take<V>(t, d, l.blocks);
            float* pooled = arena().take(around.pixels() * V);
            float* d_pooled = arena().take(around.pixels() * V);
            float* mixed = arena().take(l.out_pixels * V);
            float* pixels = arena().take(CHUNK * skip.rows);
            float* drawn = arena().take(CHUNK * skip.columns);
            float* pixel = arena().take(l.slices * l.lanes);
            float* sent = source < 2 ? nullptr : arena().take(l.slices * l.blocks * l.out_pixels * V);
            return [&, buffer, pooled, d_pooled, mixed, pixels, drawn, pixel, sent, thread](int image) {
                const int64_t at = l.image(image, height * width), out_at = l.image(image, l.out_pixels);
                for (int slice = 0; slice < l.slices; slice++) {
                    const float* map = a.work + l.state(source, slice) + at;
                    const int64_t size = int64_t(l.blocks) * height * width * V;
                    float* d_map = source < 2 ? d_input(source, slice) + at : sent + slice * size;
                    std::fill_n(d_map, size, 0.0f);
                    bool convolved = false;
                    const auto begin = [&] {
                        if (convolved) return;
                        this->fill(buffer.tile, t, map, nullptr, nullptr);
                        std::fill_n(buffer.d_map, l.blocks * t.height * padded(t.width) * V, 0.0f);
                        convolved = true;
                    };
                    for (const Stage& s : stages.all) {
                        if (s.o->path != slice) continue;
                        begin();
                        const float* g = s.between < 0 ? d_node(l.edges[s.edge].node, slice) : d_between(s.between);
                        specialized(s.o->kernel, s.o->dilation, stride, [&](auto k, auto dilation, auto strides) {
                            stage<k, dilation, strides, true>(buffer, t, d, s, g + out_at, a.work + l.raw(s.row) + out_at,
                                                              thread);
                        });
                    }
                    for (const Skip& s : skips) {
                        if (s.o->path != slice) continue;
                        begin();
                        skip_backward(skip, s.f, s.weights.data(), map, d_node(s.e->node, slice) + out_at,
                                      a.work + l.raw(s.o->row[0] + s.e->row) + out_at, height, width, buffer.d_map,
                                      pixels, drawn,
                                      a.d_weights ? &gradients[thread][gradient_at[s.o->weight[0]] +
                                                                       int64_t(s.e->row) * skip.rows * skip.columns]
                                                  : nullptr);
                    }
                    if (convolved) add_convolved(buffer.d_map, map, height, width, d_map);
                    for (const Pool& p : pools)
                        if (p.o->path == slice)
                            pool_backward(*p.o, p.f, p.edges, p.scales, source, slice, map, around, out_at, d_map, pooled,
                                          d_pooled, mixed);
                    pass_backward(source, slice, map, out_at, d_map, mixed);
                    if (source < 2) sum_input(source, slice, image, thread);
                }
                if (source < 2) return;
                unshuffle(source - 2, image, sent, pixel);
                reduce(source - 2, terms, image, thread);
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
        return factors(row, 1, count(l.out_pixels), [&](int i) { return sum[i]; },
                       [&](int i) { return product[i] * a.work[l.inverse(row) + i]; });
    }

    // Σ over edges of scale * their nodes' gradient, of one block.
    void mix(const std::vector<const Edge*>& edges, const std::vector<float>& scales, int slice, int64_t at,
             float* out) const {
        std::fill_n(out, l.out_pixels * V, 0.0f);
        for (size_t k = 0; k < edges.size(); k++) {
            const float* d = d_node(edges[k]->node, slice) + at;
            for (int i = 0; i < l.out_pixels; i++) add_to<V>(out + i * V, scales[k] * load<V>(d + i * V));
        }
    }

    void pool_backward(const Operation& o, const Factors& f, const std::vector<const Edge*>& edges,
                       const std::vector<float>& scales, int source, int slice, const float* map, const Tile& t,
                       int64_t out_at, float* d_map, float* tile, float* d_tile, float* mixed) {
        const int stride = l.stride(source), size = t.height * t.width;
        const bool max = o.kind == MAXIMUM;
        std::fill_n(tile, t.pixels() * V, -FLT_MAX);
        for (int b = 0; b < l.blocks; b++) {
            const int64_t at = out_at + int64_t(b) * l.out_pixels * V;
            const float* raw = a.work + l.raw(o.row[0] + source) + at;
            mix(edges, scales, slice, at, mixed);
            draw(f, b, mixed, raw, l.out_pixels, mixed);
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
                for (int i = 0; i < size; i++) add_to<V>(to + i * V, load<V>(mixed + i * V));
            } else {
                halve_map_backward<V>(map + int64_t(b) * size * V, a.work + l.bypass(source, slice) + at, l.size[0],
                                      l.size[1], to, mixed);
            }
        }
    }

    // What the convolutions sent back, where ReLU let their input through.
    void add_convolved(const float* convolved, const float* map, int height, int width, float* d_map) const {
        for (int y = 0; y < l.blocks * height; y++, convolved += padded(width) * V)
            for (int x = 0; x < width; x++, map += V, d_map += V)
                add_to<V>(d_map, where_positive<V>(load<V>(map), load<V>(convolved + x * V)));
    }

    // --- Matrix products ---

    void skip_backward(const Dense& d, const Factors& f, const float* weights, const float* map, const float* g,
                       const float* raw, int height, int width, float* d_map, float* pixels, float* drawn, float* own) {
        const int64_t block = int64_t(height) * padded(width) * V;
        for (int first = 0; first < l.out_pixels; first += CHUNK) {
            const int count = std::min(CHUNK, l.out_pixels - first);
            for (int b = 0; b < l.blocks; b++) {
                const int64_t at = (int64_t(b) * l.out_pixels + first) * V;
                draw_rows(f, b, g + at, raw + at, count, drawn + b * V, d.columns);
            }
            if (own) {
                this->gather_skip(d, map, height, width, first, count, pixels);
                matrix_gradient(d, pixels, drawn, count, own);
            }
            pointwise_rows<V>(drawn, V, d.columns, d.columns / V, weights, d.columns * V, d.rows / V, count,
                              [&](int x, int row, Vec<V> v) {
                                  const int odd = row >= l.blocks, b = row - odd * l.blocks;
                                  const int y = (first + x) / (width / 2) * 2 + odd;
                                  const int column = (first + x) % (width / 2) * 2 + odd;
                                  add_to<V>(d_map + b * block + (int64_t(y) * padded(width) + column) * V, v);
                              });
        }
    }

    // pixels, drawn: rows of the product's two sides.
    static void matrix_gradient(const Dense& d, const float* pixels, const float* drawn, int count, float* own) {
        d.with_block([&](auto lanes) {
            constexpr int L = lanes;
            for (int row = 0; row < d.rows; row += L)
                for (int column = 0; column < d.columns; column += L)
                    outer<L>(pixels + row, d.rows, drawn + column, d.columns, count,
                             own + int64_t(row) * d.columns + column, d.columns);
        });
    }

    // Sums of an input state's gradient, for its normalization.
    void sum_input(int source, int slice, int image, int thread) {
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
            between_sums.template add<V>(thread, row, b, sum);
            between_sums.template add<V>(thread, l.rows + row, b, product);
        }
    }

    void preprocess(int input) {
        const Dense d = this->preprocess_dense(input);
        const auto w = this->preprocess_matrix(input, d, true);
        std::vector<Factors> factors;
        for (int s = 0; s < l.slices; s++) factors.push_back(input_factors(input * l.slices + s));
        for_images(l.n, threads, [&](int thread) {
            float* pixels = arena().take(CHUNK * d.rows);
            float* drawn = arena().take(CHUNK * d.columns);
            return [&, pixels, drawn, thread](int image) {
                if (d.two && a.d_x[input])  // most pixels were not read
                    std::fill_n(a.d_x[input] + int64_t(image) * l.full_pixels * d.inputs, int64_t(l.full_pixels) * d.inputs, 0.0f);
                for (int first = 0; first < l.pixels; first += CHUNK) {
                    const int count = std::min(CHUNK, l.pixels - first);
                    for (int s = 0; s < l.slices; s++)
                        for (int b = 0; b < l.blocks; b++) {
                            const int64_t at = l.image(image, l.pixels) + (int64_t(b) * l.pixels + first) * V;
                            draw_rows(factors[s], b, d_input(input, s) + at, a.work + l.state(input, s) + at,
                                      count, drawn + (s * l.blocks + b) * V, d.columns);
                        }
                    this->gather_input(d, input, image, first, count, pixels);
                    if (a.d_weights)
                        matrix_gradient(d, pixels, drawn, count,
                                        &gradients[thread][gradient_at[l.preprocess_weight[input]]]);
                    if (a.d_x[input]) input_gradient(d, input, image, first, count, w.data(), pixels, drawn);
                }
            };
        });
    }

    void input_gradient(const Dense& d, int input, int image, int first, int count, const float* w, const float* pixels,
                        const float* drawn) {
        const int each = d.rows / (1 + d.two), width = l.size[1];
        const int64_t begin = int64_t(image) * (d.two ? l.full_pixels : l.pixels);
        d.with_block([&](auto lanes) {
            constexpr int L = lanes;
            pointwise_rows<L>(drawn, L, d.columns, d.columns / L, w, long(d.columns) * L, d.rows / L, count,
                              [&](int x, int row, Vec<L> v) INLINE_LAMBDA {
                                  const int part = row * L >= each, channel = row * L - part * each;
                                  int64_t pixel = begin + first + x;
                                  if (d.two) {
                                      const int y = (first + x) / width, column = (first + x) % width;
                                      pixel = begin + int64_t(2 * y + part) * 2 * width + 2 * column + part;
                                  }
                                  store_some<L>(a.d_x[input] + pixel * d.inputs + channel,
                                                where_positive<L>(load<L>(pixels + int64_t(x) * d.rows + row * L), v),
                                                d.inputs - channel);
                              });
        });
    }

    // --- Results ---

    // Threads' sums in a fixed order.
    float gradient(int64_t at) const {
        float total = 0;
        for (const auto& own : gradients) total += own[at];
        return total;
    }

    void write_weights() const {
        for (int i = 0; i < 2; i++) {
            const int weight = l.preprocess_weight[i];
            this->preprocess_dense(i).each([&](int64_t to, bool odd, int64_t at) {
                a.d_weights[weight + odd][to] = gradient(gradient_at[weight] + at);
            });
        }
        for (const Operation& o : l.operations) {
            for (int stage = 0; stage < o.stages; stage++)
                for (int part = 0; part < 2; part++) {
                    const int weight = o.weight[stage] + part;
                    const int rows = l.edges.size() * (part ? l.c : o.kernel * o.kernel);
                    for (int64_t i = 0; i < rows; i++) {
                        const int64_t line = part ? i / l.c * l.lanes + i % l.c : i;
                        for (int k = 0; k < l.c; k++)
                            a.d_weights[weight][i * l.c + k] = gradient(gradient_at[weight] + line * l.lanes + k);
                    }
                }
            if (o.kind != SKIP) continue;
            const Dense skip = this->skip_dense();
            for (int64_t row = 0; row < l.strided; row++)
                skip.each([&](int64_t to, bool odd, int64_t at) {
                    const int64_t each = int64_t(l.c) * (odd ? l.c - l.c / 2 : l.c / 2);
                    a.d_weights[o.weight[odd]][row * each + to] =
                        gradient(gradient_at[o.weight[0]] + row * skip.rows * skip.columns + at);
                });
        }
    }

    void write_mixing() const {
        for (const Edge& e : l.edges) {
            const float *gate = a.gates + e.index * l.paths, beta = a.beta[e.index];
            double d_beta = 0;
            for (int s = 0; s < l.slices; s++) {
                double others = 0;
                for (int p = 0; p < l.paths; p++) others += p == s ? 0 : gate[p];
                if (others != 0) d_beta += others * pass_sums.over_lanes(e.row * l.slices + s);
            }
            for (int i = 0; i < columns; i++) {
                const Operation& o = l.operations[i];
                const int row = l.result_row(o, e);
                double d = 0;
                if (!this->is_open(e, o.path) || o.kind == NONE) d = 0;
                else if (row < 0) d = pass_sums.over_lanes(e.row * l.slices + o.path);
                else
                    for (int k = 0; k < l.lanes; k++)
                        d += term_sums.of(e.row * columns + i, k) * a.work[l.inverse(row) + k];
                a.d_alpha[e.index * columns + i] = beta * gate[o.path] * d;
                d_beta += gate[o.path] * a.alpha[e.index * columns + i] * d;
            }
            a.d_beta[e.index] = d_beta;
        }
    }
};

}  // namespace FPDARTS_ISA
