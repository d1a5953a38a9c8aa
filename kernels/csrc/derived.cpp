// A derived cell on one instruction set, as cell.cpp does it for a cell of the search.
#include "derived_backward.h"
#include "derived_forward.h"

namespace FPDARTS_ISA {

template <class Run> static void with_derived_lanes(const CellArguments& a, Run&& run) {
    DerivedShape shape;
    std::memcpy(&shape, a.geometry, sizeof shape);
    if (derived_lanes_for(shape.channels) == WIDEST) run(Constant<WIDEST>{});
    else run(Constant<8>{});
}

int64_t derived_workspace(const CellArguments& a) {
    int64_t floats = 0;
    with_derived_lanes(a, [&](auto lanes) { floats = DerivedLayout<lanes>(a.geometry).total; });
    return floats;
}

int64_t derived_scratch(const CellArguments& a) {
    int64_t floats = 0;
    with_derived_lanes(a, [&](auto lanes) { floats = DerivedBackward<lanes>::scratch(DerivedLayout<lanes>(a.geometry)); });
    return floats;
}

void derived_forward(const CellArguments& a) {
    with_derived_lanes(a, [&](auto lanes) { DerivedForward<lanes>(a).run(); });
}

void derived_backward(const CellArguments& a) {
    with_derived_lanes(a, [&](auto lanes) { DerivedBackward<lanes>(a).run(); });
}

}  // namespace FPDARTS_ISA
