// What forward and backward of a cell share: threads, packed weights, coefficients, and the tables of normalizations.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cell.h"
#include "stage.h"

namespace FPDARTS_ISA {

// f(thread, image) for all images; a thread's share is a run of them, so that sums have one order for one thread count.
template <class F> void for_images(int images, int threads, F&& f) {
#pragma omp parallel num_threads(threads)
    {
        int thread = 0, all = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        arena().reset();
        auto work = f(thread);
        const int64_t n = images;
        for (int i = n * thread / all; i < n * (thread + 1) / all; i++) work(i);
    }
}

// Mean and summed squared deviation of rows of channels, gathered by each thread for itself.
class Moments {
   public:
    Moments(int threads, int rows, int lanes)
        : threads(threads), rows(rows), lanes(lanes), counts(threads * rows), values(size_t(threads) * rows * 2 * lanes) {}

    // One image's sums about `shift`, of a block of V channels. Merging (Chan et al., 1979) keeps the digits that the
    // difference of large sums of squares would lose.
    template <int V> void merge(int thread, int row, int block, Vec<V> shift, Vec<V> sum, Vec<V> squares, int count) {
        const int cell = thread * rows + row;
        double *mean = &values[size_t(cell) * 2 * lanes + block * V], *m2 = mean + lanes;
        const double before = counts[cell] - (block ? count : 0), total = before + count;
        if (block == 0) counts[cell] += count;
        for (int l = 0; l < V; l++)
            merge_one(mean[l], m2[l], before, shift[l] + double(sum[l]) / count,
                      squares[l] - double(sum[l]) * sum[l] / count, count, total);
    }

    // Over all threads: take(lane, mean, summed squared deviation, count) gets each lane's.
    template <class Take> void each(int row, Take&& take) const {
        for (int l = 0; l < lanes; l++) {
            double mean = 0, m2 = 0, count = 0;
            for (int t = 0; t < threads; t++) {
                const int cell = t * rows + row;
                if (!counts[cell]) continue;
                const double* own = &values[size_t(cell) * 2 * lanes];
                merge_one(mean, m2, count, own[l], own[lanes + l], counts[cell], count + counts[cell]);
                count += counts[cell];
            }
            take(l, mean, m2, count);
        }
    }

