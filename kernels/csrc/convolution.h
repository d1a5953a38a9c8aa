// The inner loops: depthwise and pointwise convolution of rows, and their gradients. Maps are blocked: V channels of a
// pixel lie together, then the pixels of a row. Rows are computed PIXELS at a time, so that what they write has room for
// padded(width) pixels, and what they read is zero behind the map's end.
#pragma once

#include "vector.h"

namespace FPDARTS_ISA {

// T vectors of one row.
template <int V, int M, int K, int D, int S, bool FLIP, bool ADD, int T>
INLINE void depthwise_tile(const float* __restrict in, long pitch, const float* __restrict w, int w_step,
                           float* __restrict out) {
    constexpr int L = V * M, STEP = S * M;
    static_assert(S == 1 || M == 1, "pixels of one vector lie side by side");
    Vec<L> sum[T];
    UNROLL for (int t = 0; t < T; t++) sum[t] = ADD ? load<L>(out + t * L) : Vec<L>{};
    _Pragma("GCC unroll 1") for (int ky = 0; ky < K; ky++) {
        const float* row = in + ky * D * pitch;
        Vec<L> tap[K];
        UNROLL for (int kx = 0; kx < K; kx++) {
            const int i = ky * K + kx;
            tap[kx] = load<L>(w + (FLIP ? K * K - 1 - i : i) * w_step);
        }
        UNROLL for (int kx = 0; kx < K; kx++) {
            UNROLL for (int t = 0; t < T; t++) sum[t] += tap[kx] * load<L>(row + (t * STEP + kx * D) * V);
        }
    }
    UNROLL for (int t = 0; t < T; t++) store<L>(out + t * L, sum[t]);
}

// out[x] (+)= sum over taps w[tap] * in[x * S + kx * D], one row. FLIP reads the taps backwards, for gradients.
template <int V, int K, int D, int S, bool FLIP, bool ADD>
INLINE void depthwise_row(const float* __restrict in, long pitch, const float* __restrict w, int w_step,
                          float* __restrict out, int width) {
    constexpr int M = S == 1 ? PACK<V> : 1;
    int x = 0;
    if constexpr (M > 1) {
        for (; x + PIXELS < width; x += M * PIXELS)
            depthwise_tile<V, M, K, D, S, FLIP, ADD, PIXELS>(in + x * S * V, pitch, w, w_step, out + x * V);
    }
    for (; x < width; x += PIXELS)
        depthwise_tile<V, M, K, D, S, FLIP, ADD, PIXELS / M>(in + x * S * V, pitch, w, w_step, out + x * V);
}

// Gradient of a stride-2 depthwise convolution for input pixels (2y + PY, 2x + PX) of one y: of the taps only those of
// one parity reach them. Returns false, having written nothing, where none does. d is where (y, 0) lies.
template <int V, int K, int D, int PY, int PX>
INLINE bool depthwise_parity_row(const float* __restrict d, long pitch, const float* __restrict w, int w_step,
                                 float* __restrict out, int width) {
    constexpr int P = D * (K / 2);
    if (D == 2 && (PY || PX)) return false;
    for (int x = 0; x < width; x += PIXELS) {
        Vec<V> sum[PIXELS];
        UNROLL for (int t = 0; t < PIXELS; t++) sum[t] = Vec<V>{};
        UNROLL for (int ky = 0; ky < K; ky++) {
            if ((PY + P - ky * D) % 2) continue;
            UNROLL for (int kx = 0; kx < K; kx++) {
                if ((PX + P - kx * D) % 2) continue;
                const Vec<V> tap = load<V>(w + (ky * K + kx) * w_step);
                const float* from = d + (PY + P - ky * D) / 2 * pitch + (x + (PX + P - kx * D) / 2) * V;
                UNROLL for (int t = 0; t < PIXELS; t++) sum[t] += tap * load<V>(from + t * V);
            }
        }
        UNROLL for (int t = 0; t < PIXELS; t++) store<V>(out + (x + t) * V, sum[t]);
    }
    return true;
}

template <int V, int K, int D, int S, int ROWS>
INLINE void depthwise_weight_rows(const float* in, long pitch, const float* d, long d_pitch, int height, int width,
                                  int first, float* out, int out_step) {
    constexpr int M = S == 1 ? PACK<V> : 1, L = V * M;
    Vec<L> sum[ROWS * K];
    UNROLL for (int i = 0; i < ROWS * K; i++) sum[i] = Vec<L>{};
    in += first * D * pitch;
    for (int y = 0; y < height; y++) {
        const float *from = in + y * S * pitch, *g = d + y * d_pitch;
        for (int x = 0; x < width; x += M, from += S * L, g += L) {  // behind an odd width the gradient is zero
            // The compiler would carry loads over to the next pixel, run out of registers and spill.
            asm volatile("" : "+r"(from), "+r"(g));
            const Vec<L> gradient = load<L>(g);
            UNROLL for (int ky = 0; ky < ROWS; ky++) {
                UNROLL for (int kx = 0; kx < K; kx++)
                    sum[ky * K + kx] += gradient * load<L>(from + ky * D * pitch + kx * D * V);
            }
        }
    }
    UNROLL for (int i = 0; i < ROWS * K; i++) add_to<V>(out + (first * K + i) * out_step, folded<V, L>(sum[i]));
}

// out[tap] += sum over a map's pixels of gradient * what the tap saw.
template <int V, int K, int D, int S>
INLINE void depthwise_weight(const float* in, long pitch, const float* d, long d_pitch, int height, int width,
                             float* out, int out_step) {
    if constexpr (K == 3 || REGISTERS == 32) {
        depthwise_weight_rows<V, K, D, S, K>(in, pitch, d, d_pitch, height, width, 0, out, out_step);
    } else {  // 25 sums do not fit 16 registers
        depthwise_weight_rows<V, K, D, S, 2>(in, pitch, d, d_pitch, height, width, 0, out, out_step);
        depthwise_weight_rows<V, K, D, S, 2>(in, pitch, d, d_pitch, height, width, 2, out, out_step);
        depthwise_weight_rows<V, K, D, S, 1>(in, pitch, d, d_pitch, height, width, 4, out, out_step);
    }
}

// A row of pixels times a matrix, of which OUT blocks of columns are computed for P pixels at a time: take(x, block,
// value) gets each. in: blocks of V inputs `block` apart, in each the pixels `step` apart. w: [column block][input][V],
// `column` apart.
template <int V, int OUT, int P, class Take>
INLINE void pointwise_row(const float* __restrict in, long block, long step, int blocks, const float* __restrict w,
                          long column, int width, Take&& take) {
    for (int x = 0; x < width; x += P) {
        Vec<V> sum[P][OUT];
        UNROLL for (int t = 0; t < P; t++) {
            UNROLL for (int o = 0; o < OUT; o++) sum[t][o] = Vec<V>{};
        }
        for (int b = 0; b < blocks; b++) {
            const float *pixel = in + b * block + x * step, *row = w + b * V * V;
            _Pragma("GCC unroll 4") for (int i = 0; i < V; i++) {
                Vec<V> weight[OUT];
                UNROLL for (int o = 0; o < OUT; o++) weight[o] = load<V>(row + o * column + i * V);
                UNROLL for (int t = 0; t < P; t++) {
                    const float value = pixel[t * step + i];
                    UNROLL for (int o = 0; o < OUT; o++) sum[t][o] += value * weight[o];
                }
            }
        }
        if (width - x >= P) {
            UNROLL for (int t = 0; t < P; t++) {
                UNROLL for (int o = 0; o < OUT; o++) take(x + t, o, sum[t][o]);
            }
        } else {
            UNROLL for (int t = 0; t < P; t++) {
                if (t < width - x) {
                    UNROLL for (int o = 0; o < OUT; o++) take(x + t, o, sum[t][o]);
                }
            }
        }
    }
}

// Blocks of columns that share what is loaded: as many as leave room in the registers. f(first, how many as a constant).
template <class F> INLINE void over_columns(int columns, F&& f) {
    int o = 0;
    for (; o + 3 <= columns; o += 3) f(o, Constant<3>{});
    if (columns - o == 2) f(o, Constant<2>{});
    else if (columns - o == 1) f(o, Constant<1>{});
}

// All column blocks; take(x, column block, value).
template <int V, class Take>
INLINE void pointwise_rows(const float* in, long block, long step, int blocks, const float* w, long column, int columns,
                           int width, Take&& take) {
    over_columns(columns, [&](int o, auto count) INLINE_LAMBDA {
        constexpr int OUT = count, P = OUT == 1 || REGISTERS == 32 ? PIXELS : 4;
        pointwise_row<V, OUT, P>(in, block, step, blocks, w + o * column, column, width,
                                 [&](int x, int i, Vec<V> v) INLINE_LAMBDA { take(x, o + i, v); });
    });
}

template <int V, int IN, int OUT>
INLINE void outer_tile(const float* __restrict a, long a_step, const float* __restrict d, long d_block, long d_step,
                       int pixels, float* __restrict out, long out_step) {
    Vec<V> sum[IN][OUT];
    UNROLL for (int i = 0; i < IN; i++) {
        UNROLL for (int o = 0; o < OUT; o++) sum[i][o] = Vec<V>{};
    }
    for (int x = 0; x < pixels; x++, a += a_step, d += d_step) {
        Vec<V> gradient[OUT];
        UNROLL for (int o = 0; o < OUT; o++) gradient[o] = load<V>(d + o * d_block);
        UNROLL for (int i = 0; i < IN; i++) {
            const float value = a[i];
            UNROLL for (int o = 0; o < OUT; o++) sum[i][o] += value * gradient[o];
        }
    }
    UNROLL for (int i = 0; i < IN; i++) {
        UNROLL for (int o = 0; o < OUT; o++) add_to<V>(out + i * out_step + o * V, sum[i][o]);
    }
}

// out[input][column] += sum over pixels a[input] * d[column]: `rows` blocks of inputs, `columns` blocks of columns.
template <int V>
INLINE void outer(const float* a, long a_block, long a_step, int rows, const float* d, long d_block, long d_step,
                  int columns, int pixels, float* out, long out_step) {
    over_columns(columns, [&](int o, auto count) INLINE_LAMBDA {
        constexpr int OUT = count, IN = OUT == 1 ? (REGISTERS == 32 ? V : 8) : REGISTERS == 32 ? 8 : 4;
        for (int b = 0; b < rows; b++)
            for (int i = 0; i < V; i += IN)
                outer_tile<V, IN, OUT>(a + b * a_block + i, a_step, d + o * d_block, d_block, d_step, pixels,
                                       out + (b * V + i) * out_step + o * V, out_step);
    });
}

}  // namespace FPDARTS_ISA
