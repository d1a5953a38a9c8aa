// A cell on one instruction set. Compiled once for each, into a namespace of its own; dispatch.cpp chooses.
#include "backward.h"
#include "forward.h"
#include "parts.h"
#include "stem.h"

namespace FPDARTS_ISA {

template <class Run> static void with_lanes(int c, Run&& run) {
    if (lanes_for(c) == WIDEST) run(Constant<WIDEST>{});
    else run(Constant<8>{});
}
template <class Run> static void with_lanes(const CellArguments& a, Run&& run) {
    Shape shape;
    std::memcpy(&shape, a.geometry, sizeof shape);
    with_lanes(shape.channels / shape.partial, run);
}

int64_t cell_workspace(const CellArguments& a) {
    int64_t floats = 0;
    with_lanes(a, [&](auto lanes) { floats = Layout<lanes>(a.geometry).total; });
    return floats;
}

int64_t cell_scratch(const CellArguments& a) {
    int64_t floats = 0;
    with_lanes(a, [&](auto lanes) { floats = Backward<lanes>::scratch(Layout<lanes>(a.geometry)); });
    return floats;
}

void cell_forward(const CellArguments& a) {
    with_lanes(a, [&](auto lanes) { Forward<lanes>(a).run(); });
}

void cell_backward(const CellArguments& a) {
    with_lanes(a, [&](auto lanes) { Backward<lanes>(a).run(); });
}

void part(const PartArguments& a) {
    with_lanes(a.channels, [&](auto lanes) {
        Parts<lanes> parts(a);
        switch (2 * a.part + a.backward) {
            case 0: return parts.stage();
            case 1: return parts.stage_gradient();
            case 2: return parts.pooling();
            case 3: return parts.pooling_gradient();
            case 4: return parts.node();
            case 5: return parts.node_gradient();
        }
    });
}

void stem(const StemArguments& a) {
    if (a.backward) Stem(a).backward();
    else Stem(a).forward();
}

}  // namespace FPDARTS_ISA
