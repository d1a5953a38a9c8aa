"""A back end against the float64 reference: outputs, every gradient, statistics; twice the same bits.

Run by test_native.py, and by test_triton.py in Triton's interpreter, in a process of its own each: what
FPDARTS_TESTED names is tested, and TRITON_INTERPRET is read once, when triton is imported.
"""

import math
import os
import weakref
from functools import partial

import pytest
import torch
from fpdarts.kernels.spec import OPERATIONS, CellSpec, DerivedCellSpec

from fpdarts import DerivedNetwork, GateSampler, Genotype, SuperNet, kernels
from fpdarts.check_cases import CELL_TOLERANCE, NORMAL, REDUCE
from fpdarts.space import DEFAULT_SUBSETS

TESTED = os.environ.get("FPDARTS_TESTED", "triton")
if TESTED == "triton":
    from tests.interpreter import language_patched_once, memory_is_the_kernels, said_multiples_are_some  # noqa: F401
triton_only = pytest.mark.skipif(TESTED != "triton", reason="of Triton's kernels")
derived = pytest.mark.skipif(
    kernels.available("cpu", "derived_cell")[TESTED] is not None, reason="the back end has no derived cells"
)
TOLERANCE = 1e-5  # relative; float32 sums of some hundred terms leave a few 1e-7


@pytest.fixture(autouse=True)
def larger_steps(request, monkeypatch):
    """In the interpreter, which takes as long over a small step as over a large one. Stages are tested as they are."""
    if TESTED == "triton" and not request.node.name.startswith("test_stage"):
        from fpdarts.kernels.triton import tuning

        def larger(*_, across=1, **__):
            return {"BLOCK": 32, "TALL": 4, "WIDE": 64, "ACROSS": across, "num_warps": 4}

        monkeypatch.setattr(tuning, "_rows", larger)


TWICE = TESTED != "triton"  # in the interpreter only where a test asks for it: it would take minutes more


def compare(function, inputs: dict, twice: bool = TWICE):
    """function(back end, tensors): a tensor, or (tensor, more to compare). Outputs and the gradients of all inputs. With
    ``twice`` these are computed again, and the same."""

    def run(name, dtype):
        leaves = {key: value.to(dtype).clone().requires_grad_() for key, value in inputs.items()}
        out, *more = function(name, leaves)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        options = {"retain_graph": True, "allow_unused": True}
        gradients = [torch.autograd.grad(out, leaves.values(), direction, **options) for _ in range(1 + twice)]
        for first, second in zip(gradients[0], gradients[-1]):
            torch.testing.assert_close(second, first, rtol=0, atol=0, msg="a second backward differs")
        named = {"out": out.detach(), **{f"d_{key}": d for key, d in zip(leaves, gradients[0])}}
        return named | {f"more {i}": value for i, value in enumerate(more)}

    expected, actual = run("reference", torch.float64), run(TESTED, torch.float32)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, f"{name}: nothing depends on it"
            continue
        error = (actual[name].double() - value).norm() / value.norm().clamp_min(1e-6)
        assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


# two images of an even width share vectors in C++
EVEN = [(8, (6, 10), 1)] if TESTED == "native" else []


@pytest.mark.parametrize("c, size, stride", [(3, (5, 9), 1), (3, (8, 6), 2), (8, (7, 7), 1), (8, (5, 5), 2), *EVEN])
@pytest.mark.parametrize("name", [n for n, o in OPERATIONS.items() if o.kind == "convolution"])
def test_stage(name, c, size, stride):
    k, dilation = OPERATIONS[name].kernel_size, OPERATIONS[name].dilation
    inputs = {"state": torch.randn(2, 2 * c, *size)}
    inputs |= {"depthwise": torch.randn(5, k, k, c), "pointwise": torch.randn(5, c, c)}

    def stage(kernel, t):
        x = t["state"].contiguous(memory_format=torch.channels_last)[:, c:]  # a channel slice, as a path reads it
        options = {"stride": stride, "dilation": dilation, "kernels": kernel}
        return (kernels.stage(x, t["depthwise"], t["pointwise"], **options),)

    compare(stage, inputs)


