// A cell of a derived network: its geometry, where everything lies in its workspace, and what forward and backward share.
//
// Maps lie as in a cell of the search, all C channels in one slice. What is normalized has a row in the table of
// statistics (DerivedCellSpec.normalizations) and a plane of raw values; the affine normalization is done where a map is
// read, so the states 0 and 1 are their raw planes. Of the other states only those are stored that an edge reads.
#pragma once

#include "matrices.h"
#include "sums.h"

namespace FPDARTS_ISA {

struct DerivedShape {
    int64_t images, height, width, channels, reduction, factorized, wide[2], edges, concat;
};

struct DerivedEdge {
    Kind kind;
    int kernel, dilation, stages, source;
    bool live;  // the cell's output depends on it
    int index, node, stride;
    int row[2], weight[2];  // of each stage
    bool identity() const { return kind == SKIP && stride == 1; }
    bool factorized() const { return kind == SKIP && stride == 2; }
    bool pools() const { return kind == MAXIMUM || kind == AVERAGE; }
    int result_row() const { return kind == CONVOLUTION ? row[stages - 1] : factorized() ? row[0] : -1; }
};

// Lanes of a derived cell: most of its time goes into products of two such sides, where 8 were faster
// if 16 pad further (timed at C = 36).
inline int derived_lanes_for(int c) {
    const int wide = divide_up(c, 16) * 16, narrow = divide_up(c, 8) * 8;
    return WIDEST == 16 && wide * wide < 1.2 * narrow * narrow ? 16 : 8;
}

template <int V> struct DerivedLayout {
    DerivedShape shape;
    std::vector<DerivedEdge> edges;
    std::vector<std::vector<int>> leaving;  // indices of the edges that leave a state
    std::vector<int> place;                 // of a state among those that are concatenated, or -1
    std::vector<int> scale_weight;          // [row], its scale among the weights; the shift lies behind it
    std::vector<int64_t> raw_at, state_at;  // [row], [state]
    int n, c, blocks, lanes, nodes, weights = 0, rows = 0, preprocess_weight[2];
    int size[2], out_size[2], pixels, out_pixels, full_pixels;
    int64_t plane, out_plane, tables_at, total = 0;

    explicit DerivedLayout(const int64_t* geometry) {
        std::memcpy(&shape, geometry, sizeof shape);
        n = shape.images, c = shape.channels, nodes = shape.edges / 2;
        blocks = divide_up(c, V), lanes = blocks * V;
        size[0] = shape.height, size[1] = shape.width;
        for (int i = 0; i < 2; i++) out_size[i] = size[i] / (shape.reduction ? 2 : 1);
        pixels = size[0] * size[1], out_pixels = out_size[0] * out_size[1];
        full_pixels = pixels * (shape.factorized ? 4 : 1);
        plane = int64_t(n) * blocks * pixels * V, out_plane = int64_t(n) * blocks * out_pixels * V;

        for (int i = 0; i < 2; i++) {
            preprocess_weight[i] = weights, weights += i == 0 && shape.factorized ? 2 : 1;
            add_row(plane);
        }
        leaving.resize(nodes + 2);
        const int64_t* field = geometry + sizeof shape / sizeof(int64_t);
        for (int i = 0; i < shape.edges; i++, field += 6) {
            DerivedEdge e{Kind(field[0]), int(field[1]), int(field[2]), int(field[3]), int(field[4]), field[5] != 0,
                          i, i / 2, shape.reduction && field[4] < 2 ? 2 : 1, {0, 0}, {0, 0}};
            for (int stage = 0; stage < (e.factorized() ? 1 : e.stages); stage++) {
                e.weight[stage] = weights, weights += 2;
                e.row[stage] = add_row(out_plane);
            }
            leaving[e.source].push_back(i);
            edges.push_back(e);
        }
        place.assign(nodes + 2, -1), state_at.assign(nodes + 2, -1);
        for (int i = 0; i < shape.concat; i++) place[field[i]] = i;
        for (int state = 0; state < nodes + 2; state++) {
            if (state < 2) state_at[state] = raw_at[state];
            else if (!leaving[state].empty()) state_at[state] = total, total += out_plane;
        }
        tables_at = total;
        total += int64_t(4) * rows * lanes;
    }

    const int* size_of(int state) const { return state < 2 ? size : out_size; }
    int pixels_of(int state) const { return state < 2 ? pixels : out_pixels; }
    int64_t image(int i, int map_pixels) const { return int64_t(i) * blocks * map_pixels * V; }
    int wide() const { return shape.concat * c; }  // channels of the output
    // Tables, [lanes] a row: mean, 1 / deviation, scale / deviation, shift.
    int64_t table(int which, int row) const { return tables_at + (int64_t(which) * rows + row) * lanes; }
    bool past_caches() const { return total > CACHED; }
    // What backward goes along.
    std::vector<int> live_leaving(int state) const {
        std::vector<int> live;
        for (int i : leaving[state])
            if (edges[i].live) live.push_back(i);
        return live;
    }
    bool is_live(int state) const { return place[state] >= 0 || !live_leaving(state).empty(); }

   private:
    int add_row(int64_t floats) {
        scale_weight.push_back(weights), weights += 2;
        raw_at.push_back(total), total += floats;
        return rows++;
    }
};

template <int V> class Derived {
   public:
    Derived(const CellArguments& arguments)
        : a(arguments), l(arguments.geometry), training(!arguments.given_mean),
          threads(std::clamp<int64_t>(arguments.threads, 1, std::max(1, l.n))) {}

   protected:
    const CellArguments& a;
    DerivedLayout<V> l;
    bool training;
    int threads;

    Dense<V> preprocess_dense(int i) const {
        return Dense<V>(l.c, l.shape.wide[i], 1, i == 0 && l.shape.factorized, true);
    }
    Dense<V> skip_dense() const { return Dense<V>(l.c, l.c, 1, true, true); }
    std::vector<float> packed(const Dense<V>& d, int weight, bool transposed) const {
        return d.packed(a.weights[weight], a.weights[weight + d.two], transposed);
    }
    int64_t input_at(const Dense<V>& d, int image) const {
        return int64_t(image) * (d.two ? l.full_pixels : l.pixels) * d.inputs;
    }

    // A stage's packed weights; as forward reads them, or transposed for backward.
    struct Packed {
        std::vector<float> depthwise, pointwise;
        Packed(const Derived& cell, const DerivedEdge& e, int stage, bool backward) {
            const auto& l = cell.l;
            const float* const* w = cell.a.weights + e.weight[stage];
            depthwise = PackedWeights<V>::depthwise(w[0], 1, e.kernel * e.kernel, l.c, l.lanes, true);
            pointwise.resize(PackedWeights<V>::matrix_size(l.c, l.c));
            PackedWeights<V>::matrix(w[1], l.c, l.c, !backward, pointwise.data());  // given as (outputs, inputs)
        }
        StageWeights get() const { return {depthwise.data(), pointwise.data()}; }
    };

    Normalization normalization(int row) const {
        return {a.work + l.table(0, row), a.work + l.table(2, row), a.work + l.table(3, row)};
    }
    // What makes a state of its plane.
    Normalization reading(int state) const { return state < 2 ? normalization(state) : Normalization(); }
    const float* state(int state, int image) const {
        return a.work + l.state_at[state] + l.image(image, l.pixels_of(state));
    }
    float* raw(int row, int image) const {
        return a.work + l.raw_at[row] + l.image(image, row < 2 ? l.pixels : l.out_pixels);
    }
    // What drop-path multiplies an edge's result by; an identity is not dropped.
    float path_scale(const DerivedEdge& e, int image) const {
        return a.path_scales && !e.identity() ? a.path_scales[int64_t(e.index) * l.n + image] : 1;
    }
    // A block of a state, normalized, into a tile for pooling.
    void fill_pool(float* tile, const Tile& t, int source, int block, int image) const {
        const Normalization n = reading(source);
        const int64_t skipped = int64_t(block) * V;
        const float* map = state(source, image) + int64_t(block) * l.pixels_of(source) * V;
        fill_tile<V, false>(tile, t, 1, map,
                            n.mean ? Normalization{n.mean + skipped, n.scale + skipped, n.shift + skipped} : n);
    }
};

}  // namespace FPDARTS_ISA
