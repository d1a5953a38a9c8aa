"""The derived network: published sizes, shapes, drop-path, the auxiliary head."""

from copy import deepcopy

import pytest
import torch
from fpdarts.kernels.spec import EPSILON, OPERATIONS
from torch import nn

from fpdarts.count import count, count_genotype
from fpdarts.genotype import PUBLISHED, Genotype
from fpdarts.network import AuxiliaryHead, Cell, DerivedNetwork, make_operation, mean_over_pixels
from tests.naive import by_modules

GENOTYPE = PUBLISHED["PC_DARTS_cifar"]
ALL_SKIP = Genotype([("skip_connect", 0), ("skip_connect", 1)], [2], [("skip_connect", 0), ("skip_connect", 1)], [2])
# One node that sums an average pooling and an identity, to tell a dropped edge from an untouched one.
_POOL_AND_SKIP = [("avg_pool_3x3", 0), ("skip_connect", 1)]
POOL_AND_SKIP = Genotype(_POOL_AND_SKIP, [2], _POOL_AND_SKIP, [2])


def small(genotype=GENOTYPE, num_classes=5, init_channels=4, cells=3, **options):
    torch.manual_seed(0)
    return DerivedNetwork(genotype, num_classes, init_channels, cells, **options)


# Sizes: measured by running the peers' own model code.

SIZES = [
    ("DARTS_V1", "cifar", 3_169_414, 500_987_520),
    ("DARTS_V2", "cifar", 3_349_342, 528_359_040),
    ("PC_DARTS_cifar", "cifar", 3_634_678, 556_670_592),
    ("PC_DARTS_image", "cifar", 3_721_510, 570_466_944),
    ("DARTS_V1", "imagenet", 4_510_432, 505_864_704),
    ("DARTS_V2", "imagenet", 4_718_752, 529_911_552),
    ("PC_DARTS_cifar", "imagenet", 5_270_560, 571_137_408),
    ("PC_DARTS_image", "imagenet", 5_342_464, 581_627_328),
]


@pytest.mark.parametrize("name, stem, parameters, macs", SIZES, ids=[f"{row[0]}-{row[1]}" for row in SIZES])
def test_sizes_are_the_published_models(name, stem, parameters, macs):
    channels, cells = (36, 20) if stem == "cifar" else (48, 14)
    assert count_genotype(PUBLISHED[name], stem, channels, cells) == {"parameters": parameters, "macs": macs}


def test_count_ignores_the_auxiliary_head_and_leaves_the_network_as_it_was():
    network = small(auxiliary=True)
    network.cells[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.device("meta"):
        alone = DerivedNetwork(GENOTYPE, 5, 4, 3, auxiliary=False)
    assert count(network, 32) == count(alone, 32) == count_genotype(GENOTYPE, "cifar", 4, 3, num_classes=5)
    assert network.training and not network.cells[0].training and network.cells[1].training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(not module._forward_hooks for module in network.modules())


# Shapes


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("stem, size", [("cifar", 32), ("imagenet", 224)])
def test_shapes(stem, size, auxiliary):
    network = small(stem=stem, auxiliary=auxiliary)
    images = torch.randn(2, 3, size, size)
    out = network(images)
    logits = out[0] if auxiliary else out
    assert isinstance(out, tuple) == auxiliary
    assert logits.shape == (2, 5) and logits.dtype == torch.float32
    if auxiliary:
        assert out[1].shape == (2, 5) and out[1].dtype == torch.float32
    assert network.eval()(images).shape == (2, 5)


@pytest.mark.parametrize("stem, shape", [("cifar", (8, 8)), ("cifar", (4, 12)), ("imagenet", (64, 32))])
def test_other_image_sizes_without_an_auxiliary_head(stem, shape):
    logits = small(stem=stem, auxiliary=False)(torch.randn(1, 3, *shape).expand(2, -1, -1, -1))
    assert logits.shape == (2, 5)


def test_cells_double_their_channels_where_they_halve_the_map():
    network = small(cells=8, auxiliary=False).eval()
    shapes = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out[0].shape[1:])))
    network(torch.randn(1, 3, 16, 16))
    assert shapes == [(16, 16, 16)] * 2 + [(32, 8, 8)] * 3 + [(64, 4, 4)] * 3


