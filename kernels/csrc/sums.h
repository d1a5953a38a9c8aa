// What is gathered over images, by shares, and what follows from it: statistics, gradients of normalizations.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <exception>
#include <memory>
#include <mutex>

#include "cell.h"

namespace FPDARTS_ISA {

// The images in as many runs as there are threads, and one more. A run's images are taken in order, one at a time, by
// whichever thread is free, and what it gathers is the run's own: sums have one order for one number of threads, however
// fast each of them is.
class Shares {
   public:
    static int count(int threads) { return threads == 1 ? 1 : threads + 1; }

    Shares(int images, int threads) : next(count(threads)), end(next.size()), taken(next.size()) {
        const int64_t all = next.size();
        for (int64_t i = 0; i < all; i++) next[i] = images * i / all, end[i] = images * (i + 1) / all;
    }
    // The next image of a run, and the run: `share`, which the thread has had till now, or one that nobody has and that
    // is clearly behind. Changing seldom leaves a run's sums in one core's caches. Returns -1 when there is none.
    int take(int& share, bool first) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!first) taken[share] = false;
        int best = taken[share] ? -1 : share;
        for (int i = 0; i < int(next.size()); i++)
            if (!taken[i] && (best < 0 || 4 * left(i) > 5 * left(best))) best = i;
        if (best < 0 || !left(best)) return -1;
        share = best, taken[share] = true;
        return next[share]++;
    }

   private:
    std::mutex mutex;
    std::vector<int> next, end;
    std::vector<char> taken;
    int left(int i) const { return end[i] - next[i]; }
};

// For all images f()(image, share): f once a thread, for its scratch memory.
template <class F> void for_images(int images, int threads, F&& f) {
    Shares shares(images, threads);
    std::exception_ptr failed;  // none may leave a thread: memory can be short
    std::mutex mutex;
#pragma omp parallel num_threads(threads)
    try {
        int share = 0;
#ifdef _OPENMP
        share = omp_get_thread_num();
#endif
        arena().reset();
        {
            auto work = f();
            bool first = true;
            for (int image; (image = shares.take(share, first)) >= 0; first = false) work(image, share);
        }
        _mm_sfence();  // of what was stored past the caches, up to the end of `work`
    } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        failed = std::current_exception();
    }
    if (failed) std::rethrow_exception(failed);
}

// Mean and summed squared deviation of rows of channels.
class Moments {
   public:
    Moments(int threads, int rows, int lanes)
        : shares(Shares::count(threads)), rows(rows), lanes(lanes), counts(shares * rows),
          values(size_t(shares) * rows * 2 * lanes) {}

    // One image's, of a block of V channels; block 0 first.
    template <int V> void merge(int share, int row, int block, const double (&other)[V], const double (&other_m2)[V],
                                int count) {
        const int cell = share * rows + row;
        double *mean = &values[size_t(cell) * 2 * lanes + block * V], *m2 = mean + lanes;
        const double before = counts[cell] - (block ? count : 0), part = count / (before + count);
        if (block == 0) counts[cell] += count;
        for (int l = 0; l < V; l++) merge_one(mean[l], m2[l], before, other[l], other_m2[l], part);
    }

    // Over all shares: take(lane, mean, summed squared deviation, count) gets each lane's.
    template <class Take> void each(int row, Take&& take) const {
        for (int l = 0; l < lanes; l++) {
            double mean = 0, m2 = 0, count = 0;
            for (int i = 0; i < shares; i++) {
                const int cell = i * rows + row;
                if (!counts[cell]) continue;
                const double* own = &values[size_t(cell) * 2 * lanes];
                merge_one(mean, m2, count, own[l], own[lanes + l], counts[cell] / (count + counts[cell]));
                count += counts[cell];
            }
            take(l, mean, m2, count);
        }
    }

   private:
    // part: of the other's count in all.
    static void merge_one(double& mean, double& m2, double before, double other, double other_m2, double part) {
        const double delta = other - mean;
        mean += delta * part;
        m2 += other_m2 + delta * delta * (before * part);
    }
    int shares, rows, lanes;
    std::vector<double> counts, values;
};

// Sums of channels.
class Totals {
   public:
    Totals(int threads, int rows, int lanes)
        : shares(Shares::count(threads)), rows(rows), lanes(lanes), values(size_t(shares) * rows * lanes) {}
    template <int V> INLINE void add(int share, int row, int block, Vec<V> sum) {
        double* to = &values[(size_t(share) * rows + row) * lanes + block * V];
        for (int k = 0; k < V; k++) to[k] += sum[k];
    }
    double of(int row, int lane) const {
        double total = 0;
        for (int i = 0; i < shares; i++) total += values[(size_t(i) * rows + row) * lanes + lane];
        return total;
    }
    double over_lanes(int row) const {
        double total = 0;
        for (int k = 0; k < lanes; k++) total += of(row, k);
        return total;
    }

