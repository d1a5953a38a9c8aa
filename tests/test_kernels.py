"""The kernel seam: choice of a back end, and the reference's parts against plain modules in float64."""

import pytest
import torch
import torch.nn.functional as F
from fpdarts.kernels.spec import OPERATIONS, CellSpec, DerivedCellSpec
from torch import nn

from fpdarts import kernels
from fpdarts.space import DEFAULT_SUBSETS


def test_available_names_every_back_end_and_says_why_not():
    reasons = kernels.available()
    assert tuple(reasons) == kernels.BACKENDS
    assert reasons["reference"] is None
    assert all(reason is None or "use -" in reason or "install" in reason for reason in reasons.values())


def test_a_back_end_asked_for_by_name_runs_or_says_why():
    for name, reason in kernels.available().items():
        if reason is None:
            assert kernels.backend(name).__name__ == f"fpdarts.kernels.{name}"
        else:
            with pytest.raises(kernels.BackendUnavailable, match=f"kernels '{name}' cannot run here: "):
                kernels.backend(name)


def test_unknown_back_end_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown kernels 'cudnn'; choose one of: auto, reference, native, triton"):
        kernels.backend("cudnn")


def test_a_back_end_without_derived_cells_is_not_taken_for_them(plant):
    plant("other", derived_cell=None)
    message = "kernels 'other' cannot run here: this version of fpdarts has no other kernels for derived_cell"
    with pytest.raises(kernels.BackendUnavailable, match=message):
        kernels.backend("other", "cpu", "derived_cell")
    assert kernels.backend("auto", "cpu").__name__ == "fpdarts.kernels.other"
    assert kernels.backend("auto", "cpu", "derived_cell").__name__ != "fpdarts.kernels.other"
    assert kernels.available("cpu", "derived_cell")["reference"] is None


def test_a_back_end_asked_for_by_name_computes_in_its_dtypes_only(plant):
    plant("other", DTYPES=("float32",))
    x = torch.ones(1, 2, 4, 4)
    assert kernels.pooling(x, "max_pool_3x3", kernels="other").dtype == torch.float32
    for given, amp in ((x.double(), False), (x, True)):
        refused = pytest.raises(kernels.BackendUnavailable, match="they compute in float32, not in")
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), refused:
            kernels.pooling(given, "max_pool_3x3", kernels="other")


def test_of_which_functions_a_step_can_be_captured(plant):
    plant("triton", GRAPHS=("cell",))
    plant("other")
    asked = [("reference", "cell"), ("reference", "derived_cell"), ("triton", "cell"), ("triton", "derived_cell")]
    assert [kernels.capturable(name, "cpu", function) for name, function in asked] == [False, True, True, False]
    assert not kernels.capturable("other", "cpu")