def test_a_concatenation_of_some_nodes_narrows_the_cells():
    genotype = Genotype(GENOTYPE.normal, [3, 5], GENOTYPE.reduce, [4])
    network = small(genotype, cells=4, auxiliary=False)
    assert [cell.channels_out for cell in network.cells] == [8, 8, 16, 32]
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_every_operation_stands_where_the_genotype_says():
    cell = Cell(GENOTYPE, 8, 8, 4, reduction=True, previous_reduces=False)
    strides = [next((m.stride for m in op.modules() if hasattr(m, "stride"))) for op in cell.operations]
    expected = [2 if source < 2 else 1 for _, source in GENOTYPE.reduce]
    assert [s[0] if isinstance(s, tuple) else s for s in strides] == expected
    assert isinstance(cell.operations[1], nn.MaxPool2d), "a pooling is not normalized in the derived network"


def test_average_pooling_leaves_the_padding_out():
    cell = Cell(POOL_AND_SKIP, 3, 3, 3, reduction=False, previous_reduces=False)
    out = cell.operations[0](torch.ones(1, 3, 4, 4))
    assert torch.equal(out, torch.ones_like(out)), "average of ones at the border"


def test_factorized_reduction_reads_even_and_odd_pixels():
    cell = Cell(ALL_SKIP, 3, 3, 5, reduction=False, previous_reduces=True).eval()
    before, previous = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 3, 2)
    out = cell(before, previous)[0] - cell(torch.zeros_like(before), previous)[0]
    assert out.shape == (2, 5, 3, 2)
    scale = 1 / (1 + EPSILON) ** 0.5  # fresh running statistics: mean 0, variance 1
    even, odd = (half.weight[:, :, 0, 0] * scale for half in (cell.preprocess0.even, cell.preprocess0.odd))
    x = before.relu()
    even = torch.einsum("nchw,oc->nohw", x[:, :, ::2, ::2], even)
    odd = torch.einsum("nchw,oc->nohw", x[:, :, 1::2, 1::2], odd)
    # float32 sums of a few products: a few units in the last place.
    torch.testing.assert_close(out[:, :2], even, rtol=1e-5, atol=1e-6, msg="even half")
    torch.testing.assert_close(out[:, 2:], odd, rtol=1e-5, atol=1e-6, msg="odd half")


# The kernels' reference against the modules

EVERYTHING = Genotype(
    [("sep_conv_3x3", 1), ("skip_connect", 0), ("dil_conv_3x3", 2), ("max_pool_3x3", 1), ("sep_conv_5x5", 2),
     ("avg_pool_3x3", 3), ("dil_conv_5x5", 3), ("skip_connect", 2)], [2, 4, 5],
    [("max_pool_3x3", 0), ("skip_connect", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 1), ("avg_pool_3x3", 1),
     ("skip_connect", 2), ("max_pool_3x3", 3), ("skip_connect", 0)], [2, 3, 4, 5],
)  # fmt: skip


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("stem, size", [("cifar", 16), ("imagenet", 64)])
@pytest.mark.parametrize("genotype", [GENOTYPE, EVERYTHING], ids=["published", "everything"])
def test_the_seam_computes_what_the_modules_do(genotype, stem, size, drop_path):
    network = small(genotype, cells=4, stem=stem, auxiliary=False, kernels="reference").double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_()  # of normalizations, some scales are negative
    modules, images = by_modules(network), torch.randn(4, 3, size, size, dtype=torch.float64)
    results = []
    for model in (network, modules):
        for _ in range(2):
            torch.manual_seed(1)
            logits = model(images, drop_path)
        logits.square().sum().backward()
        results.append({"logits": logits, "evaluated": model.eval()(images), **model.state_dict()})
        results[-1] |= {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}: {m}")
    assert network.cells[0].preprocess1[2].num_batches_tracked == 2


def test_names_and_shapes_are_those_of_the_modules():
    for reduction in (False, True):
        for previous_reduces in (False, True):
            cell = Cell(EVERYTHING, 6, 8, 4, reduction, previous_reduces)
            shapes = [(name, tuple(parameter.shape)) for name, parameter in cell.named_parameters()]
            assert shapes == list(cell.spec.parameters.items())
            norms = [name for name, module in cell.named_modules() if isinstance(module, nn.BatchNorm2d)]
            assert {name: row for row, name in enumerate(norms)} == cell.spec.normalizations


# The names that checkpoints of the first version have.
NAMES = """
    preprocess0.1.weight preprocess0.2.weight preprocess0.2.bias preprocess0.2.running_mean preprocess0.2.running_var
    preprocess0.2.num_batches_tracked operations.0.1.weight operations.0.2.weight operations.0.3.weight
    operations.0.3.running_var operations.0.5.weight operations.0.6.weight operations.0.7.bias operations.3.3.weight
"""
NAMES_OF_A_REDUCTION = (
    "preprocess0.even.weight preprocess0.odd.weight preprocess0.norm.weight preprocess1.2.running_mean"
)


