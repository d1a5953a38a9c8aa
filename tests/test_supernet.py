"""The supernet on the reference kernels against the naive edge-by-edge one, in float64."""

import pytest
import torch
from fpdarts.kernels.spec import CellSpec

from fpdarts import GateSampler, SuperNet
from fpdarts.space import DEFAULT_SUBSETS
from fpdarts.supernet import Cell
from tests.naive import NaiveCell, NaiveSuperNet

TOLERANCE = 1e-10  # relative, float64: only the order of sums differs


def assert_close(name, actual, expected, tolerance=TOLERANCE):
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-6)  # below is rounding of an exact zero
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def build(stem="cifar", partial=2, init_channels=8, cells=4, **options):
    torch.manual_seed(0)
    model = SuperNet(5, init_channels, cells, partial=partial, stem=stem, **options).double()
    with torch.no_grad():  # far from the start, where all activated weights are alike
        for parameter in model.architecture_parameters():
            parameter.normal_()
    return model


def gates_of(kind, model):
    if kind == "sampled":
        return GateSampler(*model.gate_shape, seed=3).sample()
    values = {
        "path 0 only": (1, 0),
        "path 1 only": (0, 1),
        "both": (1, 1),
        "expected": (2 / 3, 2 / 3),
        "uneven": (0.3, 1.7),
    }
    return torch.tensor(values[kind]).expand(model.gate_shape).clone()


def compare(model, gates, size):
    naive = NaiveSuperNet(model)
    images = torch.randn(3, 3, *size, dtype=torch.float64, requires_grad=True)
    naive_images = images.detach().clone().requires_grad_()
    direction = torch.randn(3, 5, dtype=torch.float64)
    out, expected = model(images, gates), naive(naive_images, gates)
    assert_close("logits", out, expected)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close("d_images", images.grad, naive_images.grad, 1e-8)
    gradients = naive.packed_gradients()
    named = dict(model.named_parameters())
    assert gradients.keys() == named.keys()
    for name, gradient in gradients.items():
        assert named[name].grad is not None, f"d_{name} is missing"
        assert_close(f"d_{name}", named[name].grad, gradient, 1e-8)
    return naive


@pytest.mark.parametrize("gates", ["path 0 only", "path 1 only", "both", "expected", "uneven", "sampled"])
@pytest.mark.parametrize("partial", [2, 4])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_outputs_and_gradients_equal_the_naive_network(stem, partial, gates):
    model = build(stem, partial)
    compare(model, gates_of(gates, model), (8, 8) if stem == "cifar" else (64, 64))


@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_rectangular_and_larger_images(size):
    model = build()
    compare(model, gates_of("sampled", model), size)


@pytest.mark.parametrize("init_channels", [6, 10], ids=lambda c: f"C/K={c // 2}")
def test_odd_slices(init_channels):
    model = build(init_channels=init_channels)
    compare(model, gates_of("sampled", model), (8, 8))


@pytest.mark.parametrize("nodes", [2, 3])
def test_other_numbers_of_nodes(nodes):
    model = build(nodes=nodes)
    compare(model, gates_of("sampled", model), (8, 8))


def test_one_path_of_all_operations():
    everything = (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
    model = build(subsets=(everything,), partial=4)
    compare(model, torch.ones(model.gate_shape), (8, 8))


def test_running_statistics_move_where_open_and_rest_where_closed():
    model = build()
    gates = gates_of("sampled", model)
    naive = compare(model, gates, (8, 8))
    for cell, naive_cell, cell_gates in zip(model.cells, naive.cells, gates):
        expected = {}
        for row, norm, (edge, path) in naive_cell.statistics():
            if cell_gates[edge, path]:
                expected[row] = norm
        moved = (cell.running_variance != 1).any(1)
        for i, preprocess in enumerate(naive_cell.preprocess):
            rows = cell.spec.statistics[f"preprocess{i}"]
            norm = preprocess.norm if hasattr(preprocess, "norm") else preprocess[2]
            assert_close(f"preprocess{i} mean", cell.running_mean[list(rows)].flatten(), norm.running_mean)
            moved[list(rows)] = False
        assert set(moved.nonzero().flatten().tolist()) == set(expected)
        for row, norm in expected.items():
            assert_close(f"mean of row {row}", cell.running_mean[row], norm.running_mean, 1e-8)
            assert_close(f"variance of row {row}", cell.running_variance[row], norm.running_var, 1e-8)


def test_evaluation_uses_running_statistics():
    model = build()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gates = GateSampler(*model.gate_shape)
    for _ in range(3):
        model(images, gates.sample())
    model.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    together, alone = model(images, gates.expected()), model(images[:1], gates.expected())
    assert_close("logits of one image", alone, together[:1])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), f"{name} moved in evaluation"


