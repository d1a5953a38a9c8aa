// Forward of a derived cell. State by state: its sum (of a node), then the first stages of all edges that leave it, then
// the second ones; poolings, drop-path and identities are done where a node adds.
#pragma once

#include "derived.h"

namespace FPDARTS_ISA {

template <int V> class DerivedForward : public Derived<V> {
    using Base = Derived<V>;
    using Base::a, Base::l, Base::training, Base::threads;
    using typename Base::Packed;

   public:
    explicit DerivedForward(const CellArguments& arguments) : Base(arguments), moments(threads, l.rows, l.lanes) {}

    void run() {
        if (!training)
            for (int row = 0; row < l.rows; row++)
                write_tables(row, [&](int k) { return a.given_mean[row * l.c + k]; },
                             [&](int k) { return a.given_variance[row * l.c + k]; });
        for (int i = 0; i < 2; i++) preprocess(i);
        for (int state = 0; state < l.nodes + 2; state++) {
            if (l.leaving[state].empty()) continue;
            first_stages(state);
            second_stages(state);
        }
        std::vector<int> last;  // nodes that no edge has read
        for (int state = 2; state < l.nodes + 2; state++)
            if (l.leaving[state].empty() && l.place[state] >= 0) last.push_back(state);
        for_images(l.n, threads, [&] {
            const NodeBuffers buffer(l);
            return [&, buffer](int image, int) {
                for (int state : last) node(state, image, buffer);
            };
        });
    }

   private:
    Moments moments;

    template <class Mean, class Variance> void write_tables(int row, Mean&& mean, Variance&& variance) {
        const float *scale = a.weights[l.scale_weight[row]], *shift = a.weights[l.scale_weight[row] + 1];
        for (int k = 0; k < l.lanes; k++) {
            const bool real = k < l.c;
            const double inverse = 1 / std::sqrt((real ? double(variance(k)) : 1) + EPSILON);
            a.work[l.table(0, row) + k] = real ? mean(k) : 0;
            a.work[l.table(1, row) + k] = inverse;
            a.work[l.table(2, row) + k] = real ? scale[k] * inverse : 0;
            a.work[l.table(3, row) + k] = real ? shift[k] : 0;
        }
    }
    // The batch's statistics of a row, once all images have been seen.
    void finish(int row) {
        if (!training) return;
        std::vector<double> means(l.lanes), variances(l.lanes);
        moments.each(row, [&](int k, double mean, double m2, double count) {
            means[k] = mean, variances[k] = m2 / count;
            if (k < l.c) a.mean[row * l.c + k] = mean, a.variance[row * l.c + k] = m2 / (count - 1);
        });
        write_tables(row, [&](int k) { return means[k]; }, [&](int k) { return variances[k]; });
    }
    void merge(int share, int row, const MapMoments<V>* found) {
        for (int b = 0; b < l.blocks; b++) moments.template merge<V>(share, row, b, found[b].mean, found[b].m2, found[b].count);
    }

    template <class Gather>
    void dense(const Dense<V>& d, const float* w, int map, int row, int image, int share, const DenseBuffers<V>& buffer,
               Gather&& gather) {
        float* to = this->raw(row, image);
        dense_forward<V>(d, w, map, training, buffer, gather, [&](int b) { return to + int64_t(b) * map * V; });
        if (training) merge(share, row, buffer.moments);
    }

    void preprocess(int i) {
        const Dense<V> d = this->preprocess_dense(i);
        const auto w = this->packed(d, l.preprocess_weight[i], false);
        for_images(l.n, threads, [&] {
            const DenseBuffers<V> buffer(d);
            return [&, buffer](int image, int share) {
                const float* from = a.x[i] + this->input_at(d, image);
                dense(d, w.data(), l.pixels, i, image, share, buffer,
                      [&](int first, int count) { d.gather_pixels(from, l.size[1], first, count, buffer.pixels); });
            };
        });
        finish(i);
    }

    // One edge's stage of an image, from a tile.
    void stage(const DerivedEdge& e, int which, const float* tile, const Tile& t, const Packed& w, int image, int share,
               ForwardBuffers<V>& buffer, MapMoments<V>* found) {
        specialized(e.kernel, e.dilation, which ? 1 : e.stride, [&](auto k, auto d, auto s) {
            stage_forward<V, k, d, s>(tile, t, w.get(), l.blocks, this->raw(e.row[which], image), buffer,
                                      training ? found : nullptr);
        });
        if (training) merge(share, e.row[which], found);
    }

    void first_stages(int state) {
        const int height = l.size_of(state)[0], width = l.size_of(state)[1];
        std::vector<const DerivedEdge*> edges;
        std::vector<Packed> convolutions;
        std::vector<std::vector<float>> skips;
        const Dense<V> skip = this->skip_dense();
        int stride = 1;
        for (int i : l.leaving[state]) {
            const DerivedEdge& e = l.edges[i];
            if (e.result_row() < 0) continue;
            edges.push_back(&e), stride = e.stride;
            if (e.factorized()) skips.push_back(this->packed(skip, e.weight[0], false));
            else convolutions.emplace_back(*this, e, 0, false);
        }
        if (edges.empty() && state < 2) return;
        const Tile t(height, width, MARGIN, stride);
        for_images(l.n, threads, [&] {
            const NodeBuffers node_buffer(l);
            const DenseBuffers<V> products(skip);
            float* tile = arena().take(l.blocks * t.pixels() * V);
            ForwardBuffers<V> buffer(l.out_size[1], l.blocks, l.past_caches() ? l.blocks : 0);
            MapMoments<V>* found = MapMoments<V>::take(l.blocks);
            return [&, node_buffer, products, tile, buffer, found](int image, int share) mutable {
                if (state >= 2) node(state, image, node_buffer);
                const float* map = this->state(state, image);
                if (!convolutions.empty()) fill_tile<V>(tile, t, l.blocks, map, this->reading(state));
                size_t skipped = 0, convolved = 0;
                for (const DerivedEdge* e : edges) {
                    if (e->factorized()) {
                        dense(skip, skips[skipped++].data(), l.out_pixels, e->row[0], image, share, products,
                              [&](int first, int count) {
                                  skip.gather_map(map, this->reading(state), height, width, first, count, products.pixels);
                              });
                    } else {
                        stage(*e, 0, tile, t, convolutions[convolved++], image, share, buffer, found);
                    }
                }
            };
        });
        for (const DerivedEdge* e : edges) finish(e->row[0]);
    }

    void second_stages(int state) {
        std::vector<const DerivedEdge*> edges;
        std::vector<Packed> weights;
        for (int i : l.leaving[state])
            if (l.edges[i].kind == CONVOLUTION && l.edges[i].stages == 2) {
                edges.push_back(&l.edges[i]);
                weights.emplace_back(*this, l.edges[i], 1, false);
            }
        if (edges.empty()) return;
        const Tile t(l.out_size[0], l.out_size[1], MARGIN, 1);
        for_images(l.n, threads, [&] {
            float* tile = arena().take(l.blocks * t.pixels() * V);
            ForwardBuffers<V> buffer(t.width, l.blocks, l.past_caches() ? l.blocks : 0);
            MapMoments<V>* found = MapMoments<V>::take(l.blocks);
            return [&, tile, buffer, found](int image, int share) mutable {
                for (size_t i = 0; i < edges.size(); i++) {
                    const int before = edges[i]->row[0];
                    fill_tile<V>(tile, t, l.blocks, this->raw(before, image), this->normalization(before));
                    stage(*edges[i], 1, tile, t, weights[i], image, share, buffer, found);
                }
            };
        });
        for (const DerivedEdge* e : edges) finish(e->row[1]);
    }

    struct NodeBuffers {
        float *tile[2], *pooled[2];
        explicit NodeBuffers(const DerivedLayout<V>& l) {
            for (int i = 0; i < 2; i++) {
                tile[i] = arena().take(Tile(l.size[0], l.size[1], 1, 1).pixels() * V);
                pooled[i] = arena().take(l.out_pixels * V);
            }
        }
    };

    // One image of a node: the sum of its two edges, into its plane if edges read it, and its channels of the output.
    void node(int state, int image, const NodeBuffers& buffer) {
        const int map = l.out_pixels, wide = l.wide();
        const bool kept = l.state_at[state] >= 0, told = l.place[state] >= 0;
        float* plane = kept ? a.work + l.state_at[state] + l.image(image, map) : nullptr;
        float* out = told ? a.out + int64_t(image) * map * wide + l.place[state] * l.c : nullptr;
        for (int b = 0; b < l.blocks; b++) {
            const Term first = term(2 * (state - 2), b, image, buffer.tile[0], buffer.pooled[0]);
            const Term second = term(2 * (state - 2) + 1, b, image, buffer.tile[1], buffer.pooled[1]);
            float* to = kept ? plane + int64_t(b) * map * V : buffer.pooled[0];  // a term's value is read before
            over_pixels<V>(map, [&](int i, auto lanes) {
                constexpr int L = lanes;
                store<L>(to + i * V, first.template at<L>(i) + second.template at<L>(i));
            });
            if (!told) continue;
            for (int i = 0; i < map; i++)
                store_some<V>(out + int64_t(i) * wide + b * V, load<V>(to + i * V), l.c - b * V);
        }
    }

    struct Term {  // a block of an edge's result: (map - mean) scale + shift, times what drop-path says
        const float* map;
        typename Normalization::Block<V> normalization;
        float path_scale;
        template <int L> INLINE Vec<L> at(int i) const {
            return normalization.template apply<L>(load<L>(map + i * V)) * path_scale;
        }
    };
    Term term(int edge, int b, int image, float* tile, float* pooled) const {
        const DerivedEdge& e = l.edges[edge];
        const float path_scale = this->path_scale(e, image);
        const int64_t at = int64_t(b) * l.out_pixels * V;
        if (e.pools()) {
            const Tile t(l.size_of(e.source)[0], l.size_of(e.source)[1], 1, 1);
            std::fill_n(tile, t.pixels() * V, e.kind == MAXIMUM ? -INFINITY : 0.0f);
            this->fill_pool(tile, t, e.source, b, image);
            if (e.kind == MAXIMUM) pool_map<V, true>(tile, t, e.stride, pooled);
            else pool_map<V, false>(tile, t, e.stride, pooled);
            return {pooled, Normalization().block<V>(0), path_scale};
        }
        if (e.identity()) return {this->state(e.source, image) + at, this->reading(e.source).template block<V>(b), 1};
        const int row = e.result_row();
        return {this->raw(row, image) + at, this->normalization(row).template block<V>(b), path_scale};
    }
};

}  // namespace FPDARTS_ISA