   private:
    static void merge_one(double& mean, double& m2, double before, double other, double other_m2, double count,
                          double total) {
        const double delta = other - mean;
        mean += delta * count / total;
        m2 += other_m2 + delta * delta * before * count / total;
    }
    int threads, rows, lanes;
    std::vector<double> counts, values;
};

// Weights in the order that the inner loops read them, padded to blocks.
template <int V> struct PackedWeights {
    // [row][tap][block][copy][V]: as many copies as pixels are in a vector
    static std::vector<float> depthwise(const float* w, int rows, int taps, int c, int lanes) {
        constexpr int COPIES = PACK<V>;
        std::vector<float> out(size_t(rows) * taps * lanes * COPIES);
        for (int i = 0; i < rows * taps; i++)
            for (int k = 0; k < c; k++)
                for (int copy = 0; copy < COPIES; copy++)
                    out[(size_t(i) * lanes + k / V * V) * COPIES + copy * V + k % V] = w[int64_t(i) * c + k];
        return out;
    }
    // (inputs, outputs) -> [output block][input][V]; `transposed`: of the matrix's transpose.
    static void matrix(const float* w, int inputs, int outputs, bool transposed, float* out) {
        const int from = transposed ? outputs : inputs, to = transposed ? inputs : outputs;
        const int column = divide_up(from, V) * V;
        for (int i = 0; i < from; i++)
            for (int o = 0; o < to; o++)
                out[(int64_t(o / V) * column + i) * V + o % V] = transposed ? w[o * outputs + i] : w[i * outputs + o];
    }
    static size_t matrix_size(int from, int to) { return size_t(divide_up(to, V)) * V * divide_up(from, V) * V; }
};

template <int V> class Engine {
   public:
    Engine(const CellArguments& arguments, bool training)
        : a(arguments), l(arguments.geometry), training(training), threads(std::max<int64_t>(1, arguments.threads)) {
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

    // An operation that is computed, and its packed weights of one stage, of all edges.
    struct Used {
        const Operation* o;
        std::vector<float> depthwise, pointwise;
        size_t each_depthwise = 0, each_pointwise = 0;

        explicit Used(const Operation& o) : o(&o) {}
        Used(const Engine& engine, const Operation& o, int stage, bool transposed) : o(&o) {
            const Layout<V>& l = engine.l;
            const int edges = l.edges.size(), taps = o.kernel * o.kernel;
            const float* const* w = engine.a.weights + o.weight[stage];
            depthwise = PackedWeights<V>::depthwise(w[0], edges, taps, l.c, l.lanes);
            each_depthwise = depthwise.size() / edges, each_pointwise = PackedWeights<V>::matrix_size(l.c, l.c);
            pointwise.resize(each_pointwise * edges);
            for (int row = 0; row < edges; row++)
                PackedWeights<V>::matrix(w[1] + int64_t(row) * l.c * l.c, l.c, l.c, transposed, &pointwise[each_pointwise * row]);
        }
        StageWeights weights(int row) const { return {&depthwise[each_depthwise * row], &pointwise[each_pointwise * row]}; }
    };

    // The 1x1 convolutions over plain pixels: preprocessing, and strided skips. A factorized reduction reads an even
    // and an odd pixel as one: the matrix [even 0; 0 odd] makes it a convolution like the other.
    // Rows: inputs, padded to blocks, of the one or of both pixels. Columns: `groups` slices of c channels, padded.
    struct Dense {
        int inputs, groups, columns, block, rows;
        bool two;  // pixels

        Dense(const Layout<V>& l, int inputs, int groups, bool two)
            : inputs(inputs), groups(groups), columns(groups * l.lanes), block(columns % WIDEST ? V : WIDEST),
              rows(divide_up(inputs, block) * block * (1 + two)), two(two), c(l.c), lanes(l.lanes) {}

        // f with the lanes of a block of rows or columns as a constant.
        template <class F> void with_block(F&& f) const {
            if (block == V) f(Constant<V>{});
            else f(Constant<WIDEST>{});
        }

        // f(packed index into even or odd, whether odd, index into the matrix)
        template <class F> void each(F&& f) const {
            const int outputs = groups * c, half = two ? outputs / 2 : outputs;
            for (int i = 0; i < inputs; i++)
                for (int o = 0; o < outputs; o++) {
                    const bool odd = o >= half;
                    const int64_t at = odd ? int64_t(i) * (outputs - half) + o - half : int64_t(i) * half + o;
                    f(at, odd, int64_t(odd * rows / 2 + i) * columns + o / c * lanes + o % c);
                }
        }
        // The matrix, or its transpose, as pointwise_rows reads it.
        std::vector<float> packed(const float* even, const float* odd, bool transposed) const {
            std::vector<float> matrix(size_t(rows) * columns), out(matrix.size());
            each([&](int64_t at, bool is_odd, int64_t to) { matrix[to] = (is_odd ? odd : even)[at]; });
            with_block([&](auto lanes) {
                PackedWeights<lanes>::matrix(matrix.data(), rows, columns, transposed, out.data());
            });
            return out;
        }

       private:
        int c, lanes;
    };
    Dense preprocess_dense(int i) const {
        return Dense(l, l.shape.wide[i], l.slices, i == 0 && l.shape.factorized);
    }
    Dense skip_dense() const { return Dense(l, l.c, 1, true); }

    std::vector<float> preprocess_matrix(int i, const Dense& d, bool transposed) const {
        return d.packed(a.weights[l.preprocess_weight[i]], a.weights[l.preprocess_weight[i] + d.two], transposed);
    }
    std::vector<float> skip_matrix(const Operation& o, const Dense& d, int row, bool transposed) const {
        const int half = l.c / 2;
        return d.packed(a.weights[o.weight[0]] + int64_t(row) * l.c * half,
                        a.weights[o.weight[1]] + int64_t(row) * l.c * (l.c - half), transposed);
    }

    // ReLU of `count` pixels of an input of one image from pixel `first` on, as rows of the matrix product.
    void gather_input(const Dense& d, int input, int image, int first, int count, float* out) const {
        const int wide = d.inputs, each = d.rows / (1 + d.two), width = l.size[1];
        const int64_t begin = int64_t(image) * (d.two ? l.full_pixels : l.pixels);
        for (int i = 0; i < count; i++)
            for (int part = 0; part <= d.two; part++, out += each) {
                int64_t pixel = begin + first + i;
                if (d.two) {
                    const int y = (first + i) / width, x = (first + i) % width;
                    pixel = begin + int64_t(2 * y + part) * 2 * width + 2 * x + part;
                }
                const float* from = a.x[input] + pixel * wide;
                int k = 0;
                for (; k + V <= wide; k += V) store<V>(out + k, relu<V>(load<V>(from + k)));
                for (; k < wide; k++) out[k] = from[k] < 0 ? 0 : from[k];
            }
    }
    // The same of a state's slice, the even and the odd pixels of two rows and columns.
    void gather_skip(const Dense& d, const float* state, int height, int width, int first, int count, float* out) const {
        for (int i = 0; i < count; i++)
            for (int part = 0; part < 2; part++, out += d.rows / 2)
                for (int b = 0; b < l.blocks; b++) {
                    const int y = (first + i) / (width / 2) * 2 + part, x = (first + i) % (width / 2) * 2 + part;
                    store<V>(out + b * V, relu<V>(load<V>(state + (int64_t(b) * height * width + y * width + x) * V)));
                }
    }

    // ReLU of a slice, normalized before it if a row is given, into a tile.
    void fill(float* tile, const Tile& t, const float* map, const float* mean, const float* inverse) const {
        for (int b = 0; b < l.blocks; b++) {
            const Spread<V> m(mean ? load<V>(mean + b * V) : Vec<V>{});
            const Spread<V> r(mean ? load<V>(inverse + b * V) : Vec<V>{} + 1.0f);
            for (int y = 0; y < t.height; y++) {
                float* to = tile + (int64_t(b) * t.pixels() + t.at(y, 0)) * V;
                const float* from = map + (int64_t(b) * t.height + y) * t.width * V;
                over_pixels<V>(t.width, [=](int x, auto lanes) {
                    constexpr int L = lanes;
                    store<L>(to + x * V, relu<L>((load<L>(from + x * V) - m.template as<L>()) * r.template as<L>()));
                });
            }
        }
    }
};

}  // namespace FPDARTS_ISA