def test_a_cell_in_evaluation_keeps_its_statistics():
    model = build()
    model.cells[1].eval()
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.ones(model.gate_shape))
    assert not model.cells[1].running_mean.any() and model.cells[0].running_mean.any()
    model.cells.eval()
    before = model.cells[0].running_mean.clone()
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.ones(model.gate_shape))
    assert torch.equal(model.cells[0].running_mean, before)


def test_a_closed_network_has_zero_gradients_not_missing_ones():
    model = build()
    gates = torch.ones(model.gate_shape)
    gates[1] = 0  # a whole cell: nothing of the cells before it reaches the output but through the next cell's input 0
    gates[2, :, 0] = 0
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64), gates).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"d_{name} is missing"
        if name.startswith("cells.1.") or (name.startswith("cells.2.sep_conv_3x3")):
            assert not parameter.grad.any(), f"d_{name} must be zero"
    model.zero_grad()
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.zeros(model.gate_shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", [(7, 7), (5, 9)], ids=str)
@pytest.mark.parametrize("images", [1, 2])
def test_odd_sizes_at_stride_1(size, images):
    spec = CellSpec(8, (12, 16), 2, DEFAULT_SUBSETS)
    torch.manual_seed(0)
    cell, naive = Cell(spec).double(), NaiveCell(spec).double()
    naive.load_packed(dict(cell.named_parameters()))
    inputs = [torch.randn(images, c, *size, dtype=torch.float64, requires_grad=True) for c in spec.input_channels]
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    alpha, beta = torch.rand(14, 8, dtype=torch.float64), torch.rand(14, dtype=torch.float64)
    gates = GateSampler(1, 14, seed=1).sample()[0]
    out, _ = cell(inputs, alpha, beta, gates, "reference")
    expected = naive(copies, alpha, beta, gates.tolist())
    assert_close("out", out, expected)
    direction = torch.randn_like(out)
    for name, ours, theirs in zip(
        ("d_input0", "d_input1"),
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, copies, direction),
    ):
        assert_close(name, ours, theirs, 1e-8)


def test_odd_size_at_stride_2_is_named():
    model = build()
    with pytest.raises(ValueError, match="stride 2.*7x7"):
        model(torch.randn(2, 3, 7, 7, dtype=torch.float64), torch.ones(model.gate_shape))


def test_softmax_weighting():
    model = build(weighting="softmax")
    alpha, beta = model.mixing_weights("normal")
    assert_close("sum over a path", alpha[:, :4].sum(1), torch.ones(14, dtype=torch.float64))
    assert_close("sum over a node", beta[2:5].sum(), torch.ones((), dtype=torch.float64))


def test_packed_convolutions_start_as_their_own_conv2d_would():
    torch.manual_seed(0)
    cell = SuperNet(10, 32).cells[0]
    for name, convolution in {
        "sep_conv_5x5_depthwise_0": torch.nn.Conv2d(16, 16, 5, groups=16),
        "dil_conv_3x3_pointwise_0": torch.nn.Conv2d(16, 16, 1),
        "preprocess0": torch.nn.Conv2d(96, 32, 1),
    }.items():
        expected, packed = convolution.weight.detach(), getattr(cell, name).detach()
        assert abs(packed.std() / expected.std() - 1) < 0.1, name
        assert abs(packed.abs().max() / expected.abs().max() - 1) < 0.02, name


def test_state_dict_holds_alpha_and_beta_and_round_trips():
    model, other = build(), build()
    with torch.no_grad():
        other.alpha_normal.zero_()
    state = model.state_dict()
    assert {"alpha_normal", "alpha_reduce", "beta_normal", "beta_reduce"} <= state.keys()
    other.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gates = torch.ones(model.gate_shape)
    assert torch.equal(model(images, gates), other(images, gates))
    ours = {id(p) for p in model.weight_parameters()} | {id(p) for p in model.architecture_parameters()}
    assert ours == {id(p) for p in model.parameters()}


