// The stem of CIFAR networks: a 3x3 convolution of images of three channels, and its affine normalization. The raw result
// is never stored: what follows from it, statistics and gradients, follows from sums over patches x (27 values a pixel and
// a one). raw = W x, so that Σ raw = W Σ x, Σ raw² = W (Σ x xᵀ) Wᵀ and Σ g raw = W (Σ x g); and the gradient of W, which is
// Σ x d_raw with d_raw = a g + b raw + c, is a Σ x g + b (Σ x xᵀ) Wᵀ + c Σ x. So that images far from 0 cost no digits,
// their inputs' means are subtracted first (from the padding as well), which changes raw by a constant.
#pragma once

#include <array>

#include "engine.h"

namespace FPDARTS_ISA {

class Stem {
    static constexpr int INPUTS = 3, KERNEL = 3, RUN = KERNEL * INPUTS, TAPS = KERNEL * RUN;
    static constexpr int ONE = TAPS, ROWS = 32;  // of a patch: its values, a one, zeros
    static constexpr int MEANS = ONE + 1;        // the row of the sums, otherwise zeros, with what was subtracted
    static constexpr int PATCHES = 2 * CHUNK;    // at a time: few enough for float32 sums of them to be exact to 1e-7
    static constexpr int L = WIDEST;

    const StemArguments& a;
    int n, height, width, c, lanes, threads;
    double pixels;  // of the batch

   public:
    explicit Stem(const StemArguments& arguments)
        : a(arguments), n(a.images), height(a.height), width(a.width), c(a.channels), lanes(divide_up(c, L) * L),
          threads(std::clamp<int64_t>(a.threads, 1, std::max(1, n))), pixels(double(n) * height * width) {}

    void forward() {
        if (!a.given_mean) take_sums();
        std::vector<float> matrix(size_t(ROWS) * lanes), packed(matrix.size());
        for (int o = 0; o < c; o++) {
            const double mean = a.given_mean ? a.given_mean[o] - constant(o) : centred_mean(o);
            const double variance = a.given_mean ? a.given_variance[o] : centred_variance(o);
            const double inverse = 1 / std::sqrt(variance + EPSILON), factor = a.scale[o] * inverse;
            a.mean[o] = mean + constant(o), a.inverse[o] = inverse;
            a.variance[o] = a.given_mean ? variance : variance * (pixels / (pixels - 1));
            for (int k = 0; k < TAPS; k++) matrix[k * lanes + o] = factor * weight(o, k);
            matrix[ONE * lanes + o] = a.shift[o] - mean * factor;
        }
        PackedWeights<L>::matrix(matrix.data(), ROWS, lanes, false, packed.data());
        const bool past = c == lanes && int64_t(n) * height * width * c >= KEPT;
        for_images(n, threads, [&] {
            const Patches patches(*this);
            return [&, patches](int image, int) {
                float* to = a.out + int64_t(image) * height * width * c;
                patches.each(a.x, image, [&](int first, int count) {
                    pointwise_rows<L>(patches.rows, L, ROWS, ROWS / L, packed.data(), long(ROWS) * L, lanes / L, count,
                                      [=](int x, int block, Vec<L> v) INLINE_LAMBDA {
                                          float* p = to + int64_t(first + x) * c + block * L;
                                          if (past) store_past<L>(p, v);
                                          else store_some<L>(p, v, c - block * L);
                                      });
                });
            };
        });
    }

    void backward() {
        std::vector<std::vector<double>> own(Shares::count(threads), std::vector<double>(size_t(ROWS) * lanes));
        for_images(n, threads, [&] {
            const Patches patches(*this);
            float *g = arena().take(PATCHES * lanes), *sums = arena().take(ROWS * lanes);
            return [&, patches, g, sums](int image, int share) {
                const float* from = a.d_out + int64_t(image) * height * width * c;
                patches.each(a.x, image, [&](int first, int count) {
                    take_pixels(from + int64_t(first) * c, count, g);
                    patches.products(g, lanes, count, sums, own[share].data());
                });
            };
        });
        for (size_t i = 1; i < own.size(); i++) add(own[i].data(), ROWS * lanes, own[0].data());
        for (int o = 0; o < c; o++) write_gradients(o, own[0].data() + o);
    }

   private:
    double weight(int o, int k) const { return a.weight[o * TAPS + k]; }

    // Of a channel of the raw result: what the subtraction took from it, then of the rest.
    double constant(int o) const {
        double sum = 0;
        for (int k = 0; k < TAPS; k++) sum += weight(o, k) * subtracted(k);
        return sum;
    }
    double centred_mean(int o) const {
        double sum = 0;
        for (int k = 0; k < TAPS; k++) sum += weight(o, k) * a.sums[ONE * ROWS + k] / pixels;
        return sum;
    }
    double centred_variance(int o) const {
        double sum = 0;
        for (int k = 0; k < TAPS; k++) sum += weight(o, k) * covariance(o, k) / pixels;
        return std::max(0.0, sum);
    }
    double subtracted(int k) const { return a.sums[MEANS * ROWS + k % INPUTS]; }
    // Σ x_k (raw - mean), of a channel.
    double covariance(int o, int k) const {
        double sum = 0;
        for (int j = 0; j < TAPS; j++) sum += weight(o, j) * a.sums[j * ROWS + k];
        return sum;
    }

