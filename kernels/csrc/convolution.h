// The inner loops: depthwise and pointwise convolution of rows, and their gradients. Maps are blocked: V channels of a
// pixel lie together, then the pixels of a row. Rows are computed PIXELS at a time, so that what they write has room for
// padded(width) pixels, and what they read is zero behind the map's end.
#pragma once

#include "vector.h"

namespace FPDARTS_ISA {

// T vectors of each of R rows, D rows of the map apart. What is loaded of a row serves all outputs that it reaches.
template <int V, int M, int K, int D, int S, bool FLIP, bool ADD, int R, int T>
INLINE void depthwise_tile(const float* __restrict in, long pitch, const float* __restrict w, int w_step,
                           float* __restrict out, long out_pitch) {
    constexpr int L = V * M, STEP = S * M;
    static_assert(S == 1 || (M == 1 && R == 1), "pixels of one vector, and rows, lie side by side");
    Vec<L> sum[R][T];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int t = 0; t < T; t++) sum[r][t] = ADD ? load<L>(out + r * D * out_pitch + t * L) : Vec<L>{};
    }
    UNROLL for (int y = 0; y < K + R - 1; y++, in += D * pitch) {
        // The compiler would load ahead what later rows need, or keep taps for them, run out of registers and spill.
        asm volatile("" : "+r"(in));
        if (R > 1) asm volatile("" : "+r"(w));
        UNROLL for (int kx = 0; kx < K; kx++) {
            Vec<L> seen[T];
            UNROLL for (int t = 0; t < T; t++) seen[t] = load<L>(in + (t * STEP + kx * D) * V);
            UNROLL for (int r = 0; r < R; r++) {
                const int ky = y - r, i = ky * K + kx;
                if (ky < 0 || ky >= K) continue;
                const Vec<L> tap = load<L>(w + (FLIP ? K * K - 1 - i : i) * w_step);
                UNROLL for (int t = 0; t < T; t++) sum[r][t] += tap * seen[t];
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int t = 0; t < T; t++) store<L>(out + r * D * out_pitch + t * L, sum[r][t]);
    }
}

template <int V, int K, int D, int S, bool FLIP, bool ADD, int R>
INLINE void depthwise_band(const float* __restrict in, long pitch, const float* __restrict w, int w_step,
                           float* __restrict out, long out_pitch, int width) {
    constexpr int M = S == 1 ? PACK<V> : 1;
    int x = 0;
    const auto tile = [&](auto vectors) INLINE_LAMBDA {
        depthwise_tile<V, M, K, D, S, FLIP, ADD, R, vectors>(in + x * S * V, pitch, w, w_step, out + x * V, out_pitch);
    };
    if constexpr (M > 1) {
        for (; x + PIXELS < width; x += M * PIXELS) tile(Constant<PIXELS>{});
    }
    constexpr int T = R > 1 && REGISTERS == 16 ? PIXELS / 2 : PIXELS / M;
    for (; x < width; x += T * M) tile(Constant<T>{});
}

