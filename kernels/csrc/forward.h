// A cell's forward. Source by source: its state (normalized inputs, or a node's sum), poolings and first stages of all
// edges that leave it, second stages; then the last node. Nothing normalized but the states is ever stored.
#pragma once

#include "engine.h"

namespace FPDARTS_ISA {

constexpr int NODE_CHUNK = 256;  // pixels of a node at a time: runs of its planes that are long enough to be fetched ahead

template <int V> class Forward : public Engine<V> {
    using Base = Engine<V>;
    using Base::a, Base::l, Base::training, Base::threads;
    using typename Base::Used;

   public:
    explicit Forward(const CellArguments& arguments)
        : Base(arguments), moments(threads, l.rows, l.lanes) {}

    void run() {
        if (training) std::fill_n(a.updated, l.rows * l.c, 0.0f);
        else take_given();
        preprocess();
        for (int source = 0; source <= l.nodes; source++) {
            first_stages(source);
            second_stages(source);
        }
        const Sum sum = node_sum(l.nodes - 1);
        for_images(l.n, threads, [&] {
            const NodeBuffers buffer(l);
            return [&, buffer](int image, int) { node(l.nodes - 1, sum, image, buffer); };
        });
    }

   private:
    Moments moments;

    void take_given() {
        for (int row = 0; row < l.rows; row++)
            for (int k = 0; k < l.lanes; k++) {
                const bool real = k < l.c;
                a.work[l.mean(row) + k] = real ? a.given_mean[row * l.c + k] : 0;
                const double variance = real ? a.given_variance[row * l.c + k] : 1;
                a.work[l.inverse(row) + k] = 1 / std::sqrt(variance + EPSILON);
            }
    }

    // The batch's statistics of a row, once all images have been seen.
    void finish(int row) {
        if (!training) return;
        std::fill_n(a.updated + row * l.c, l.c, 1.0f);
        moments.each(row, [&](int k, double mean, double m2, double count) {
            a.work[l.mean(row) + k] = mean;
            a.work[l.inverse(row) + k] = 1 / std::sqrt(m2 / count + EPSILON);
            if (k < l.c) {
                a.mean[row * l.c + k] = mean;
                a.variance[row * l.c + k] = m2 / (count - 1);
            }
        });
    }

    void merge(int share, int row, int block, const MapMoments<V>& found) {
        moments.template merge<V>(share, row, block, found.mean, found.m2, found.count);
    }

    void preprocess() {
        for (int i = 0; i < 2; i++) {
            const Dense<V> d = this->preprocess_dense(i);
            const auto w = this->preprocess_matrix(i, d, false);
            for_images(l.n, threads, [&] {
                const DenseBuffers<V> buffer(d);
                return [&, buffer](int image, int share) {
                    const float* from = a.x[i] + this->input_at(d, image);
                    dense(d, w.data(), l.pixels, i * l.slices, image, share, buffer, [&](int first, int count) {
                        d.gather_pixels(from, l.size[1], first, count, buffer.pixels);
                    });
                };
            });
            for (int s = 0; s < l.slices; s++) finish(i * l.slices + s);
        }
    }

    // One image's matrix products, into the planes of `row` and the rows behind it.
    template <class Gather>
    void dense(const Dense<V>& d, const float* w, int map, int row, int image, int share, const DenseBuffers<V>& buffer,
               Gather&& gather) {
        dense_forward<V>(d, w, map, training, buffer, gather, [&](int column) {
            return a.work + l.raw(row + column / l.blocks) + l.image(image, map) + int64_t(column % l.blocks) * map * V;
        });
        if (!training) return;
        for (int column = 0; column < d.columns / V; column++)
            merge(share, row + column / l.blocks, column % l.blocks, buffer.moments[column]);
    }

    // Of one edge, and of the images from `image` on that are taken together: one behind the other.
    template <int K, int D, int S>
    void stage(const float* tile, const Tile& t, StageWeights w, int row, int image, int images, int share,
               ForwardBuffers<V>& buffer, MapMoments<V>* found) {
        const int map = l.out_pixels;
        with_images<V, S>(images, l.blocks, [&](auto lanes, auto together, int blocks) {
            stage_forward<lanes, K, D, S, together>(tile, t, w, blocks, a.work + l.raw(row) + l.image(image, map), buffer,
                                                    training ? found : nullptr);
        });
        if (!training) return;
        for (int b = 0; b < images * l.blocks; b++) merge(share, row, b % l.blocks, found[b]);
    }

    void first_stages(int source) {
        const int stride = l.stride(source), height = l.size_of(source)[0], width = l.size_of(source)[1];
        const Tile t(height, width, MARGIN, stride), around(height, width, 1, 1);
        std::vector<Used> used;
        std::vector<std::vector<float>> skip_weights;
        const Dense<V> skip = this->skip_dense();
        for (const Operation& o : l.operations) {
            if (!this->is_used(o, source)) continue;
            if (o.kind == CONVOLUTION) used.push_back(Used(*this, o, 0, source, false));
            else used.push_back(Used(o));
            if (o.factorized(stride))
                for (int row : l.leaving[source]) skip_weights.push_back(this->skip_matrix(o, skip, row, false));
        }
        const Sum sum = source < 2 ? Sum() : node_sum(source - 2);
        const int images = this->together(stride);

        for_images(l.n / images, threads, [&] {
            const NodeBuffers node_buffer(l);
            float* tile = arena().take(images * l.blocks * t.pixels() * V);
            float* pooled = arena().take(around.pixels() * V);
            ForwardBuffers<V> buffer(l.out_size[1], images * l.blocks, l.past_caches() ? images * l.blocks : 0);
            const DenseBuffers<V> products(skip);
            MapMoments<V>* found = MapMoments<V>::take(images * l.blocks);
            return [&, node_buffer, tile, pooled, buffer, products, found](int group, int share) mutable {
                const int image = group * images;  // the first one
                for (int i = image; i < image + images; i++) {
                    if (source < 2) normalize_input(source, i);
                    else node(source - 2, sum, i, node_buffer);
                }
                for (int slice = 0; slice < l.slices; slice++) {
                    const float* map = a.work + l.state(source, slice) + l.image(image, height * width);
                    if (stride == 2) halve(source, slice, map, image);
                    bool filled = false;
                    for (const Used& u : used) {
                        if (u.o->path != slice) continue;
                        for (int i = 0; i < images && u.o->pools(); i++)
                            pool(*u.o, source, map + l.image(i, height * width), around, image + i, share, pooled);
                        if (u.o->kind != CONVOLUTION && !u.o->factorized(stride)) continue;
                        if (u.o->kind == CONVOLUTION && !filled) this->fill(tile, t, images, map, {}), filled = true;
                        for (int row : l.leaving[source]) {
                            const Edge& e = l.edges[row];
                            if (!this->is_open(e, slice)) continue;
                            if (u.o->kind == SKIP) {
                                const auto& w = skip_weights[row - l.leaving[source].front()];
                                dense(skip, w.data(), l.out_pixels, u.o->row[0] + row, image, share, products,
                                      [&](int first, int count) {
                                          skip.gather_map(map, {}, height, width, first, count, products.pixels);
                                      });
                                continue;
                            }
                            specialized(u.o->kernel, u.o->dilation, stride, [&](auto k, auto d, auto s) {
                                stage<k, d, s>(tile, t, u.weights(row), u.o->row[0] + row, image, images, share, buffer,
                                               found);
                            });
                        }
                    }
                }
            };
        });
        for (const Used& u : used) {
            if (u.o->pools()) finish(u.o->row[0] + source);
            if (u.o->kind != CONVOLUTION && !u.o->factorized(stride)) continue;
            for (int row : l.leaving[source])
                if (this->is_open(l.edges[row], u.o->path)) finish(u.o->row[0] + row);
        }
    }

    void normalize_input(int source, int image) {
        for (int s = 0; s < l.slices; s++) {
            const int row = source * l.slices + s;
            for (int b = 0; b < l.blocks; b++) {
                float* map = a.work + l.raw(row) + l.image(image, l.pixels) + int64_t(b) * l.pixels * V;
                const Spread<V> mean(load<V>(a.work + l.mean(row) + b * V));
                const Spread<V> inverse(load<V>(a.work + l.inverse(row) + b * V));
                over_pixels<V>(l.pixels, [=](int i, auto lanes) {
                    constexpr int L = lanes;
                    store<L>(map + i * V, (load<L>(map + i * V) - mean.template as<L>()) * inverse.template as<L>());
                });
            }
        }
    }

    void halve(int source, int slice, const float* map, int image) {
        bool needed = false;
        for (int row : l.leaving[source]) needed |= this->passes(l.edges[row], slice);
        if (!needed) return;
        float* to = a.work + l.bypass(source, slice) + l.image(image, l.out_pixels);
        for (int b = 0; b < l.blocks; b++)
            halve_map<V>(map + int64_t(b) * l.pixels * V, l.size[0], l.size[1], to + int64_t(b) * l.out_pixels * V);
    }

    void pool(const Operation& o, int source, const float* map, const Tile& t, int image, int share, float* tile) {
        const bool max = o.kind == MAXIMUM;
        std::fill_n(tile, t.pixels() * V, max ? -INFINITY : 0.0f);
        float* out = a.work + l.raw(o.row[0] + source) + l.image(image, l.out_pixels);
        for (int b = 0; b < l.blocks; b++, out += int64_t(l.out_pixels) * V) {
            copy_into<V>(tile, t, map + int64_t(b) * l.pixels_of(source) * V);
            if (max) pool_map<V, true>(tile, t, l.stride(source), out);
            else pool_map<V, false>(tile, t, l.stride(source), out);
            if (!training) continue;
            MapMoments<V> found;
            found.begin();
            for (int i = 0; i < l.out_pixels; i += CHUNK) found.add(out + int64_t(i) * V, std::min(CHUNK, l.out_pixels - i));
            merge(share, o.row[0] + source, b, found);
        }
    }

    void second_stages(int source) {
        const Tile t(l.out_size[0], l.out_size[1], MARGIN, 1);
        std::vector<Used> used;
        for (const Operation& o : l.operations)
            if (o.kind == CONVOLUTION && o.stages == 2 && this->is_used(o, source))
                used.push_back(Used(*this, o, 1, source, false));
        if (used.empty()) return;
        const int images = this->together(1);
        for_images(l.n / images, threads, [&] {
            float* tile = arena().take(images * l.blocks * t.pixels() * V);
            ForwardBuffers<V> buffer(t.width, images * l.blocks, l.past_caches() ? images * l.blocks : 0);
            MapMoments<V>* found = MapMoments<V>::take(images * l.blocks);
            return [&, tile, buffer, found](int group, int share) mutable {
                const int image = group * images;  // the first one
                for (const Used& u : used)
                    for (int row : l.leaving[source]) {
                        if (!this->is_open(l.edges[row], u.o->path)) continue;
                        const int before = u.o->row[0] + row;
                        this->fill(tile, t, images, a.work + l.raw(before) + l.image(image, l.out_pixels),
                                   this->normalization(before));
                        specialized(u.o->kernel, u.o->dilation, 1, [&](auto k, auto d, auto) {
                            stage<k, d, 1>(tile, t, u.weights(row), u.o->row[1] + row, image, images, share, buffer, found);
                        });
                    }
            };
        });
        for (const Used& u : used)
            for (int row : l.leaving[source])
                if (this->is_open(l.edges[row], u.o->path)) finish(u.o->row[1] + row);
    }

    // A node as weighted planes: of each slice (plane, a coefficient a channel), and what normalization subtracts.
    struct Sum {
        std::vector<std::vector<int64_t>> planes;    // [slice]
        std::vector<std::vector<float>> factors;     // [slice][term][lanes]
        std::vector<std::vector<float>> offset;      // [slice][lanes]
    };
    struct NodeBuffers {
        float *parts, *pixels;
        explicit NodeBuffers(const Layout<V>& l)
            : parts(arena().take(l.slices * NODE_CHUNK * V)), pixels(arena().take(NODE_CHUNK * l.shape.channels)) {}
    };
    Sum node_sum(int node) {
        Sum sum;
        sum.planes.resize(l.slices), sum.factors.resize(l.slices);
        std::vector<std::vector<double>> offset(l.slices, std::vector<double>(l.lanes));
        for (int row : l.into[node]) {
            const Edge& e = l.edges[row];
            for (int s = 0; s < l.slices; s++)
                if (this->passes(e, s)) {
                    sum.planes[s].push_back(l.bypass(e.source, s));
                    sum.factors[s].insert(sum.factors[s].end(), l.lanes, this->through[row * l.slices + s]);
                }
            for (size_t i = 0; i < l.operations.size(); i++) {
                const Operation& o = l.operations[i];
                const int result = l.result_row(o, e);
                if (result < 0 || !this->is_open(e, o.path)) continue;
                sum.planes[o.path].push_back(l.raw(result));
                for (int k = 0; k < l.lanes; k++) {
                    const float factor = this->scale_of(e, i) * a.work[l.inverse(result) + k];
                    sum.factors[o.path].push_back(factor);
                    offset[o.path][k] -= double(factor) * a.work[l.mean(result) + k];
                }
            }
        }
        for (auto& one : offset) sum.offset.emplace_back(one.begin(), one.end());
        return sum;
    }

    // One image of a node: its channels of the output, and their slices, for the edges that leave it.
    void node(int node, const Sum& sum, int image, const NodeBuffers& buffer) {
        const int map = l.out_pixels, channels = l.shape.channels, wide = l.nodes * channels, slices = l.slices, c = l.c;
        const bool past = l.past_caches() && channels % 16 == 0;  // whole lines of the output
        for (int first = 0; first < map; first += NODE_CHUNK) {
            const int count = std::min(NODE_CHUNK, map - first);
            for (int b = 0; b < l.blocks; b++) {
                const int64_t at = l.image(image, map) + (int64_t(b) * map + first) * V;
                for (int s = 0; s < slices; s++) add_terms(sum, s, b, at, count, buffer.parts + s * NODE_CHUNK * V);
                for (int i = 0; i < count; i++)
                    shuffle_pixel<V>(buffer.parts + i * V, NODE_CHUNK * V, slices, b, c, buffer.pixels + i * channels);
            }
            float* out = a.out + (int64_t(image) * map + first) * wide + node * channels;
            for (int i = 0; i < count; i++, out += wide) {
                const float* pixel = buffer.pixels + i * channels;
                if (past) copy_past<V>(out, pixel, channels);
                else __builtin_prefetch(out + NODE_CHUNK * wide, 1), std::copy_n(pixel, channels, out);
            }
            for (int s = 0; s < slices && node < l.nodes - 1; s++)
                for (int b = 0; b < l.blocks; b++) {
                    float* to = a.work + l.state(node + 2, s) + l.image(image, map) + (int64_t(b) * map + first) * V;
                    const float* from = buffer.pixels + s * c + b * V;
                    for (int i = 0; i < count; i++)
                        store<V>(to + i * V, load_some<V>(from + int64_t(i) * channels, c - b * V));
                }
        }
    }

    INLINE void add_terms(const Sum& sum, int slice, int block, int64_t at, int count, float* out) {
        const auto& planes = sum.planes[slice];
        const float* factors = sum.factors[slice].data() + block * V;
        const Vec<V> offset = load<V>(&sum.offset[slice][block * V]);
        const int terms = planes.size();
        for (int i = 0; i < count; i++) store<V>(out + i * V, offset);
        int t = 0;
        for (; t + 4 <= terms; t += 4) add_planes<4>(&planes[t], factors + t * l.lanes, at, count, out);
        for (; t < terms; t++) add_planes<1>(&planes[t], factors + t * l.lanes, at, count, out);
    }
    template <int T> INLINE void add_planes(const int64_t* planes, const float* factors, int64_t at, int count, float* out) {
        const float* from[T];
        UNROLL for (int k = 0; k < T; k++) from[k] = a.work + planes[k] + at;
        const auto factor = [&](int k) { return Spread<V>(load<V>(factors + k * l.lanes)); };
        const Spread<V> own[4] = {factor(0), factor(T > 1), factor(T > 2 ? 2 : 0), factor(T > 3 ? 3 : 0)};
        over_pixels<V>(count, [&](int i, auto lanes) {
            constexpr int L = lanes;
            Vec<L> total = load<L>(out + i * V);
            UNROLL for (int k = 0; k < T; k++) total += own[k].template as<L>() * load<L>(from[k] + i * V);
            store<L>(out + i * V, total);
        });
    }
};

}  // namespace FPDARTS_ISA
