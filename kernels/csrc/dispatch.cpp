// The C interface, and the choice of an instruction set.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "abi.h"

#define DECLARE(isa)                                  \
    namespace isa {                                   \
    int64_t cell_workspace(const CellArguments&);     \
    int64_t cell_scratch(const CellArguments&);       \
    void cell_forward(const CellArguments&);          \
    void cell_backward(const CellArguments&);         \
    int64_t derived_workspace(const CellArguments&);  \
    int64_t derived_scratch(const CellArguments&);    \
    void derived_forward(const CellArguments&);       \
    void derived_backward(const CellArguments&);      \
    void part(const PartArguments&);                  \
    void stem(const StemArguments&);                  \
    }
DECLARE(avx2)
DECLARE(avx512)

namespace {

struct CellKernels {
    int64_t (*workspace)(const CellArguments&);
    int64_t (*scratch)(const CellArguments&);
    void (*forward)(const CellArguments&);
    void (*backward)(const CellArguments&);
};
struct Kernels {
    const char* name;
    CellKernels cell, derived;
    void (*part)(const PartArguments&);
    void (*stem)(const StemArguments&);
};

#define KERNELS(isa)                                                                                   \
    {#isa,                                                                                             \
     {isa::cell_workspace, isa::cell_scratch, isa::cell_forward, isa::cell_backward},                  \
     {isa::derived_workspace, isa::derived_scratch, isa::derived_forward, isa::derived_backward},      \
     isa::part,                                                                                        \
     isa::stem}

const Kernels* choose() {
    static const Kernels wide = KERNELS(avx512), narrow = KERNELS(avx2);
    const char* wanted = std::getenv("FPDARTS_NATIVE_ISA");  // avx2 keeps a machine with AVX-512 from using it
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (avx512 && !(wanted && !std::strcmp(wanted, "avx2"))) return &wide;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &narrow;
    return nullptr;
}

const Kernels* const kernels = choose();

// What a function returns, 0 if that is nothing, -1 where it throws.
template <class Result, class Arguments> int64_t guarded(Result (*function)(const Arguments&), const Arguments& a) {
    try {
        if constexpr (std::is_void_v<Result>) return function(a), 0;
        else return function(a);
    } catch (...) {
        return -1;
    }
}

}  // namespace

EXPORT int64_t fpdarts_abi() { return FPDARTS_ABI; }
EXPORT const char* fpdarts_isa() { return kernels ? kernels->name : ""; }  // empty: no kernels for this processor
// No exception leaves: memory can be short.
EXPORT int64_t fpdarts_cell_workspace(const CellArguments* a) { return guarded(kernels->cell.workspace, *a); }
EXPORT int64_t fpdarts_cell_scratch(const CellArguments* a) { return guarded(kernels->cell.scratch, *a); }
EXPORT int64_t fpdarts_cell_forward(const CellArguments* a) { return guarded(kernels->cell.forward, *a); }
EXPORT int64_t fpdarts_cell_backward(const CellArguments* a) { return guarded(kernels->cell.backward, *a); }
EXPORT int64_t fpdarts_derived_workspace(const CellArguments* a) { return guarded(kernels->derived.workspace, *a); }
EXPORT int64_t fpdarts_derived_scratch(const CellArguments* a) { return guarded(kernels->derived.scratch, *a); }
EXPORT int64_t fpdarts_derived_forward(const CellArguments* a) { return guarded(kernels->derived.forward, *a); }
EXPORT int64_t fpdarts_derived_backward(const CellArguments* a) { return guarded(kernels->derived.backward, *a); }
EXPORT int64_t fpdarts_part(const PartArguments* a) { return guarded(kernels->part, *a); }
EXPORT int64_t fpdarts_stem(const StemArguments* a) { return guarded(kernels->stem, *a); }