def test_checkpoints_keep_their_names():
    keys = small(auxiliary=False).state_dict().keys()
    assert {f"cells.0.{name}" for name in NAMES.split()} <= keys
    assert {f"cells.2.{name}" for name in NAMES_OF_A_REDUCTION.split()} <= keys
    assert len(keys) == 311


def test_kernels_are_a_choice():
    with pytest.raises(ValueError, match="unknown kernels 'cudnn'; choose one of: auto, reference, native, triton"):
        small(kernels="cudnn")
    assert small().kernels == "auto"


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stem": "mnist"}, "unknown stem 'mnist'; choose one of: cifar, imagenet"),
        ({"cells": 2}, "at least 3 cells"),
        ({"num_classes": 0}, "num_classes"),
        ({"init_channels": 0}, "init_channels"),
        ({"init_channels": 5, "stem": "imagenet"}, "even for the imagenet stem.*got 5"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
    if options.get("stem") == "mnist":
        with pytest.raises(ValueError, match=message):
            count_genotype(GENOTYPE, "mnist", 4, 3)


@pytest.mark.parametrize("stem, size, met", [("cifar", 9, "9x9"), ("cifar", 10, "5x5"), ("imagenet", 72, "9x9")])
@pytest.mark.parametrize("genotype", [GENOTYPE, ALL_SKIP], ids=["convolutions", "skips"])
def test_odd_sizes_are_named(genotype, stem, size, met):
    with pytest.raises(ValueError, match=f"has stride 2 and needs an even size, but its input is {met}; use images"):
        small(genotype, stem=stem, auxiliary=False)(torch.randn(2, 3, size, size))


@pytest.mark.parametrize("stem, size, needs", [("cifar", 8, "8x8"), ("imagenet", 64, "7x7")])
def test_an_auxiliary_head_that_does_not_fit(stem, size, needs):
    network, images = small(stem=stem), torch.randn(2, 3, size, size)
    with pytest.raises(ValueError, match=f"a 2x2 map, but needs {needs}.*auxiliary=False"):
        network(images)
    assert network.eval()(images).shape == (2, 5), "evaluation does without the head"


@pytest.mark.parametrize("drop_path", [-0.1, 1.0, float("nan")])
def test_drop_path_out_of_range(drop_path):
    with pytest.raises(ValueError, match="drop_path must be in"):
        small()(torch.randn(2, 3, 32, 32), drop_path)


def test_auxiliary_heads_differ_by_the_last_normalization():
    norms = {
        stem: [m.num_features for m in AuxiliaryHead(16, 5, stem).modules() if isinstance(m, nn.BatchNorm2d)]
        for stem in ("cifar", "imagenet")
    }
    assert norms == {"cifar": [128, 768], "imagenet": [128]}


# Drop-path


def test_drop_path_drops_samples_of_an_edge_and_never_an_identity():
    cell = Cell(POOL_AND_SKIP, 3, 3, 3, reduction=False, previous_reduces=False).eval()
    before, previous = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    pooled = cell.operations[0](cell.preprocess0(before))
    identity = cell.preprocess1(previous)
    scales = torch.tensor([[0.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]).reshape(2, 4, 1, 1, 1)
    out, statistics = cell(before, previous, scales, "reference")  # the same operations as above, to the last bit
    assert statistics is None
    torch.testing.assert_close(out, pooled * scales[0] + identity, rtol=0, atol=0, msg="out")


def test_drop_path_statistics():
    network = small(cells=20, auxiliary=False)
    scales = network._draw_path_scales(torch.empty(500, 3, 8, 8), keep=0.7)
    assert scales.shape == (20, 8, 500, 1, 1, 1)
    torch.testing.assert_close(scales.unique(), torch.tensor([0.0, 1 / 0.7]), msg="values")
    # 80,000 draws: the mean's standard deviation is 0.0023; five of them.
    assert abs(scales.mean().item() - 1) < 0.012, "the expectation is kept"
    per_edge = scales.mean(dim=2).flatten()
    assert per_edge.std() > 0.01, "edges are drawn independently"
    assert scales.mean(dim=(0, 1)).std() > 0.01, "samples are drawn independently"


def test_drop_path_acts_in_training_only():
    network, images = small(auxiliary=False), torch.randn(4, 3, 8, 8)
    whole, dropped = network(images), network(images, 0.5)
    assert not torch.allclose(whole, dropped), "training"
    network.eval()
    assert torch.equal(network(images), network(images, 0.5)), "evaluation"


def test_no_drop_path_draws_nothing():
    network, images = small(auxiliary=False), torch.randn(4, 3, 8, 8)
    state = torch.get_rng_state()
    network(images, 0.0)
    assert torch.equal(torch.get_rng_state(), state), "random state"


# Training


@pytest.mark.parametrize("stem, size", [("cifar", 32), ("imagenet", 224)])
@pytest.mark.parametrize("name", ["PC_DARTS_cifar", "DARTS_V2"])
def test_gradient_reaches_every_parameter(name, stem, size):
    network = small(PUBLISHED[name], stem=stem)
    logits, auxiliary_logits = network(torch.randn(2, 3, size, size))
    (logits.square().sum() + 0.4 * auxiliary_logits.square().sum()).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_evaluation_is_deterministic_and_keeps_the_statistics():
    network, images = small(), torch.randn(4, 3, 32, 32)
    network(images)
    network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, second = network(images), network(images)
    assert torch.equal(first, second), "logits"
    # One sample alone gives the same logits up to the order of float32 sums.
    torch.testing.assert_close(network(images[:1]), first[:1], rtol=1e-4, atol=1e-5, msg="N=1")
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_state_dict_round_trip():
    network, other = small(), DerivedNetwork(GENOTYPE, 5, 4, 3)
    other.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), other.eval()(images)), "logits"