// out[y][x] (+)= sum over taps w[tap] * in[y * S + ky * D][x * S + kx * D]. FLIP reads the taps backwards, for
// gradients.
template <int V, int K, int D, int S, bool FLIP, bool ADD>
INLINE void depthwise_rows(const float* __restrict in, long pitch, const float* __restrict w, int w_step,
                           float* __restrict out, long out_pitch, int rows, int width) {
    constexpr int R = S == 1 ? 2 : 1;
    int y = 0;
    if constexpr (R > 1) {
        for (; y + R * D <= rows; y += R * D)
            for (int i = y; i < y + D; i++)
                depthwise_band<V, K, D, S, FLIP, ADD, R>(in + i * pitch, pitch, w, w_step, out + i * out_pitch,
                                                         out_pitch, width);
    }
    for (; y < rows; y++)
        depthwise_band<V, K, D, S, FLIP, ADD, 1>(in + y * S * pitch, pitch, w, w_step, out + y * out_pitch, out_pitch,
                                                 width);
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

// Taps of TALL rows of a kernel, from row `first` on, and R rows of the gradient at a time, D rows of the map apart.
template <int V, int K, int D, int S, int N, int TALL, int R>
INLINE void depthwise_weight_taps(const float* in, long pitch, const float* d, long d_pitch, int rows, int width,
                                  int first, float* out, int out_step) {
    constexpr int M = S == 1 ? PACK<V> : 1, L = V * M, APART = R == 1 ? 1 : D;
    static_assert(S == 1 || R == 1, "rows lie side by side");
    Vec<L> sum[TALL * K];
    UNROLL for (int i = 0; i < TALL * K; i++) sum[i] = Vec<L>{};
    in += first * D * pitch;
    for (int y = 0; y < rows; y += R * APART) {
        for (int i = y; i < y + APART; i++) {
            const float *from = in + i * S * pitch, *g = d + i * d_pitch;
            for (int x = 0; x < width; x += M, from += S * L, g += L) {  // behind an odd width the gradient is zero
                Vec<L> gradient[R];
                UNROLL for (int r = 0; r < R; r++) gradient[r] = load<L>(g + r * APART * d_pitch), hold(gradient[r]);
                const float* line = from;
                UNROLL for (int row = 0; row < TALL + R - 1; row++, line += D * pitch) {
                    // The compiler would carry loads over to the next pixel, run out of registers and spill.
                    asm volatile("" : "+r"(line));
                    UNROLL for (int kx = 0; kx < K; kx++) {
                        Vec<L> seen = load<L>(line + kx * D * V);
                        if (R > 1) hold(seen);
                        UNROLL for (int r = 0; r < R; r++) {
                            const int ky = row - r;
                            if (ky >= 0 && ky < TALL) sum[ky * K + kx] += gradient[r] * seen;
                        }
                    }
                }
            }
        }
    }
    UNROLL for (int i = 0; i < TALL * K; i++)
        add_to<V / N>(out + (first * K + i) * out_step, folded_channels<V, N, L>(sum[i]));
}

// out[tap] += sum over a map's pixels of gradient * what the tap saw; over those of N images side by side.
template <int V, int K, int D, int S, int N>
INLINE void depthwise_weight(const float* in, long pitch, const float* d, long d_pitch, int rows, int width, float* out,
                             int out_step) {
    constexpr int R = S == 1 ? 2 : 1;
    const int together = rows / (R * D) * (R * D);  // the others are taken one by one
    const auto taps = [&](auto tall, int first) INLINE_LAMBDA {
        const auto run = [&](auto r, int from, int count) INLINE_LAMBDA {
            depthwise_weight_taps<V, K, D, S, N, tall, r>(in + from * S * pitch, pitch, d + from * d_pitch, d_pitch, count,
                                                       width, first, out, out_step);
        };
        if (together) run(Constant<R>{}, 0, together);
        if (together < rows) run(Constant<1>{}, together, rows - together);
    };
    if constexpr (K == 3 || REGISTERS == 32) {
        taps(Constant<K>{}, 0);
    } else {  // 25 sums do not fit 16 registers
        taps(Constant<2>{}, 0), taps(Constant<2>{}, 2), taps(Constant<1>{}, 4);
    }
}

// Products of matrices take PACK inputs at once, so that their vectors are as wide as there are: of 8 lanes twice, a pair
// of inputs side by side for each output. What that leaves to add is added at the end.
template <int V> INLINE auto inputs_at(const float* p) {
    if constexpr (PACK<V> == 1) {
        return *p;
    } else {
        static_assert(PACK<V> == 2 && V == 8, "a pair is as long as a double");
        typedef double Doubles __attribute__((vector_size(64)));
        double d;
        std::memcpy(&d, p, sizeof d);
        return (Vec<16>)Doubles{d, d, d, d, d, d, d, d};
    }
}

// A row of pixels times a matrix, of which OUT blocks of columns are computed for P pixels at a time: take(x, block,
// value) gets each, or, of N images side by side, two pixels at a time if it takes two values. in: blocks of V inputs
// `block` apart, in each the pixels `step` apart. w: as PackedWeights::matrix makes it, a block's column `column` apart.
template <int V, int OUT, int P, int N, class Take>
INLINE void pointwise_row(const float* __restrict in, long block, long step, int blocks, const float* __restrict w,
                          long column, int width, Take&& take) {
    constexpr int PAIR = PACK<V>, L = PAIR * V, INPUTS = V / N;
    constexpr bool TWO = std::is_invocable_v<Take, int, int, Vec<V>, Vec<V>>;
    static_assert(PAIR <= 2 && P % 2 == 0, "pixels are added up by two");
    for (int x = 0; x < width; x += P) {
        Vec<L> sum[P][OUT];
        UNROLL for (int t = 0; t < P; t++) {
            UNROLL for (int o = 0; o < OUT; o++) sum[t][o] = Vec<L>{};
        }
        for (int b = 0; b < blocks; b++) {
            const float *pixel = in + b * block + x * step, *row = w + b * INPUTS * V;
            _Pragma("GCC unroll 4") for (int i = 0; i < INPUTS; i += PAIR) {
                Vec<L> weight[OUT];
                UNROLL for (int o = 0; o < OUT; o++) weight[o] = load<L>(row + o * column + i * V);
                UNROLL for (int t = 0; t < P; t++) {
                    const auto value = inputs_at<INPUTS>(pixel + t * step + i * N);
                    UNROLL for (int o = 0; o < OUT; o++) sum[t][o] += value * weight[o];
                }
            }
        }
        const auto give = [&](int count) INLINE_LAMBDA {
            UNROLL for (int o = 0; o < OUT; o++) {
                UNROLL for (int t = 0; t < P; t += TWO ? 2 : PAIR) {
                    if (t >= count) continue;
                    if constexpr (TWO) {
                        take(x + t, o, sum[t][o], sum[t + 1][o]);
                    } else if constexpr (PAIR == 1) {
                        take(x + t, o, sum[t][o]);
                    } else {
                        separate<L>(sum[t][o], sum[t + 1][o]);
                        const Vec<L> both = sum[t][o] + sum[t + 1][o];
                        take(x + t, o, lanes_of<V, 0, L>(both));
                        if (t + 1 < count) take(x + t + 1, o, lanes_of<V, V, L>(both));
                    }
                }
            }
        };
        if (width - x >= P) give(P);
        else give(width - x);
    }
}

// Blocks of columns that share what is loaded: as many as leave room in the registers. f(first, how many as a constant).
template <class F> INLINE void over_columns(int columns, F&& f) {
    int o = 0;
    for (; columns - o == 3 || columns - o > 4; o += 3) f(o, Constant<3>{});
    for (; columns - o >= 2; o += 2) f(o, Constant<2>{});
    if (o < columns) f(o, Constant<1>{});
}

// All column blocks; take(x, column block, value).
template <int V, int N = 1, class Take>
INLINE void pointwise_rows(const float* in, long block, long step, int blocks, const float* w, long column, int columns,
                           int width, Take&& take) {
    over_columns(columns, [&](int o, auto count) INLINE_LAMBDA {
        constexpr int OUT = count, P = OUT == 1 || REGISTERS == 32 ? PIXELS : 4;
        const auto own = [&](int x, int i, auto... values) INLINE_LAMBDA -> decltype(take(x, i, values...)) {
            take(x, o + i, values...);
        };
        pointwise_row<V, OUT, P, N>(in, block, step, blocks, w + o * column, column, width, own);
    });
}

// Reads up to V floats behind the last of d.
template <int V, int IN, int OUT, int CHAINS, int N>
INLINE void outer_tile(const float* __restrict a, long a_step, const float* __restrict d, long d_block, long d_step,
                       int pixels, float* __restrict out, long out_step) {
    constexpr int PAIR = PACK<V>, L = PAIR * V;
    Vec<L> sum[CHAINS][IN / PAIR][OUT];
    UNROLL for (int k = 0; k < CHAINS * IN / PAIR * OUT; k++) (&sum[0][0][0])[k] = Vec<L>{};
    const auto add = [&](int chain) INLINE_LAMBDA {
        Vec<L> gradient[OUT];
        UNROLL for (int o = 0; o < OUT; o++) gradient[o] = repeated<V, L>(load<L>(d + o * d_block));
        UNROLL for (int i = 0; i < IN / PAIR; i++) {
            const auto value = inputs_at<V / N>(a + i * PAIR * N);
            UNROLL for (int o = 0; o < OUT; o++) sum[chain][i][o] += value * gradient[o];
        }
        a += a_step, d += d_step;
    };
    int x = 0;
    for (; x + CHAINS <= pixels; x += CHAINS) {
        UNROLL for (int chain = 0; chain < CHAINS; chain++) add(chain);
    }
    for (; x < pixels; x++) add(0);
    UNROLL for (int i = 0; i < IN / PAIR; i++) {
        UNROLL for (int o = 0; o < OUT; o++) {
            Vec<L> total = sum[0][i][o];
            UNROLL for (int chain = 1; chain < CHAINS; chain++) total += sum[chain][i][o];
            float* to = out + i * PAIR * out_step + o * V / N;
            if constexpr (PAIR == 1) {
                add_to<V / N>(to, folded_channels<V, N, L>(total));
            } else {
                Vec<L> odd = total;
                separate<L>(total, odd);
                add_to<V>(to, lanes_of<V, 0, L>(total)), add_to<V>(to + out_step, lanes_of<V, 0, L>(odd));
            }
        }
    }
}

// out[input][column] += sum over pixels a[input] * d[column]: `rows` blocks of inputs, `columns` blocks of columns.
template <int V, int N = 1>
INLINE void outer(const float* a, long a_block, long a_step, int rows, const float* d, long d_block, long d_step,
                  int columns, int pixels, float* out, long out_step) {
    over_columns(columns, [&](int o, auto count) INLINE_LAMBDA {
        constexpr int OUT = count, IN = OUT == 1 ? (REGISTERS == 32 ? V / N : 8) : REGISTERS == 32 ? 8 : 4;
        constexpr int CHAINS = IN / PACK<V> * OUT < 8 ? 2 : 1;  // a sum waits for its last addition
        for (int b = 0; b < rows; b++)
            for (int i = 0; i < V / N; i += IN)
                outer_tile<V, IN, OUT, CHAINS, N>(a + b * a_block + i * N, a_step, d + o * d_block, d_block, d_step, pixels,
                                                  out + (b * V / N + i) * out_step + o * V / N, out_step);
    });
}

}  // namespace FPDARTS_ISA
