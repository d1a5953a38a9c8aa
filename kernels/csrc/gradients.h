// What all phases of a cell's backward share: sums over images, the gradients of normalizations that follow from them, a
// node's gradient, and at the end the gradients of weights, alpha and beta.
#pragma once

#include "engine.h"

namespace FPDARTS_ISA {

template <int V> class Gradients : public Engine<V> {
   protected:
    using Base = Engine<V>;
    using Base::a, Base::l, Base::training, Base::threads;

   public:
    explicit Gradients(const CellArguments& arguments)
        : Base(arguments),
          columns(l.operations.size()),
          node_sums(threads, l.nodes * l.slices, l.lanes),
          term_sums(threads, l.edges.size() * columns, l.lanes),
          pass_sums(threads, l.edges.size() * l.slices, l.lanes),
          between_sums(threads, 2 * l.rows, l.lanes),
          gradients(threads, 0) {
        int64_t at = 0;
        const auto reserve = [&](int64_t floats) { return at += floats, at - floats; };
        for (int i = 0; i < 2; i++) {
            const Dense<V> d = this->preprocess_dense(i);
            gradient_at.push_back(reserve(int64_t(d.rows) * d.columns));
            if (d.two) gradient_at.push_back(gradient_at.back());
        }
        const Dense<V> skip = this->skip_dense();
        for (const Operation& o : l.operations) {
            for (int stage = 0; stage < o.stages; stage++) {
                gradient_at.push_back(reserve(int64_t(l.edges.size()) * o.kernel * o.kernel * l.lanes));
                gradient_at.push_back(reserve(int64_t(l.edges.size()) * l.lanes * l.lanes));
            }
            if (o.kind == SKIP && l.strided)
                gradient_at.insert(gradient_at.end(), 2, reserve(int64_t(l.strided) * skip.rows * skip.columns));
        }
        if (a.d_weights) gradients = WeightSums(threads, at);
    }

    static int64_t scratch(const Layout<V>& l) {
        int64_t two_stages = 0, leaving = 0;
        for (const Operation& o : l.operations) two_stages += o.stages == 2;
        for (const auto& rows : l.leaving) leaving = std::max<int64_t>(leaving, rows.size());
        return (l.nodes * l.slices + two_stages * leaving) * l.out_plane + 2 * l.slices * l.plane;
    }

   protected:
    int columns;
    // Σ ds [node, slice]; Σ ds (raw - mean) [edge, operation]; Σ ds x of what passes as it is [edge, slice]; and of the
    // gradient dy between two stages, or of an input state, Σ dy [row] and Σ dy normalized [rows + row].
    Totals node_sums, term_sums, pass_sums, between_sums;
    WeightSums gradients;
    std::vector<int64_t> gradient_at;  // [weight]

    // --- Where gradients of maps lie in the scratch memory ---

    float* d_node(int node, int slice) const { return a.scratch + (node * l.slices + slice) * l.out_plane; }
    float* d_input(int source, int slice) const {
        return a.scratch + l.nodes * l.slices * l.out_plane + (source * l.slices + slice) * l.plane;
    }
    float* d_between(int i) const {  // of the i-th pair of stages of a source
        return a.scratch + l.nodes * l.slices * l.out_plane + 2 * l.slices * l.plane + i * l.out_plane;
    }

    // --- Gradients of normalizations ---

    // k: what the normalized value is multiplied by.
    template <class Sum, class Product> Factors factors(int row, double k, int pixels, Sum&& sum, Product&& product) const {
        return Factors::of(l.lanes, a.work + l.mean(row), a.work + l.inverse(row), training, double(l.n) * pixels,
                           [=](int) { return k; }, sum, product);
    }
    // Of an operation's result on an edge.
    Factors result_factors(const Edge& e, int column) const {
        const Operation& o = l.operations[column];
        const int row = l.result_row(o, e);
        return factors(
            row, this->scale_of(e, column), l.out_pixels,
            [&](int i) { return node_sums.of(e.node * l.slices + o.path, i); },
            [&](int i) { return term_sums.of(e.row * columns + column, i) * a.work[l.inverse(row) + i]; });
    }
    Factors between_factors(int row, int pixels) const {
        return factors(
            row, 1, pixels, [&](int i) { return between_sums.of(row, i); },
            [&](int i) { return between_sums.of(l.rows + row, i); });
    }
    // Of an input, which was normalized in place.
    Factors input_factors(int row) const {
        Factors f = between_factors(row, l.pixels);
        for (int i = 0; i < l.lanes; i++) f.slope[i] /= a.work[l.inverse(row) + i], f.mean[i] = 0;
        return f;
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

    void reduce(int node, const std::vector<Terms>& terms, int image, int share) {
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
                node_sums.template add<V>(share, node * l.slices + s, b, sum);
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
                        if (row >= first_pass) pass_sums.template add<V>(share, row - first_pass, b, sums[k]);
                        else term_sums.template add<V>(share, row, b, sums[k]);
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

    // --- Results ---

    void write_weights() {
        gradients.gather();
        for (int i = 0; i < 2; i++) {
            const int weight = l.preprocess_weight[i];
            this->preprocess_dense(i).each([&](int64_t to, bool odd, int64_t at) {
                a.d_weights[weight + odd][to] = gradients[gradient_at[weight] + at];
            });
        }
        for (const Operation& o : l.operations) {
            for (int stage = 0; stage < o.stages; stage++)
                for (int part = 0; part < 2; part++) {
                    const int weight = o.weight[stage] + part, lines = part ? l.c : o.kernel * o.kernel;
                    const int padded = part ? l.lanes : lines;
                    float* to = a.d_weights[weight];
                    for (size_t edge = 0; edge < l.edges.size(); edge++) {
                        const float* from = gradients.of(0, gradient_at[weight] + int64_t(edge) * padded * l.lanes);
                        for (int i = 0; i < lines; i++, to += l.c) std::copy_n(from + i * l.lanes, l.c, to);
                    }
                }
            if (o.kind != SKIP) continue;
            const Dense<V> skip = this->skip_dense();
            for (int64_t row = 0; row < l.strided; row++)
                skip.each([&](int64_t to, bool odd, int64_t at) {
                    const int64_t each = int64_t(l.c) * (odd ? l.c - l.c / 2 : l.c / 2);
                    a.d_weights[o.weight[odd]][row * each + to] =
                        gradients[gradient_at[o.weight[0]] + row * skip.rows * skip.columns + at];
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