def test_channels_last_stays_and_changes_nothing():
    network, images = small(auxiliary=False).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = network(images, 0.0)
    assert expected.dtype == torch.float64
    network.to(memory_format=torch.channels_last)
    left = []

    def check(module, inputs, out):
        out = out[0] if isinstance(module, Cell) else out
        if out.dim() == 4 and not out.is_contiguous(memory_format=torch.channels_last):
            left.append(type(module).__name__)

    for module in network.modules():
        if not isinstance(module, DerivedNetwork):
            module.register_forward_hook(check)
    logits = network(images.to(memory_format=torch.channels_last), 0.0)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9, msg="logits")  # float64, other order of sums
    network(images.to(memory_format=torch.channels_last), 0.3)
    assert not left


def test_bfloat16_autocast():
    network, images = small(), torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, auxiliary_logits = network(images, 0.2)
        loss = nn.functional.cross_entropy(logits, torch.arange(4)) + auxiliary_logits.square().mean()
    loss.backward()
    assert logits.dtype == auxiliary_logits.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    network, images = small(), torch.randn(2, 3, 32, 32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=backend, fullgraph=True)
    for epoch in range(6):
        logits, auxiliary_logits = compiled(images, 0.1 * epoch)
    # Without drop-path, with the first value, and one for all further values: no recompilation an epoch.
    assert len(graphs) <= 3
    network.eval()
    torch.testing.assert_close(compiled(images), network(images), rtol=1e-5, atol=1e-6, msg="logits")


def test_the_layers_of_stem_and_auxiliary_head():
    network = small(stem="imagenet")
    kinds = [[type(m).__name__ for m in part] for part in (network.stem.state0, network.stem.state1)]
    assert kinds == [["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"], ["ReLU", "Conv2d", "BatchNorm2d"]]
    assert [type(module).__name__ for module in AuxiliaryHead(8, 5, "cifar").features] == [
        "ReLU", "AvgPool2d", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU",
    ]  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "none"])
def test_an_operation_is_a_module_that_can_be_called(name, stride):
    out = make_operation(name, 5, stride)(torch.randn(2, 5, 8, 8))
    assert out.shape == (2, 5, 8 // stride, 8 // stride)


@pytest.mark.parametrize("momentum", [0.01, None], ids=str)
def test_the_momentum_of_normalizations_is_heeded(momentum):
    """None is what torch.optim.swa_utils.update_bn sets: the mean of all batches."""
    network = small(auxiliary=False)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms[::2] if momentum else norms:
        norm.momentum = momentum
    theirs = by_modules(deepcopy(network))
    for seed in range(3):
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        network(images)
        theirs(images)
    for (name, ours), expected in zip(network.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mean_over_pixels_has_its_gradient_in_the_format_of_the_map(memory_format):
    x = torch.randn(2, 5, 3, 4).to(memory_format=memory_format)
    formats, y = [], x.clone(memory_format=memory_format).requires_grad_() * 1
    y.register_hook(lambda gradient: formats.append(gradient.is_contiguous(memory_format=memory_format)))
    means = mean_over_pixels(y)
    torch.testing.assert_close(means, x.mean((2, 3)))
    means.sum().backward()
    assert formats == [True]