    // products: Σ x g, [row][lanes], of a channel.
    void write_gradients(int o, const double* products) const {
        const double sum = products[ONE * lanes], inverse = a.inverse[o], factor = a.scale[o] * inverse;
        double product = (a.given_mean ? -a.mean[o] : -centred_mean(o)) * sum;  // Σ g (raw - mean)
        for (int k = 0; k < TAPS; k++) product += weight(o, k) * products[k * lanes];
        a.d_scale[o] = inverse * product, a.d_shift[o] = sum;
        for (int k = 0; k < TAPS; k++) {
            double d = products[k * lanes];
            if (!a.given_mean)
                d -= sum * a.sums[ONE * ROWS + k] / pixels + inverse * inverse * product / pixels * covariance(o, k);
            a.d_weight[o * TAPS + k] = factor * d;
        }
    }

    // Σ x xᵀ about the means of x, and Σ x, which is the row of the one.
    void take_sums() {
        take_means();
        std::vector<std::vector<double>> own(Shares::count(threads), std::vector<double>(ROWS * ROWS));
        for_images(n, threads, [&] {
            const Patches patches(*this);
            float* sums = arena().take(ROWS * ROWS);
            return [&, patches, sums](int image, int share) {
                patches.each(a.x, image, [&](int, int count) {
                    patches.products(patches.rows, ROWS, count, sums, own[share].data());
                });
            };
        });
        for (const auto& share : own) add(share.data(), ROWS * ROWS, a.sums);
        const double* sum = a.sums + ONE * ROWS;
        for (int j = 0; j < TAPS; j++)
            for (int k = 0; k < TAPS; k++) a.sums[j * ROWS + k] -= sum[j] * sum[k] / pixels;
    }
    void take_means() {
        std::vector<std::array<double, INPUTS>> own(Shares::count(threads));
        for_images(n, threads, [&] {
            return [&](int image, int share) {
                const float* from = a.x + int64_t(image) * height * width * INPUTS;
                for (int i = 0; i < height * width; i++)
                    for (int k = 0; k < INPUTS; k++) own[share][k] += from[i * INPUTS + k];
            };
        });
        for (int k = 0; k < INPUTS; k++) {
            double sum = 0;
            for (const auto& share : own) sum += share[k];
            a.sums[MEANS * ROWS + k] = float(sum / pixels);  // as it is subtracted
        }
    }

    template <class From> static void add(const From* from, int count, double* to) {
        for (int i = 0; i < count; i++) to[i] += from[i];
    }

    // Pixels of c channels, into rows of `lanes`.
    void take_pixels(const float* from, int count, float* to) const {
        for (int i = 0; i < count; i++, from += c, to += lanes)
            for (int k = 0; k < lanes; k += L) fetch_ahead(from + k), store<L>(to + k, load_some<L>(from + k, c - k));
    }

    struct Patches {  // of a thread
        int height, width;
        float mean[INPUTS];
        float *image, *rows;  // with a margin; [pixel][ROWS]

        explicit Patches(const Stem& stem)
            : height(stem.height), width(stem.width), image(arena().take((height + 2) * pitch() + RUN)),
              rows(arena().take(PATCHES * ROWS)) {
            for (int k = 0; k < INPUTS; k++) mean[k] = stem.subtracted(k);
            for (int i = 0; i < (height + 2) * pitch(); i++) image[i] = -mean[i % INPUTS];
            for (int i = 0; i < PATCHES; i++) rows[i * ROWS + ONE] = 1;
        }
        int pitch() const { return (width + 2) * INPUTS; }

        // f(first pixel, how many) of each PATCHES pixels of an image, whose patches are then in `rows`.
        template <class F> void each(const float* x, int index, F&& f) const {
            x += int64_t(index) * height * width * INPUTS;
            for (int y = 0; y < height; y++) {
                float* to = image + (y + 1) * pitch() + INPUTS;
                for (int i = 0; i < width; i++)
                    for (int k = 0; k < INPUTS; k++) to[i * INPUTS + k] = *x++ - mean[k];
            }
            int count = 0, first = 0;
            for (int y = 0; y < height; y++)
                for (int column = 0; column < width; column++) {
                    take(image + y * pitch() + column * INPUTS, rows + count * ROWS);
                    if (++count < PATCHES && first + count < height * width) continue;
                    f(first, count);
                    first += count, count = 0;
                }
        }
        INLINE void take(const float* from, float* to) const {
            static_assert(RUN == 9, "a vector of 8 and one more");
            UNROLL for (int i = 0; i < KERNEL; i++) {
                store<8>(to + i * RUN, load<8>(from + i * pitch()));
                to[i * RUN + 8] = from[i * pitch() + 8];
            }
        }
        // Adds the patches' products with pixels of `columns` values. sums: scratch memory for as many.
        void products(const float* with, int columns, int count, float* sums, double* to) const {
            std::fill_n(sums, ROWS * columns, 0.0f);
            outer<L>(rows, L, ROWS, ROWS / L, with, L, columns, columns / L, count, sums, columns);
            add(sums, ROWS * columns, to);
        }
    };
};

}  // namespace FPDARTS_ISA
