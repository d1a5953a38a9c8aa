// A cell's geometry, and where everything lies in its workspace.
//
// A slice of c = C/K channels is padded to `blocks` blocks of V lanes; a plane holds a slice of all images as
// [image][block][pixel][V]. What is normalized has a row in the table of statistics (CellSpec.statistics), and its raw
// values have a plane, found by that row. Padded lanes hold zeros.
#pragma once

#include <cmath>
#include <vector>

#include "abi.h"
#include "vector.h"

namespace FPDARTS_ISA {

constexpr double EPSILON = 1e-5;  // of every batch normalization
constexpr int64_t CACHED = 8 << 20;  // floats of a workspace beyond which results are stored past the caches
constexpr int MARGIN = 4;         // around a tile: what a dilated 5x5 convolution reaches

enum Kind { NONE, MAXIMUM, AVERAGE, SKIP, CONVOLUTION };

struct Operation {
    Kind kind;
    int kernel, dilation, stages, path;
    int row[2];     // first row of statistics, of each stage
    int weight[2];  // index of its first packed weight, of each stage (a skip: even and odd)

    bool pools() const { return kind == MAXIMUM || kind == AVERAGE; }
    bool factorized(int stride) const { return kind == SKIP && stride == 2; }
};

struct Edge {
    int node, source, index, row;  // index: in edge order; row: in source order
};

struct Shape {
    int64_t images, height, width, channels, partial, nodes, reduction, factorized, wide[2], operations;
};

// Lanes of a cell: the widest that pad c no further than 8 lanes would.
inline int lanes_for(int c) { return WIDEST == 16 && divide_up(c, 16) * 2 == divide_up(c, 8) ? 16 : 8; }

template <int V> struct Layout {
    Shape shape;
    std::vector<Operation> operations;
    std::vector<Edge> edges;                     // in source order
    std::vector<std::vector<int>> leaving, into;  // rows of the edges that leave a state, that enter a node
    int n, c, slices, blocks, lanes, nodes, paths, weights, preprocess_weight[2], rows, strided;
    int size[2], out_size[2], pixels, out_pixels, full_pixels;  // full: of input 0 before a factorized reduction
    int64_t plane, out_plane, raw_at, states_at, bypass_at, normal_at, total;

    explicit Layout(const int64_t* geometry) {
        std::memcpy(&shape, geometry, sizeof shape);
        n = shape.images, slices = shape.partial, c = shape.channels / slices, nodes = shape.nodes;
        blocks = divide_up(c, V), lanes = blocks * V;
        const int stride = shape.reduction ? 2 : 1;
        size[0] = shape.height, size[1] = shape.width;
        out_size[0] = size[0] / stride, out_size[1] = size[1] / stride;
        pixels = size[0] * size[1], out_pixels = out_size[0] * out_size[1];
        full_pixels = pixels * (shape.factorized ? 4 : 1);

        leaving.resize(nodes + 1), into.resize(nodes);
        for (int source = 0; source <= nodes; source++)
            for (int node = std::max(0, source - 1); node < nodes; node++) {
                const int row = edges.size();
                edges.push_back({node, source, node * (node + 3) / 2 + source, row});
                leaving[source].push_back(row), into[node].push_back(row);
            }
        strided = shape.reduction ? leaving[0].size() + leaving[1].size() : 0;

        preprocess_weight[0] = 0, preprocess_weight[1] = shape.factorized ? 2 : 1;
        weights = preprocess_weight[1] + 1, rows = 2 * slices, paths = 0;
        const int64_t* field = geometry + sizeof shape / sizeof(int64_t);
        for (int i = 0; i < shape.operations; i++, field += 5) {
            Operation o{Kind(field[0]), int(field[1]), int(field[2]), int(field[3]), int(field[4]), {0, 0}, {0, 0}};
            for (int stage = 0; stage < o.stages; stage++) {
                o.row[stage] = rows, rows += edges.size();
                o.weight[stage] = weights, weights += 2;
            }
            if (o.pools()) o.row[0] = rows, rows += nodes + 1;
            if (o.kind == SKIP && strided) {
                o.row[0] = rows, rows += strided;
                o.weight[0] = weights, o.weight[1] = weights + 1, weights += 2;
            }
            operations.push_back(o);
            paths = std::max(paths, o.path + 1);
        }

        plane = int64_t(n) * blocks * pixels * V, out_plane = int64_t(n) * blocks * out_pixels * V;
        raw_at = 2 * slices * plane;
        states_at = raw_at + (rows - 2 * slices) * out_plane;
        bypass_at = states_at + (nodes - 1) * slices * out_plane;
        normal_at = bypass_at + (strided ? 2 * slices * out_plane : 0);
        total = normal_at + 2 * rows * lanes;
    }

    int stride(int source) const { return shape.reduction && source < 2 ? 2 : 1; }
    const int* size_of(int source) const { return source < 2 ? size : out_size; }
    int pixels_of(int source) const { return source < 2 ? pixels : out_pixels; }
    // Where an image of a plane begins.
    int64_t image(int i, int map_pixels) const { return int64_t(i) * blocks * map_pixels * V; }

    // The inputs' rows are normalized in place: they are the states 0 and 1.
    int64_t raw(int row) const {
        const int inputs = 2 * slices;
        return row < inputs ? row * plane : raw_at + (row - inputs) * out_plane;
    }
    int64_t state(int source, int slice) const {
        return source < 2 ? raw(source * slices + slice) : states_at + ((source - 2) * slices + slice) * out_plane;
    }
    int64_t bypass(int source, int slice) const {  // what of a state passes an edge as it is
        return stride(source) == 2 ? bypass_at + (source * slices + slice) * out_plane : state(source, slice);
    }
    int64_t mean(int row) const { return normal_at + row * lanes; }
    int64_t inverse(int row) const { return normal_at + (rows + row) * lanes; }

    bool past_caches() const { return total > CACHED; }

    // The row whose normalization an operation's result on an edge has; -1: it is not normalized.
    int result_row(const Operation& o, const Edge& edge) const {
        if (o.kind == CONVOLUTION) return o.row[o.stages - 1] + edge.row;
        if (o.pools()) return o.row[0] + edge.source;
        if (o.factorized(stride(edge.source))) return o.row[0] + edge.row;
        return -1;
    }
};

}  // namespace FPDARTS_ISA