def test_genotype_takes_the_best_two_edges_and_never_none():
    model = build()
    with torch.no_grad():
        for parameter in model.architecture_parameters():
            parameter.zero_()
        operations = model.cells[0].spec.operations
        model.alpha_normal[:, operations.index("none")] = 9.0
        model.alpha_normal[:, operations.index("dil_conv_5x5")] = 1.0
        model.alpha_normal[3, operations.index("sep_conv_3x3")] = 2.0  # edge 3: node 1, source 1
        model.beta_normal[4] = 1.0  # node 1, source 2
        model.beta_normal[2] = -1.0
    genotype = model.genotype()
    assert genotype.normal[:2] == (("dil_conv_5x5", 0), ("dil_conv_5x5", 1))
    assert genotype.normal[2:4] == (("dil_conv_5x5", 2), ("sep_conv_3x3", 1))
    with torch.no_grad():
        model.alpha_reduce[:, operations.index("max_pool_3x3")] = 1.0
        model.beta_reduce[1] = 1.0
    assert model.genotype().reduce[:2] == (("max_pool_3x3", 1), ("max_pool_3x3", 0))
    assert model.genotype().normal == genotype.normal


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stem": "mnist"}, "unknown stem 'mnist'; choose one of: cifar, imagenet"),
        ({"kernels": "cuda"}, "unknown kernels 'cuda'; choose one of: auto, reference, native, triton"),
        ({"weighting": "relu"}, "unknown weighting"),
        ({"init_channels": 9}, "9 channels cannot be cut into 2"),
        ({"partial": 1}, "2 paths need as many slices"),
        ({"cells": 0}, "cells must be at least 1"),
        ({"subsets": [["sep_conv_7x7"]]}, "unknown operation 'sep_conv_7x7'; the operations are: none, max_pool_3x3"),
        ({"subsets": [["sep_conv_3x3"], ["sep_conv_3x3"]]}, "stands twice.*the operations are: none"),
        ({"subsets": [["none"]]}, "no operation to choose"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_gates_are_named():
    model = build()
    with pytest.raises(ValueError, match=r"gates must have shape \(4, 14, 2\)"):
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.ones(14, 2))


def test_bf16_autocast_stays_near_float32():
    model = build().float()
    images, gates = torch.randn(8, 3, 8, 8), torch.ones(model.gate_shape)
    expected = model(images, gates)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, gates)
    assert_close("logits", out.float(), expected, 5e-2)  # bf16 keeps 8 bits; errors add up over 4 cells
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_start_prefers_nothing():
    model = SuperNet(10)
    for parameter in model.architecture_parameters():
        assert parameter.std() < 2e-3 and parameter.mean().abs() < 2e-3


def test_the_stem_of_imagenet():
    model = SuperNet(10, 4, 3, stem="imagenet")
    kinds = [[type(module).__name__ for module in part] for part in model.stem]
    assert kinds == [["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"], ["ReLU", "Conv2d", "BatchNorm2d"]]


def test_cells_in_training_move_their_statistics_whatever_the_network_is_in():
    model = SuperNet(5, 4, 3, 2).eval()
    model.cells.train()
    model(torch.randn(4, 3, 8, 8), torch.ones(model.gate_shape))
    assert model.cells[0].running_mean.any() and not model.stem[0][1].running_mean.any()


def test_scores_that_are_no_numbers_have_no_genotype():
    model = SuperNet(5, 4, 3, 2)
    with torch.no_grad():
        model.beta_reduce[1] = float("nan")
    with pytest.raises(ValueError, match="alpha_reduce or beta_reduce is not a number"):
        model.genotype()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_trains_in_half_precision(dtype):
    model = SuperNet(5, 4, 3, 2, kernels="reference", subsets=[["sep_conv_3x3", "max_pool_3x3"], ["skip_connect"]])
    model.to(dtype)
    model(torch.randn(4, 3, 8, 8, dtype=dtype), torch.ones(model.gate_shape)).sum().backward()
    assert model.alpha_normal.grad.dtype == dtype