@triton_only
@pytest.mark.parametrize(
    "name, c, stride", [*(("sep_conv_3x3", c, stride) for c in (8, 16) for stride in (1, 2)), ("dil_conv_5x5", 8, 1)]
)
def test_stage_in_the_blocks_of_bfloat16(monkeypatch, name, c, stride):
    take_blocks_of_bfloat16(monkeypatch)
    test_stage(name, c, (6, 4), stride)


def take_blocks_of_bfloat16(monkeypatch):
    """Blocks as they are launched with tensor cores; computed in float32, as the interpreter can."""
    from fpdarts.kernels.triton import tuning

    for name in ("rows_forward", "rows_data_gradient", "rows_weight_gradient"):
        own = getattr(tuning, name)
        monkeypatch.setattr(tuning, name, lambda *given, own=own: own(*given[:-2], "ieee", 2))


@pytest.mark.parametrize("c, size, dilation", [(4, (5, 6), 2), (8, (3, 8), 1), (6, (6, 8), 2)])
def test_stage_of_a_slice_an_edge(monkeypatch, c, size, dilation):
    if TESTED == "triton":  # of 5 to 8 channels these have outputs side by side where the width lets them
        take_blocks_of_bfloat16(monkeypatch)
    inputs = {
        "x": torch.randn(2, 3 * c, *size),
        "depthwise": torch.randn(3, 3, 3, c),
        "pointwise": torch.randn(3, c, c),
    }
    compare(lambda k, t: (kernels.stage(*t.values(), dilation=dilation, kernels=k),), inputs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("operation", ["max_pool_3x3", "avg_pool_3x3"])
def test_pooling(operation, size, stride):
    inputs = {"state": torch.randn(2, 6, *size)}
    compare(lambda k, t: (kernels.pooling(t["state"][:, 3:], operation, stride=stride, kernels=k),), inputs)


def test_ties_of_maxima_go_to_the_first():
    x = torch.zeros(1, 8, 6, 6)
    compare(lambda k, t: (kernels.pooling(t["x"], "max_pool_3x3", stride=2, kernels=k),), {"x": x})


def test_nan_is_not_lost():
    x = torch.randn(1, 8, 6, 6)
    x[0, 2, 3, 3] = float("nan")
    assert kernels.pooling(x, "max_pool_3x3", kernels=TESTED).isnan().sum() == 9
    out = kernels.stage(x, torch.ones(1, 3, 3, 8), torch.ones(1, 8, 8), kernels=TESTED)
    assert out.isnan().sum() == 9 * 8


@pytest.mark.skipif(kernels.available("cpu", "stem")[TESTED] is not None, reason="the back end has no stem")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("n, c, size", [(3, 5, (7, 9)), (2, 48, (32, 32)), (5, 108, (4, 3)), (6, 32, (1, 1))], ids=str)
def test_stem(n, c, size, given, offset=2.0):
    images = torch.randn(n, 3, *size) + offset * torch.tensor([0.25, -0.5, 1.0]).view(3, 1, 1)
    inputs = {"weight": torch.randn(c, 3, 3, 3), "scale": torch.randn(c), "shift": torch.randn(c)}
    statistics = (torch.randn(c), torch.rand(c) + 0.5) if given else None

    def stem(kernel, t):
        dtype = t["scale"].dtype
        tables = statistics and tuple(table.to(dtype) for table in statistics)
        return kernels.stem(images.to(dtype), *t.values(), tables, kernels=kernel)

    compare(stem, inputs)


@pytest.mark.skipif(kernels.available("cpu", "stem")[TESTED] is not None, reason="the back end has no stem")
def test_images_far_from_zero_cost_a_stem_no_digits():
    test_stem(4, 48, (16, 16), False, 1000.0)


@pytest.mark.parametrize("c", [5, 8])
def test_factorized_reduction(c):
    half = c // 2
    inputs = {"x": torch.randn(2, c, 4, 6), "even": torch.randn(3, c, half), "odd": torch.randn(3, c, c - half)}
    compare(lambda k, t: (kernels.factorized_reduction(*t.values(), kernels=k),), inputs)


@pytest.mark.parametrize("given", [False, True], ids=["of the batch", "given"])
@pytest.mark.parametrize("weighted", [False, True])
def test_normalize(weighted, given):
    inputs = {"raw": torch.randn(3, 6, 5, 4) + 3}
    if weighted:
        inputs["weight"] = torch.rand(6)
    statistics = (torch.randn(6).double(), torch.rand(6).double() + 0.5) if given else None
    compare(lambda k, t: kernels.normalize(t["raw"], t.get("weight"), statistics, kernels=k), inputs)


def test_node():
    inputs = {f"term{i}": torch.randn(2, 3, 5, 4) for i in range(5)} | {"coefficients": torch.rand(3)}

    def node(k, t):
        terms, w = [t[f"term{i}"] for i in range(5)], t["coefficients"]
        slices = [[(terms[0], None), (terms[1], w[0])], [(terms[2], w[1]), (terms[3], w[2]), (terms[4], None)]]
        return (kernels.node(slices, kernels=k),)

    compare(node, inputs)


GATES = {
    "path 0 only": (1, 0), "path 1 only": (0, 1), "both": (1, 1), "expected": (2 / 3, 2 / 3), "uneven": (0.3, 1.7)
}  # fmt: skip


def cell(
    channels=8, partial=2, nodes=1, reduction=False, factorized=False, gates="sampled", size=(6, 6), n=2,
    wide=(12, 20), twice=TWICE, **options,
):  # fmt: skip
    spec = CellSpec(channels, wide, partial, options.get("subsets", DEFAULT_SUBSETS), nodes, reduction, factorized)
    edges, paths = len(spec.edges), spec.paths
    sizes = (tuple(2 * side for side in size) if factorized else size), size
    inputs = {f"input {i}": torch.randn(n, c, *s) for i, (c, s) in enumerate(zip(spec.input_channels, sizes))}
    for name, parameter in spec.parameters.items():
        inputs[name] = torch.empty(parameter.shape).uniform_(-parameter.bound, parameter.bound)
    inputs |= {"operation_weights": torch.rand(edges, len(spec.operations)), "edge_weights": torch.rand(edges)}
    if options.get("weightless"):
        inputs["operation_weights"][:, ::2] = inputs["edge_weights"][0] = 0
    opened = GateSampler(1, edges, paths, seed=2).sample()[0]
    if gates == "an edge each":
        opened = torch.tensor([*GATES.values()])
    elif gates != "sampled":
        opened = torch.tensor(GATES[gates]).expand(edges, 2).clone()
    statistics = None
    if options.get("evaluation"):
        rows = spec.statistics_rows, spec.slice_channels
        statistics = torch.randn(rows).double(), torch.rand(rows).double() + 0.5

    def run(k, t):
        weights = {name: t[name] for name in spec.parameters}
        pair = t["input 0"], t["input 1"]
        out, batch = kernels.cell(
            spec, pair, weights, t["operation_weights"], t["edge_weights"], opened, statistics, kernels=k
        )
        return out, *(batch or ())

    compare(run, inputs, twice)


# A path that is closed on all edges is another case; in the interpreter the others take turns on the edges of a cell.
ALIKE = [*GATES] if TESTED != "triton" else ["path 0 only", "path 1 only"]


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("gates", [*ALIKE, "an edge each"])
def test_cell_with_all_gates(gates, reduction):
    # of a reduction's 2x2 maps a channel's few values can be so alike that float32 loses digits on any back end
    size, each = (6, 6) if reduction else (4, 4), gates == "an edge each"
    cell(gates=gates, reduction=reduction, size=size, nodes=1 + each, twice=TWICE or each)


ALL = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")
SETTINGS = {
    "four nodes": dict(nodes=4, gates="both", size=(4, 4)),
    "two nodes of a reduction": dict(nodes=2, reduction=True),
    "factorized input": dict(factorized=True),
    "factorized input of a reduction": dict(factorized=True, reduction=True),
    "K = 4": dict(channels=16, partial=4),
    "K = 4, reduction": dict(channels=16, partial=4, reduction=True),
    "K = 3, some weights are 0": dict(channels=12, partial=3, gates="both", size=(4, 4), weightless=True),
    "C/K = 3": dict(channels=6),
    "C/K = 5, reduction": dict(channels=10, reduction=True),
    "C/K = 16": dict(channels=32, nodes=1),
    "7x7": dict(size=(7, 7)),
    "5x9, one image": dict(size=(5, 9), n=1),
    "several tiles": dict(size=(8, 10), n=5, nodes=1),
    "inputs of one width": dict(wide=(12, 12), size=(4, 4)),
    "one path of six operations": dict(subsets=(ALL,), reduction=True),
    "no convolution in a path": dict(subsets=(("none", "max_pool_3x3"), ("skip_connect", "sep_conv_3x3"))),
    "evaluation": dict(evaluation=True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_cell(setting):
    cell(**SETTINGS[setting])


@triton_only
@pytest.mark.parametrize("channels, size", [(16, (3, 8)), (16, (6, 4))])
def test_cell_in_the_blocks_of_bfloat16(monkeypatch, channels, size):
    """The widths let second stages have outputs side by side."""
    take_blocks_of_bfloat16(monkeypatch)
    cell(channels=channels, size=size, gates="both", nodes=1)


@triton_only
@pytest.mark.parametrize(
    "options", [{}, {"reduction": True}, {"subsets": (("max_pool_3x3", "avg_pool_3x3"), ("skip_connect", "none"))}]
)
def test_sums_of_many_tiles(monkeypatch, options):
    """As of large maps: shares of statistics and of sums are merged in several steps, one of them of a tile that is not
    full."""
    from fpdarts.kernels.triton import tuning

    monkeypatch.setitem(tuning.KNOBS, "block", 16)
    monkeypatch.setitem(tuning.KNOBS, "merged", 4)
    cell(size=(6, 4), n=3, nodes=1, **options)


DEAD = ("sep_conv_3x3", 0), ("avg_pool_3x3", 1), ("dil_conv_3x3", 0), ("max_pool_3x3", 1)  # node 0 leads nowhere
DERIVED = {
    "normal, three levels": dict(edges=NORMAL, size=(5, 7)),
    "reduction, drop-path": dict(edges=REDUCE, size=(6, 8), reduction=True, drop=True),
    "factorized": dict(edges=NORMAL, size=(5, 3), factorized=True, drop=True),
    "factorized reduction": dict(edges=REDUCE, size=(4, 6), reduction=True, factorized=True),
    "7x7, one image, C=5": dict(edges=NORMAL, size=(7, 7), n=1, channels=5, drop=True),
    "reduction, C=5": dict(edges=REDUCE, size=(6, 8), channels=5, reduction=True, factorized=True, drop=True),
    "several tiles, C=36": dict(edges=NORMAL[:4], size=(8, 9), n=2, channels=36, drop=True),
    "several blocks of channels": dict(edges=REDUCE[:2], size=(4, 4), channels=72, reduction=True),
    "some nodes only": dict(edges=NORMAL, concat=(5, 3), size=(4, 4), drop=True),
    "a node that leads nowhere": dict(edges=DEAD, concat=(3,), size=(4, 4)),
    "an input that is not read": dict(edges=(("sep_conv_3x3", 1), ("max_pool_3x3", 1)), size=(4, 4)),
    "evaluation": dict(edges=REDUCE, size=(4, 4), reduction=True, evaluation=True),
    "evaluation, drop-path": dict(edges=NORMAL, size=(4, 4), evaluation=True, drop=True),
}


@derived
@pytest.mark.parametrize("setting", DERIVED)
def test_derived_cell(setting):
    inputs, run = derived_case(**DERIVED[setting])
    compare(run, inputs, twice=TWICE or setting in ("normal, three levels", "reduction, drop-path"))


@triton_only
@derived
def test_derived_cell_of_many_tiles(monkeypatch):
    """Three groups of tiles, the last one smaller, and with a tile that is not full."""
    import triton.language as tl
    from fpdarts.kernels.triton import statistics, tuning

    monkeypatch.setattr(statistics, "GROUP", tl.constexpr(2))
    monkeypatch.setitem(tuning.KNOBS, "block", 16)
    inputs, run = derived_case(size=(6, 4), n=3, edges=NORMAL[:4])
    compare(run, inputs)


def derived_case(edges, size, n=2, channels=8, concat=None, reduction=False, factorized=False, **options):
    """(inputs by name, what computes the cell from them)."""
    concat = concat or tuple(range(2, 2 + len(edges) // 2))
    spec = DerivedCellSpec(channels, (12, 20), edges, concat, reduction, factorized)
    sizes = (tuple(2 * side for side in size) if factorized else size), size
    inputs = {f"input {i}": torch.randn(n, c, *s) for i, (c, s) in enumerate(zip(spec.input_channels, sizes))}
    for name, shape in spec.parameters.items():
        inputs[name] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        if len(shape) == 1 and name.endswith("weight"):  # random scales: half of them are negative; and some are 0
            inputs[name][::3] = 0
    scales = (torch.rand(len(edges), n, 1, 1, 1) < 0.6) / 0.6 if options.get("drop") else None
    statistics = None
    if options.get("evaluation"):
        table = len(spec.normalizations), channels
        statistics = torch.randn(table).double(), torch.rand(table).double() + 0.5

    def run(k, t):
        dtype, weights = t["input 0"].dtype, {name: t[name] for name in spec.parameters}
        path_scales = None if scales is None else scales.to(dtype)
        given = None if statistics is None else tuple(table.to(dtype) for table in statistics)
        out, batch = kernels.derived_cell(spec, (t["input 0"], t["input 1"]), weights, path_scales, given, kernels=k)
        return out, *(batch[:2] if batch else ())

    return inputs, run


@triton_only
def test_derived_cell_in_bfloat16(monkeypatch):
    """Stored in bfloat16. The interpreter's products of bfloat16 are wrong, so operands are float32 here."""
    import triton.language as tl
    from fpdarts.kernels.triton.launch import TRITON_DTYPE

    monkeypatch.setitem(TRITON_DTYPE, torch.bfloat16, tl.float32)
    inputs, run = derived_case(NORMAL, (6, 6), drop=True)
    results = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = {key: value.to(dtype).requires_grad_() for key, value in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "triton"):
            out = run(name, leaves)[0]
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        results.append([out.detach(), *torch.autograd.grad(out, leaves.values(), direction.to(out))])
        assert name == "reference" or out.dtype == torch.bfloat16
    errors = [(b.double() - a).norm() / a.norm() for a, b in zip(*results)]
    assert errors[0] <= CELL_TOLERANCE["bf16"].output, "out"
    assert max(errors[1:]) <= CELL_TOLERANCE["bf16"].gradient, "gradients"


@triton_only
def test_backward_lets_go_of_a_cells_maps(monkeypatch):
    """Cell by cell, though the output still holds the graph."""
    from fpdarts.kernels.triton import driver

    kept = []

    class Watched(driver.Forward):
        def __init__(self, *given):
            super().__init__(*given)
            kept.append(weakref.ref(self.space))

    monkeypatch.setattr(driver, "Forward", Watched)
    model = SuperNet(5, 4, 1, nodes=1, kernels=TESTED)
    out = model(torch.randn(2, 3, 4, 4), GateSampler(*model.gate_shape).sample())
    assert [space() is None for space in kept] == [False]
    torch.autograd.grad(out.sum(), model.architecture_parameters(), materialize_grads=True)
    assert [space() is None for space in kept] == [True]


def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    model = SuperNet(5, 4, 1, nodes=1, kernels=TESTED)
    images, gates = torch.randn(5, 3, 8, 8), GateSampler(*model.gate_shape).sample()
    runs = []
    for _ in range(2):
        out = model(images, gates)
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()), materialize_grads=True)
        runs.append([out.detach(), *gradients])
    for first, second in zip(*runs):
        assert torch.equal(first, second)


@derived
def test_two_steps_of_retraining_are_the_same():
    """The derived network's losses, weights and running statistics against the reference's; and twice the same bits,
    but in the interpreter: there single cells are computed twice."""
    genotype = Genotype(NORMAL[:4], range(2, 4), REDUCE[:4], range(2, 4))
    runs = []
    for name in ("reference", TESTED, *[TESTED] * TWICE):
        torch.manual_seed(0)
        network = DerivedNetwork(genotype, 3, 4, 3, auxiliary=False, kernels=name)
        sgd = torch.optim.SGD(network.parameters(), 0.01, 0.9)
        for _ in range(2):
            loss = network(torch.randn(3, 3, 8, 8), 0.3).square().mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        runs.append({"loss": loss.detach(), **network.state_dict()})
    for name, expected in runs[0].items():
        torch.testing.assert_close(runs[1][name], expected, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")
        assert torch.equal(runs[1][name], runs[-1][name]), name


def test_learning_is_the_same():
    """Joint steps from one seed: losses and alphas. More than one takes the interpreter too long for a test."""
    from fpdarts.config import SearchConfig, resolved
    from fpdarts.search import build_supernet, optimizers, weight_step

    losses, alphas = {}, {}
    for name in ("reference", TESTED):
        config = resolved(
            SearchConfig(init_channels=4, cells=3, nodes=1, kernels=name, architecture_learning_rate=1e-2, amp="off"),
            "digits",
        )
        torch.manual_seed(0)
        model = build_supernet(config, 3)
        sgd, architect = optimizers(config, model, torch.device("cpu"))
        sampler = GateSampler(*model.gate_shape, seed=0)
        generator = torch.Generator().manual_seed(0)
        losses[name] = []
        for _ in range(1 if TESTED == "triton" else 20):
            batches = [
                (torch.randn(6, 3, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator))
                for _ in range(2)
            ]
            architect.step(batches[0], sampler.sample())
            losses[name].append(weight_step(model, sgd, batches[1], sampler.sample(), config)[0].item())
        alphas[name] = torch.cat([p.detach().flatten() for p in model.architecture_parameters()])
    torch.testing.assert_close(torch.tensor(losses[TESTED]), torch.tensor(losses["reference"]), rtol=1e-4, atol=1e-4)
    # a tenth of what Adam moves an alpha in one step, whose gradient may be near zero and then has few right digits
    torch.testing.assert_close(alphas[TESTED], alphas["reference"], rtol=0, atol=1e-3)


@triton_only
def test_kernels_are_watched():
    from tests.interpreter import copy_kernel

    x, small = torch.randn(12), torch.zeros(10)
    copy_kernel[(1,)](x, small, START=2, C=8)
    assert torch.equal(small[2:], x[2:10])
    for out, start, error in ((small, 4, "a store of 2 elements"), (x, 6, "a load of 2 "), (x, 3, "no multiple of 2")):
        with pytest.raises(Exception, match=error):
            copy_kernel[(1,)](x, out, START=start, C=8)


def test_what_it_cannot_compute_is_named():
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    spec = CellSpec(4, (4, 4), 2, DEFAULT_SUBSETS, nodes=1)
    weights = {name: torch.zeros(p.shape) for name, p in spec.parameters.items()}
    refused = partial(
        pytest.raises, kernels.BackendUnavailable, match="float32.*, not in float64; .*--kernels reference"
    )
    with refused():
        kernels.pooling(x, "max_pool_3x3", kernels=TESTED)
    with refused():
        kernels.cell(spec, (x, x), weights, torch.ones(2, 8), torch.ones(2), torch.ones(2, 2), kernels=TESTED)


def test_gates_that_are_changed_before_backward_are_noticed():
    """Their values are read again there."""
    spec, gates = CellSpec(4, (4, 4), 2, DEFAULT_SUBSETS, nodes=1), torch.ones(2, 2)
    weights = {name: torch.randn(p.shape) for name, p in spec.parameters.items()}
    alpha = torch.rand(2, 8, requires_grad=True)
    x = torch.randn(1, 4, 4, 4)
    out, _ = kernels.cell(spec, (x, x), weights, alpha, torch.rand(2), gates, kernels=TESTED)
    gates.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Nothing(torch.autograd.Function):
    """Its backward has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return None


def test_a_gradient_that_does_not_arrive_is_none():
    spec = CellSpec(4, (4, 4), 2, DEFAULT_SUBSETS, nodes=1)
    weights = {name: torch.randn(p.shape) for name, p in spec.parameters.items()}
    x, alpha = torch.randn(1, 4, 4, 4, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    out, _ = kernels.cell(spec, (x, x), weights, alpha, torch.rand(2), torch.ones(2, 2), kernels=TESTED)
    Nothing.apply(out).sum().backward()
    assert x.grad is None and alpha.grad is None
