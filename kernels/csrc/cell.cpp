// A cell on one instruction set. Compiled once for each, into a namespace of its own; dispatch.cpp chooses.
#include "backward.h"
#include "forward.h"

namespace FPDARTS_ISA {

template <class Run> static void with_lanes(const CellArguments& a, Run&& run) {
    Shape shape;
    std::memcpy(&shape, a.geometry, sizeof shape);
    if (WIDEST == 16 && lanes_for(shape.channels / shape.partial) == 16) run(std::integral_constant<int, WIDEST>{});
    else run(std::integral_constant<int, 8>{});
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

}  // namespace FPDARTS_ISA