   private:
    int shares, rows, lanes;
    std::vector<double> values;
};

// Gradients of weights, padded like what they are gradients of. Empty unless they are needed.
class WeightSums {
   public:
    WeightSums(int threads, int64_t floats) : threads(threads), floats(floats) {
        if (!floats) return;
        own.reset(new float[Shares::count(threads) * floats]);
        for_images(Shares::count(threads), threads, [&] {
            return [&](int share, int) { std::fill_n(of(share, 0), this->floats, 0.0f); };
        });
    }
    float* of(int share, int64_t at) const { return own ? &own[share * floats + at] : nullptr; }
    // Adds all shares' in a fixed order: the first one then has the sums.
    void gather() {
        constexpr int64_t PIECE = 4096;
        for_images(divide_up(floats, PIECE), threads, [&] {
            return [&](int piece, int) {
                const int64_t first = piece * PIECE, last = std::min(floats, first + PIECE);
                for (int share = 1; share < Shares::count(threads); share++)
                    for (int64_t i = first; i < last; i++) own[i] += own[share * floats + i];
            };
        });
    }
    float operator[](int64_t at) const { return own[at]; }

   private:
    int threads;
    int64_t floats;
    std::unique_ptr<float[]> own;  // [share][floats]
};

// The backward of a normalization: d_raw = g factor + (raw - mean) slope + shift, each [lanes].
struct Factors {
    std::vector<float> factor, slope, shift, mean;

    // k(lane): what the normalized value is multiplied by. sum, product: Σ g and Σ g normalized, of a lane, over `count`
    // values. The statistics of evaluation do not depend on the values.
    template <class K, class Sum, class Product>
    static Factors of(int lanes, const float* mean, const float* inverse, bool training, double count, K&& k, Sum&& sum,
                      Product&& product) {
        Factors f;
        for (auto* table : {&f.factor, &f.slope, &f.shift, &f.mean}) table->reserve(lanes);
        for (int i = 0; i < lanes; i++) {
            const double scale = k(i) * double(inverse[i]);
            f.mean.push_back(mean[i]);
            f.factor.push_back(scale);
            f.slope.push_back(training ? -scale * inverse[i] * product(i) / count : 0);
            f.shift.push_back(training ? -scale * sum(i) / count : 0);
        }
        return f;
    }

    // Pixels of one block: g, times `scale`, and raw -> d_raw. draw_rows: to pixels `step` apart.
    template <int V>
    INLINE void draw(int block, const float* g, const float* raw, int count, float* out, float scale = 1) const {
        const Spread<V> by(scale * load<V>(&factor[block * V])), slopes(load<V>(&slope[block * V]));
        const Spread<V> shifts(load<V>(&shift[block * V])), means(load<V>(&mean[block * V]));
        over_pixels<V>(count, [=](int i, auto lanes) {
            constexpr int L = lanes;
            fetch_ahead(g + i * V), fetch_ahead(raw + i * V);
            const Vec<L> centred = load<L>(raw + i * V) - means.template as<L>();
            store<L>(out + i * V, by.template as<L>() * load<L>(g + i * V) +
                                      (slopes.template as<L>() * centred + shifts.template as<L>()));
        });
    }
    // Of two images of one block, the second `image` floats behind the first: side by side. An even count.
    template <int V>
    INLINE void draw_side_by_side(const float* g, const float* raw, int64_t image, int count, float* out) const {
        constexpr int L = SIDE_BY_SIDE * V;
        const Vec<L> by = Spread<V>(load<V>(&factor[0])).all, slopes = Spread<V>(load<V>(&slope[0])).all;
        const Vec<L> shifts = Spread<V>(load<V>(&shift[0])).all, means = Spread<V>(load<V>(&mean[0])).all;
        const auto drawn = [=](int64_t i) INLINE_LAMBDA {
            fetch_ahead(g + i), fetch_ahead(raw + i);
            return by * load<L>(g + i) + (slopes * (load<L>(raw + i) - means) + shifts);
        };
        for (int i = 0; i < count; i += 2) {
            Vec<L> a = drawn(i * V), b = drawn(image + i * V);
            interleave<L>(a, b);
            store<L>(out + i * L, a), store<L>(out + (i + 1) * L, b);
        }
    }
    template <int V>
    INLINE void draw_rows(int block, const float* g, const float* raw, int count, float* out, int step,
                          float scale = 1) const {
        const Vec<V> by = scale * load<V>(&factor[block * V]), slopes = load<V>(&slope[block * V]);
        const Vec<V> shifts = load<V>(&shift[block * V]), means = load<V>(&mean[block * V]);
        for (int i = 0; i < count; i++, fetch_ahead(g + i * V), fetch_ahead(raw + i * V))
            store<V>(out + i * step, by * load<V>(g + i * V) + (slopes * (load<V>(raw + i * V) - means) + shifts));
    }
};

}  // namespace FPDARTS_ISA
