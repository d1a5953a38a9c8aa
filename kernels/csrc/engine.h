// What forward and backward of a cell share: threads, packed weights, coefficients, and the tables of normalizations.
#pragma once

#include "matrices.h"
#include "sums.h"

namespace FPDARTS_ISA {

constexpr int64_t KEPT = 1 << 20;  // floats of a result from which on second caches would not keep it anyway

template <int V> class Engine {
   public:
    explicit Engine(const CellArguments& arguments)
        : a(arguments), l(arguments.geometry), training(!arguments.given_mean),
          threads(std::clamp<int64_t>(arguments.threads, 1, std::max(1, l.n))) {
        const int columns = l.operations.size();
        open.resize(l.edges.size() * l.paths);
        scale.resize(l.edges.size() * columns);
        through.resize(l.edges.size() * l.slices);
        passing.resize(through.size());
        for (const Edge& edge : l.edges) {
            const float beta = a.beta[edge.index], *gate = a.gates + edge.index * l.paths;
            for (int p = 0; p < l.paths; p++) {
                open[edge.row * l.paths + p] = gate[p] != 0;
                for (int s = 0; s < l.slices; s++) {
                    if (s == p || gate[p] == 0) continue;
                    through[edge.row * l.slices + s] += beta * gate[p];
                    passing[edge.row * l.slices + s] = true;
                }
            }
            for (int i = 0; i < columns; i++) {
                const Operation& o = l.operations[i];
                scale[edge.row * columns + i] = beta * gate[o.path] * a.alpha[edge.index * columns + i];
                if (o.kind == SKIP && l.result_row(o, edge) < 0 && gate[o.path] != 0) {
                    through[edge.row * l.slices + o.path] += scale[edge.row * columns + i];
                    passing[edge.row * l.slices + o.path] = true;
                }
            }
        }
    }

   protected:
    const CellArguments& a;
    Layout<V> l;
    bool training;
    int threads;
    std::vector<char> open;             // [edge][path]
    std::vector<char> passing;          // [edge][slice], whether anything passes as it is
    std::vector<float> scale, through;  // [edge][operation] of what is normalized, [edge][slice] of what passes as it is

    bool is_open(const Edge& edge, int path) const { return open[edge.row * l.paths + path]; }
    // Whether an operation is computed on any edge that leaves a source.
    bool is_used(const Operation& o, int source) const {
        for (int row : l.leaving[source])
            if (is_open(l.edges[row], o.path)) return true;
        return false;
    }
    bool passes(const Edge& edge, int slice) const { return passing[edge.row * l.slices + slice]; }
    float scale_of(const Edge& edge, int column) const { return scale[edge.row * l.operations.size() + column]; }

    int together(int stride) const { return images_together<V>(l.n, threads, l.blocks, stride, l.out_size[1]); }
    // The ReLU of a map, normalized, into a tile: of as many images as are taken together.
    void fill(float* tile, const Tile& t, int images, const float* map, const Normalization& n) const {
        if constexpr (PACK<V> == SIDE_BY_SIDE) {
            if (images > 1) return fill_side_by_side<V>(tile, t, map, n);
        }
        fill_tile<V>(tile, t, l.blocks, map, n);
    }

    // An operation that is computed, and its packed weights of one stage, of the edges that leave a source.
    struct Used {
        const Operation* o;
        std::vector<float> depthwise, pointwise;  // for as many images as are taken together
        int first = 0;                            // row
        size_t each_depthwise = 0, each_pointwise = 0;

        explicit Used(const Operation& o) : o(&o) {}
        Used(const Engine& engine, const Operation& o, int stage, int source, bool transposed)
            : o(&o), first(engine.l.leaving[source].front()) {
            const Layout<V>& l = engine.l;
            const int edges = l.leaving[source].size(), taps = o.kernel * o.kernel;
            const float* const* w = engine.a.weights + o.weight[stage];
            const int together = engine.together(stage ? 1 : l.stride(source));
            depthwise = PackedWeights<V>::depthwise(w[0] + int64_t(first) * taps * l.c, edges, taps, l.c, l.lanes, false,
                                                    together > 1);
            each_depthwise = depthwise.size() / edges;
            each_pointwise = together * PackedWeights<V>::matrix_size(l.c, l.c);
            pointwise.resize(each_pointwise * edges);
            for (int i = 0; i < edges; i++)
                PackedWeights<V>::product(w[1] + int64_t(first + i) * l.c * l.c, l.c, transposed, together,
                                          &pointwise[each_pointwise * i]);
        }
        StageWeights weights(int row) const {
            return {&depthwise[each_depthwise * (row - first)], &pointwise[each_pointwise * (row - first)]};
        }
    };

    Dense<V> preprocess_dense(int i) const {
        return Dense<V>(l.c, l.shape.wide[i], l.slices, i == 0 && l.shape.factorized);
    }
    Dense<V> skip_dense() const { return Dense<V>(l.c, l.c, 1, true); }

    std::vector<float> preprocess_matrix(int i, const Dense<V>& d, bool transposed) const {
        return d.packed(a.weights[l.preprocess_weight[i]], a.weights[l.preprocess_weight[i] + d.two], transposed);
    }
    std::vector<float> skip_matrix(const Operation& o, const Dense<V>& d, int row, bool transposed) const {
        const int half = l.c / 2;
        return d.packed(a.weights[o.weight[0]] + int64_t(row) * l.c * half,
                        a.weights[o.weight[1]] + int64_t(row) * l.c * (l.c - half), transposed);
    }

    // An image of an input.
    int64_t input_at(const Dense<V>& d, int image) const {
        return int64_t(image) * (d.two ? l.full_pixels : l.pixels) * d.inputs;
    }
    Normalization normalization(int row) const { return {a.work + l.mean(row), a.work + l.inverse(row), nullptr}; }
};

}  // namespace FPDARTS_ISA