def slice_of_wider(n, c, h, w):
    """A channel slice, as a path reads it: not contiguous."""
    return torch.randn(n, 2 * c, h, w, dtype=torch.float64)[:, c:].requires_grad_()


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (8, 8)], ids=str)
@pytest.mark.parametrize("name", [n for n, o in OPERATIONS.items() if o.kind == "convolution"])
@pytest.mark.parametrize("stride", [1, 2])
def test_stage(name, size, stride):
    edges, c, k, dilation = 3, 4, OPERATIONS[name].kernel_size, OPERATIONS[name].dilation
    depthwise = torch.randn(edges, k, k, c, dtype=torch.float64, requires_grad=True)
    pointwise = torch.randn(edges, c, c, dtype=torch.float64, requires_grad=True)
    x = slice_of_wider(2, c, *size)
    out = kernels.stage(x, depthwise, pointwise, stride=stride, dilation=dilation, kernels="reference")
    for e in range(edges):
        conv = nn.Conv2d(c, c, k, stride, dilation * (k // 2), dilation, groups=c, bias=False).double()
        conv.weight.data = depthwise[e].detach().permute(2, 0, 1)[:, None].contiguous()
        expected = torch.einsum("nihw,io->nohw", conv(x.detach().relu()), pointwise[e].detach())
        torch.testing.assert_close(out[:, e * c : (e + 1) * c], expected, msg=lambda m: f"out of edge {e}: {m}")
    own = torch.cat([x.detach()] * edges, 1)
    torch.testing.assert_close(
        out,
        kernels.stage(own, depthwise, pointwise, stride=stride, dilation=dilation),
        msg=lambda m: f"a slice an edge: {m}",
    )
    small = [t.detach()[:1, ..., :2, :2].clone() if t is x else t for t in (x, depthwise, pointwise)]
    small[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: kernels.stage(*t, dilation=dilation), small, fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_pooling(stride):
    x = slice_of_wider(2, 3, 7, 7)
    torch.testing.assert_close(kernels.pooling(x, "max_pool_3x3", stride=stride), F.max_pool2d(x, 3, stride, 1))
    expected = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    torch.testing.assert_close(kernels.pooling(x, "avg_pool_3x3", stride=stride), expected)


def test_factorized_reduction():
    x = slice_of_wider(2, 5, 4, 6)
    even, odd = (torch.randn(2, 5, h, dtype=torch.float64) for h in (2, 3))
    out = kernels.factorized_reduction(x, even, odd)
    assert out.shape == (2, 10, 2, 3)
    for e in range(2):
        parts = [torch.einsum("nihw,io->nohw", x.relu()[:, :, s::2, s::2], w[e]) for s, w in ((0, even), (1, odd))]
        torch.testing.assert_close(
            out[:, 5 * e : 5 * e + 5], torch.cat(parts, 1), msg=lambda m: f"out of edge {e}: {m}"
        )
    with pytest.raises(ValueError, match="factorized reduction.*3x4"):
        kernels.factorized_reduction(x[:, :, :3, :4], even, odd)


def test_normalize():
    raw, weight = torch.randn(4, 6, 3, 3, dtype=torch.float64) + 5, torch.rand(6, dtype=torch.float64)
    module = nn.BatchNorm2d(6, affine=False, momentum=1.0).double()
    out, mean, variance = kernels.normalize(raw, weight)
    torch.testing.assert_close(out, module(raw) * weight[:, None, None], msg=lambda m: f"out: {m}")
    torch.testing.assert_close(mean, module.running_mean, msg=lambda m: f"mean: {m}")
    torch.testing.assert_close(variance, module.running_var, msg=lambda m: f"variance: {m}")
    module.eval()
    torch.testing.assert_close(
        kernels.normalize(raw, None, (mean, variance))[0], module(raw), msg=lambda m: f"given: {m}"
    )


def test_node_sums_and_shuffles():
    a, b, c = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    out = kernels.node([[(a, None), (b, torch.tensor(0.5, dtype=torch.float64))], [(c, torch.tensor(2.0).double())]])
    for channel in range(3):
        torch.testing.assert_close(out[:, 2 * channel], (a + 0.5 * b)[:, channel])
        torch.testing.assert_close(out[:, 2 * channel + 1], 2 * c[:, channel])
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_packing_covers_each_edge_and_each_row_once():
    for reduction in (False, True):
        spec = CellSpec(16, (48, 64), 2, DEFAULT_SUBSETS, reduction=reduction, factorized_input=True)
        assert sorted(spec.source_order) == list(range(14))
        assert [len(rows) for rows in spec.rows_by_source] == [4, 4, 3, 2, 1]
        for source, rows in enumerate(spec.rows_by_source):
            assert all(spec.edges[spec.source_order[row]].source == source for row in rows)
        table = [row for rows in spec.statistics.values() for row in rows]
        assert sorted(table) == list(range(spec.statistics_rows))
        assert ("skip_connect_even" in spec.parameters) == reduction


@pytest.mark.parametrize(
    "change, message",
    [
        ({"inputs": (torch.ones(1, 4, 8, 8), torch.ones(1, 4, 4, 4))}, "8x8 and 4x4"),
        ({"inputs": (torch.ones(1, 4, 8, 8), torch.ones(1, 6, 8, 8))}, r"input 1 must have shape \(N, 4, H, W\)"),
        ({"inputs": (torch.ones(1, 4, 8, 8), torch.ones(2, 4, 8, 8))}, "have 1 and 2 images"),
        ({"weights": {}}, "weight preprocess0 is missing"),
        ({"statistics": (torch.ones(1, 2), torch.ones(1, 2))}, r"mean of the statistics must have shape \(98, 2\)"),
        ({"gates": torch.ones(14, 3)}, r"gates must have shape \(14, 2\), not \(14, 3\)"),
        ({"operation_weights": torch.ones(14, 4)}, r"operation_weights must have shape \(14, 8\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    spec = CellSpec(4, (4, 4), 2, DEFAULT_SUBSETS)
    arguments = {
        "inputs": (torch.ones(1, 4, 8, 8), torch.ones(1, 4, 8, 8)),
        "weights": {name: torch.zeros(p.shape) for name, p in spec.parameters.items()},
        "operation_weights": torch.ones(14, 8),
        "edge_weights": torch.ones(14),
        "gates": torch.ones(14, 2),
    }
    with pytest.raises(ValueError, match=message):
        kernels.cell(spec, **(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"inputs": (torch.ones(1, 4, 8, 8), torch.ones(1, 4, 4, 4))}, "8x8 and 4x4"),
        ({"inputs": (torch.ones(1, 4, 7, 7), torch.ones(1, 4, 7, 7))}, "a reduction cell has stride 2 .* is 7x7"),
        ({"inputs": (torch.ones(1, 5, 8, 8), torch.ones(1, 4, 8, 8))}, r"input 0 must have shape \(N, 4, H, W\)"),
        ({"inputs": (torch.ones(2, 4, 8, 8), torch.ones(1, 4, 8, 8))}, "have 2 and 1 images"),
        ({"weights": {}}, "weight preprocess0.1.weight is missing"),
        ({"path_scales": torch.ones(2, 1)}, r"path_scales must have shape \(2, 1, 1, 1, 1\)"),
        ({"statistics": (torch.ones(3, 6), torch.ones(4, 6))}, r"variance of the statistics must have shape \(3, 6\)"),
    ],
)
def test_arguments_of_a_derived_cell_that_do_not_fit_are_named(change, message):
    spec = DerivedCellSpec(6, (4, 4), (("dil_conv_3x3", 0), ("max_pool_3x3", 1)), (2,), reduction=True)
    arguments = {
        "inputs": (torch.ones(1, 4, 8, 8), torch.ones(1, 4, 8, 8)),
        "weights": {name: torch.zeros(shape) for name, shape in spec.parameters.items()},
    }
    with pytest.raises(ValueError, match=message):
        kernels.derived_cell(spec, **(arguments | change))


def test_arguments_of_parts_that_do_not_fit_are_named():
    x, depthwise, pointwise = torch.ones(1, 4, 6, 6), torch.ones(2, 3, 3, 4), torch.ones(2, 4, 4)
    for given, message in (
        ((x, depthwise[0], pointwise), r"depthwise must have shape \(edges, k, k, c\)"),
        ((x, depthwise, pointwise[:1]), r"pointwise must have shape \(2, 4, 4\), not \(1, 4, 4\)"),
        ((x[:, :3], depthwise, pointwise), r"x must have shape \(N, 4 or 8, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.stage(*given)
    table = torch.ones(4)
    for call, message in (
        (lambda: kernels.node([[(x, None)], [(x[..., 1:], None)]]), "terms of a node must have one shape"),
        (lambda: kernels.node([[(x, None)], []]), "every slice of a node needs a term"),
        (lambda: kernels.pooling(x, "sep_conv_3x3"), "unknown pooling 'sep_conv_3x3'; choose one of: max_pool_3x3"),
        (lambda: kernels.factorized_reduction(x, torch.ones(2, 3, 1), torch.ones(2, 4, 1)), r"even .* \(2, 4, c_out\)"),
        (lambda: kernels.factorized_reduction(x, torch.ones(2, 4, 1), torch.ones(1, 4, 1)), r"odd .* \(2, 4, c_out\)"),
        (lambda: kernels.normalize(x, table[:3]), r"weight must have shape \(4,\), not \(3,\)"),
        (lambda: kernels.normalize(x, None, (table, table[:3])), r"variance must have shape \(4,\)"),
        (lambda: kernels.normalize(x[..., :1, :1]), "1 images of 1x1 pixels: .* at least two values a channel"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("change, message", [({"partial": 0}, "partial=0"), ({"subsets": (("none",), ())}, "empty")])
def test_a_cell_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CellSpec(**({"channels": 4, "input_channels": (4, 4), "partial": 2, "subsets": DEFAULT_SUBSETS} | change))


def test_a_derived_cell_has_no_none_and_reads_earlier_states():
    for edge in (("none", 0), ("skip_connect", 2)):
        with pytest.raises(ValueError, match=f"edge 1 cannot be {edge[0]} from state {edge[1]}"):
            DerivedCellSpec(4, (4, 4), (("skip_connect", 1), edge), (2,))
