// Weights in the order that the inner loops read them, and the 1x1 convolutions over plain pixels as matrix products:
// preprocessing, and skips of stride 2.
#pragma once

#include "cell.h"
#include "stage.h"

namespace FPDARTS_ISA {

// Padded to blocks.
template <int V> struct PackedWeights {
    // [row][tap][block][copy][V]: as many copies as pixels are in a vector; for images side by side [V][copy]. w:
    // [row][tap][channel], or `by_channel` [row][channel][tap].
    static std::vector<float> depthwise(const float* w, int rows, int taps, int c, int lanes, bool by_channel = false,
                                        bool side_by_side = false) {
        constexpr int COPIES = PACK<V>;
        std::vector<float> out(size_t(rows) * taps * lanes * COPIES);
        const int step = by_channel ? taps : 1, apart = side_by_side ? 1 : V, together = side_by_side ? COPIES : 1;
        for (int row = 0; row < rows; row++, w += int64_t(taps) * c)
            for (int tap = 0; tap < taps; tap++)
                for (int first = 0; first < c; first += V) {
                    const float* from = w + (by_channel ? first * taps + tap : tap * c + first);
                    float* to = &out[((size_t(row) * taps + tap) * lanes + first) * COPIES];
                    for (int copy = 0; copy < COPIES; copy++)
                        for (int k = 0; k < std::min(V, c - first); k++) to[copy * apart + k * together] = from[k * step];
                }
        return out;
    }
    // (inputs, outputs) -> [output block][input][V], PACK inputs side by side for each output; `transposed`: of the
    // matrix's transpose.
    static void matrix(const float* w, int inputs, int outputs, bool transposed, float* out) {
        const int from = transposed ? outputs : inputs, to = transposed ? inputs : outputs;
        const int row = transposed ? 1 : outputs, step = transposed ? outputs : 1;
        constexpr int PAIR = PACK<V>;
        const int64_t column = divide_up(from, V) * V;
        for (int first = 0; first < to; first += V)
            for (int i = 0; i < from; i++) {
                const float* in = w + int64_t(i) * row + int64_t(first) * step;
                float* own = out + first * column + i / PAIR * PAIR * V + i % PAIR;
                for (int o = 0; o < std::min(V, to - first); o++) own[o * PAIR] = in[int64_t(o) * step];
            }
    }
    static size_t matrix_size(int from, int to) { return size_t(divide_up(to, V)) * V * divide_up(from, V) * V; }
    // Of a stage, (c, c), for as many images as are taken together: for those side by side [input][output][copy].
    static void product(const float* w, int c, bool transposed, int images, float* out) {
        if (images == 1) return matrix(w, c, c, transposed, out);
        for (int i = 0; i < c; i++)
            for (int o = 0; o < c; o++)
                for (int copy = 0; copy < images; copy++)
                    out[(i * V + o) * images + copy] = w[transposed ? o * c + i : i * c + o];
    }
};

// A factorized reduction reads an even and an odd pixel as one: the matrix [even 0; 0 odd] makes it a convolution like
// the other. Rows: inputs, padded to blocks, of the one or of both pixels. Columns: `groups` slices of c channels,
// padded. Matrices that are given are (inputs, outputs), or `by_output` (outputs, inputs).
template <int V> struct Dense {
    int inputs, groups, c, lanes, columns, block, rows;
    bool two, by_output;  // two: pixels

    Dense(int c, int inputs, int groups, bool two, bool by_output = false)
        : inputs(inputs), groups(groups), c(c), lanes(divide_up(c, V) * V), columns(groups * lanes),
          block(columns % WIDEST ? V : WIDEST), rows(divide_up(inputs, block) * block * (1 + two)), two(two),
          by_output(by_output) {}

    // f with the lanes of a block of rows or columns as a constant.
    template <class F> void with_block(F&& f) const {
        if (block == V) f(Constant<V>{});
        else f(Constant<WIDEST>{});
    }

    // f(index into even or odd, whether odd, index into the padded matrix)
    template <class F> void each(F&& f) const {
        const int outputs = groups * c, half = two ? outputs / 2 : outputs;
        for (int i = 0; i < inputs; i++)
            for (int group = 0; group < groups; group++)
                for (int k = 0; k < c; k++) {
                    const int o = group * c + k;
                    const bool odd = o >= half;
                    const int own = odd ? o - half : o, all = odd ? outputs - half : half;
                    f(by_output ? int64_t(own) * inputs + i : int64_t(i) * all + own, odd,
                      int64_t(odd * rows / 2 + i) * columns + group * lanes + k);
                }
    }
    // The matrix, or its transpose, as pointwise_rows reads it.
    std::vector<float> packed(const float* even, const float* odd, bool transposed) const {
        std::vector<float> matrix(size_t(rows) * columns), out(matrix.size());
        each([&](int64_t at, bool is_odd, int64_t to) { matrix[to] = (is_odd ? odd : even)[at]; });
        with_block(
            [&](auto lanes) { PackedWeights<lanes>::matrix(matrix.data(), rows, columns, transposed, out.data()); });
        return out;
    }

    // --- CHUNK pixels of an image at a time, from pixel `first` on: rows of the product ---

    // ReLU of an image of `inputs` channels a pixel. width: of the result.
    void gather_pixels(const float* image, int width, int first, int count, float* out) const {
        const int each = rows / (1 + two);
        for (int i = 0; i < count; i++)
            for (int part = 0; part <= two; part++, out += each) {
                const float* from = image + pixel(width, first + i, part) * inputs;
                int k = 0;
                for (; k + V <= inputs; k += V) fetch_ahead(from + k), store<V>(out + k, relu<V>(load<V>(from + k)));
                for (; k < inputs; k++) out[k] = from[k] < 0 ? 0 : from[k];
            }
    }
    // ReLU of a map in blocks, twice as wide as the result.
    void gather_map(const float* map, const Normalization& n, int height, int width, int first, int count,
                    float* out) const {
        const int blocks = lanes / V;
        for (int i = 0; i < count; i++)
            for (int part = 0; part < 2; part++, out += rows / 2)
                for (int b = 0; b < blocks; b++) {
                    const float* from = map + (int64_t(b) * height * width + pixel(width / 2, first + i, part)) * V;
                    store<V>(out + b * V, relu<V>(n.apply<V>(b, load<V>(from))));
                }
    }

    // --- Their gradients. drawn: of the result, rows of `columns`; w: the transpose, packed ---

    // own: the padded matrix's gradient, which is added to.
    void matrix_gradient(const float* pixels, const float* drawn, int count, float* own) const {
        with_block([&](auto lanes) {
            constexpr int L = lanes;
            outer<L>(pixels, L, rows, rows / L, drawn, L, columns, columns / L, count, own, columns);
        });
    }
    // Of an image: where ReLU let it through. Zeros for the pixels that it does not read.
    void image_gradient(const float* w, const float* drawn, const float* pixels, int width, int first, int count,
                        float* d_image, bool past) const {
        const int each = rows / (1 + two);
        past = past && inputs % WIDEST == 0 && reinterpret_cast<uintptr_t>(d_image) % (4 * WIDEST) == 0;
        for (int i = first; i < first + count && two; i++)
            for (const int64_t unread : {pixel(width, i, 0) + 1, pixel(width, i, 1) - 1}) {
                float* to = d_image + unread * inputs;
                if (!past) std::fill_n(to, inputs, 0.0f);
                for (int k = 0; k < inputs && past; k += WIDEST) store_past<WIDEST>(to + k, Vec<WIDEST>{});
            }
        with_block([&](auto lanes) {
            constexpr int L = lanes;
            const auto make = [=](auto&& write) INLINE_LAMBDA {
                pointwise_rows<L>(drawn, L, columns, columns / L, w, long(columns) * L, rows / L, count,
                                  [=](int x, int row, Vec<L> v) INLINE_LAMBDA {
                                      const int part = row * L >= each, channel = row * L - part * each;
                                      write(d_image + pixel(width, first + x, part) * inputs + channel, channel,
                                            where_positive<L>(load<L>(pixels + int64_t(x) * rows + row * L), v));
                                  });
            };
            if (past && L == WIDEST) make([](float* to, int, Vec<L> v) INLINE_LAMBDA { store_past<L>(to, v); });
            else make([=](float* to, int channel, Vec<L> v) INLINE_LAMBDA { store_some<L>(to, v, inputs - channel); });
        });
    }
    // Of a map's ReLU, in rows of padded(width) pixels: added to it.
    void map_gradient(const float* w, const float* drawn, int height, int width, int first, int count,
                      float* d_map) const {
        const int blocks = lanes / V, wide = padded(width);
        pointwise_rows<V>(drawn, V, columns, columns / V, w, long(columns) * V, rows / V, count,
                          [&](int x, int row, Vec<V> v) INLINE_LAMBDA {
                              const int odd = row >= blocks, b = row - odd * blocks;
                              const int y = (first + x) / (width / 2) * 2 + odd;
                              const int column = (first + x) % (width / 2) * 2 + odd;
                              add_to<V>(d_map + ((int64_t(b) * height + y) * wide + column) * V, v);
                          });
    }

   private:
    // Where the i-th pixel of the result, or its even or odd one, lies in the input; width: of the result.
    INLINE int64_t pixel(int width, int i, int odd) const {
        return two ? int64_t(2 * (i / width) + odd) * 2 * width + 2 * (i % width) + odd : i;
    }
};

template <int V> struct DenseBuffers {  // of a thread: rows of the product's two sides, and moments of its columns
    float *pixels, *products;
    MapMoments<V>* moments;
    explicit DenseBuffers(const Dense<V>& d)
        : pixels(arena().take(CHUNK * d.rows)), products(arena().take(CHUNK * d.columns)),
          moments(MapMoments<V>::take(d.columns / V)) {}
};

// One image's products. gather(first, count) fills buffer.pixels; plane(i) is where the result's i-th block of V columns
// goes. buffer.moments are those of each, if they are wanted.
template <int V, class Gather, class Plane>
void dense_forward(const Dense<V>& d, const float* w, int map, bool summed, const DenseBuffers<V>& buffer,
                   Gather&& gather, Plane&& plane) {
    const int columns = d.columns;
    float* products = buffer.products;
    for (int first = 0; first < map; first += CHUNK) {
        const int count = std::min(CHUNK, map - first);
        gather(first, count);
        d.with_block([&](auto lanes) {
            constexpr int L = lanes;
            pointwise_rows<L>(buffer.pixels, L, d.rows, d.rows / L, w, long(d.rows) * L, columns / L, count,
                              [=](int x, int o, Vec<L> v) INLINE_LAMBDA { store<L>(products + x * columns + o * L, v); });
        });
        for (int column = 0; column < columns / V; column++) {
            float* to = plane(column) + int64_t(first) * V;
            for (int i = 0; i < count; i++) store<V>(to + i * V, load<V>(products + i * columns + column * V));
            if (!summed) continue;
            if (first == 0) buffer.moments[column].begin();
            buffer.moments[column].add(to, count);
        }
    }
}

}  // namespace FPDARTS_ISA
