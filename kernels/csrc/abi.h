// What Python passes. kernels/native/library.py declares the same fields in the same order. FPDARTS_ABI, there as well,
// is to be raised with each change of them: a library of another number is refused.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int64_t FPDARTS_ABI = 6;

// A cell of the search, or of a derived network, which reads path_scales in place of alpha, beta and gates. Geometry, as
// 64-bit integers: the fields of Shape in cell.h in their order, then five numbers an operation; or those of
// DerivedShape in derived.h, then six an edge, then the states that are concatenated.
struct CellArguments {
    const int64_t* geometry;
    int64_t threads;
    // All floats are 32 bit. Maps of inputs, output and their gradients are (N, H, W, C) in memory.
    const float* x[2];
    const float* const* weights;  // in the order of the spec's parameters
    const float* alpha;           // activated, (edges, operations)
    const float* beta;            // activated, (edges,)
    const float* gates;           // (edges, paths)
    const float* path_scales;     // (edges, images), or null for 1
    const float* given_mean;      // (rows, c) to normalize by, or null for the batch's own
    const float* given_variance;
    float* work;  // fpdarts_cell_workspace floats, written by forward and read by backward
    // Forward.
    float* out;
    float* mean;  // (rows, c)
    float* variance;
    float* updated;  // (rows, c)
    // Backward; each gradient is null where it is not needed.
    const float* d_out;
    float* scratch;  // fpdarts_cell_scratch floats
    float* d_x[2];
    float* const* d_weights;
    float* d_alpha;
    float* d_beta;
};

// A part of a cell alone; each reads what it needs.
struct PartArguments {
    int64_t part, backward;  // 0: stage, 1: pooling, 2: node
    int64_t threads, images, channels, height, width;
    int64_t step;                                  // floats from pixel to pixel of x, of stage and pooling
    int64_t edges, own, kernel, dilation, stride;  // stage; own: x has a slice of c channels an edge
    int64_t kind;                                  // pooling: Kind in cell.h
    int64_t partial, count;                        // node: K, and terms in all
    const float *x, *depthwise, *pointwise;
    float* out;
    const float* d_out;
    float *d_x, *d_depthwise, *d_pointwise;  // the last two null where not needed
    const int64_t* slices;                   // [term]
    const float* const* terms;
    const float* coefficients;
    float* const* d_terms;
    float* d_coefficients;
};

// The stem: what forward writes but the result and the variance, backward reads.
struct StemArguments {
    int64_t backward, threads, images, height, width, channels;
    const float* x;       // (N, H, W, 3)
    const float* weight;  // (C, 3, 3, 3): rows and columns of taps, then inputs
    const float *scale, *shift;
    const float *given_mean, *given_variance;  // (C,) to normalize by, or null for the batch's own
    float* mean;                               // (C,)
    float* inverse;                            // (C,), of the standard deviation
    double* sums;                              // (32, 32), zeros where statistics are given or before forward
    float* out;
    float* variance;  // (C,), unbiased where it is the batch's own
    const float* d_out;
    float *d_weight, *d_scale, *d_shift;
};
