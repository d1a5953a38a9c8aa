// What Python passes. kernels/native/library.py declares the same fields in the same order; VERSION tells a library
// that was built from other sources.
#pragma once

#include <cstdint>

constexpr int64_t FPDARTS_ABI = 1;

// Geometry of a cell, as 64-bit integers: the fields of Shape in cell.h in their order, then four numbers an operation.
struct CellArguments {
    const int64_t* geometry;
    int64_t threads;
    // All floats are 32 bit. Maps of inputs, output and their gradients are (N, H, W, C) in memory.
    const float* x[2];
    const float* const* weights;  // packed, in the order of CellSpec.parameters
    const float* alpha;           // activated, (edges, operations)
    const float* beta;            // activated, (edges,)
    const float* gates;           // (edges, paths)
    const float* given_mean;      // (rows, c) to normalize by, or null for the batch's own
    const float* given_variance;
    float* work;  // fpdarts_cell_workspace floats, written by forward and read by backward
    // Forward.
    float* out;
    float* mean;  // (rows, c)
    float* variance;
    float* updated;  // (rows,)
    // Backward; each gradient is null where it is not needed.
    const float* d_out;
    float* scratch;  // fpdarts_cell_scratch floats
    float* d_x[2];
    float* const* d_weights;
    float* d_alpha;
    float* d_beta;
};
