"""The kernel seam: what the networks ask of a back end, and the choice of one.

A back end is a module of this package with the functions below, in the same signatures, and ``unavailable(device)``,
which returns None or the reason why it cannot run there. It may have ``DTYPES``, names of what it computes in (all if
it is left out), ``GRAPHS``, names of the functions of which a whole step can be captured as a CUDA graph, and the
contexts ``counting`` and ``compiling``, which count what is launched within on the meta device, and compile it.
``cell`` is what a search calls, and ``derived_cell`` what retraining calls, which a back end may do without, as
``stem``, which networks then leave to PyTorch's modules; the other functions are parts of ``cell``, public so that each
can be tested and timed alone. A faster back end may merge neighbouring parts (normalize into the stage that follows,
for one); it is then tested against the same composition of the reference's parts. Parameters are packed as
``fpdarts.kernels.spec`` says, the same for all. No back end knows another.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Optional

from .spec import OPERATIONS, CellSpec, DerivedCellSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKENDS = ("reference", "native", "triton")  # auto takes the last that can run


class BackendUnavailable(RuntimeError):
    """A back end that was asked for by name cannot run here; the message says why."""


class Statistics(NamedTuple):
    """Of the normalizations of a cell, a row of c channels each, as ``CellSpec.statistics`` lays them out, or
    ``DerivedCellSpec.normalizations``.

    mean, variance: (rows, c) float32 (the reference: as the weights, or float32); the variance is the unbiased one, as
        torch.nn.BatchNorm2d keeps it.
    updated: as mean, 1 in the rows that this forward computed, 0 in those whose path was closed and that rest. None of
        a derived cell, which computes all.
    """

    mean: "Tensor"
    variance: "Tensor"
    updated: Optional["Tensor"] = None


@cache
def _reason_against(name: str, device: str) -> str | None:
    return import_module(f"{__name__}.{name}").unavailable(device)


@cache
def _reason_lacking(name: str, function: str) -> str | None:
    if hasattr(import_module(f"{__name__}.{name}"), function):
        return None
    return f"this version of fpdarts has no {name} kernels for {function}; use --kernels reference"


def available(device: str = "cpu", function: str = "cell") -> dict[str, str | None]:
    """For every back end None where it can run the function on the device, otherwise the reason why not."""
    return {name: _reason_against(name, device) or _reason_lacking(name, function) for name in BACKENDS}


@cache
def _reason_of_dtype(name: str, dtype: Optional["torch.dtype"]) -> str | None:
    known = getattr(import_module(f"{__name__}.{name}"), "DTYPES", None)
    asked = str(dtype).removeprefix("torch.")
    if dtype is None or known is None or asked in known:
        return None
    return f"they compute in {' or '.join(known)}, not in {asked}; use --amp off, or --kernels reference"


def validate(name: str):
    """Raises ValueError, with the valid names, for an unknown one."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown kernels {name!r}; choose one of: auto, {', '.join(BACKENDS)}")


def backend(
    name: str = "auto", device: str = "cpu", function: str = "cell", dtype: Optional["torch.dtype"] = None
) -> ModuleType:
    """The back end of that name. ``auto`` is the fastest that can run the function on the device, in that dtype.

    Raises ValueError for an unknown name and BackendUnavailable, with the reason, for one that cannot run: a back end
    that is asked for by name never falls back to another.
    """
    return sys.modules[_loaded(name, device, function, dtype)]


def _loaded(name: str, device: str, function: str, dtype: Optional["torch.dtype"]) -> str:
    """Name of the back end's module, which is now imported."""
    validate(name)
    if name == "auto" and device == "meta":
        name = "reference"  # others run nothing there, they only count
    elif name == "auto":
        able = [name for name, reason in available(device, function).items() if reason is None]
        name = [name for name in able if not _reason_of_dtype(name, dtype)][-1]
    reason = _reason_against(name, device) or _reason_lacking(name, function) or _reason_of_dtype(name, dtype)
    if reason:
        raise BackendUnavailable(f"kernels {name!r} cannot run here: {reason}")
    return f"{__name__}.{name}"


_loaded._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, without importing torch


def capturable(name: str, device: str, function: str = "cell") -> bool:
    """Whether a step with that back end can be captured as a CUDA graph. Raises as ``backend`` does."""
    return function in getattr(backend(name, device, function), "GRAPHS", ())


def _has(module: str, function: str) -> bool:
    return hasattr(sys.modules[module], function)


_has._dynamo_marked_constant = True


def offers(function: str, name: str, x: "Tensor") -> bool:
    """Whether the back end that computes cells with such a tensor has the function too. Raises as ``backend`` does."""
    return _has(_serving(name, x).__name__, function)


def _serving(name: str, x: "Tensor", function: str = "cell") -> ModuleType:
    """The back end that computes with a tensor, in its dtype or that of autocast."""
    import torch  # is there already: x is its tensor

    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return backend(name, kind, function, torch.get_autocast_dtype(kind) if autocast else x.dtype)


def stage(x: "Tensor", depthwise: "Tensor", pointwise: "Tensor", *, stride=1, dilation=1, kernels="auto") -> "Tensor":
    """ReLU, depthwise and pointwise convolution of E edges at once; not normalized.

    x: (N, c, H, W), read by all edges, or (N, E*c, H, W), a slice an edge. depthwise: (E, k, k, c), zero padding
    dilation*(k-1)/2. pointwise: (E, c_in, c_out), both c. Returns (N, E*c, H/stride, W/stride). All of one dtype.
    Raises ValueError for a tensor of another shape, and, as all of these functions, BackendUnavailable where the back
    end that is asked for cannot compute in x's dtype.
    """
    if depthwise.dim() != 4 or depthwise.shape[1] != depthwise.shape[2]:
        raise ValueError(f"depthwise must have shape (edges, k, k, c), not {tuple(depthwise.shape)}")
    edges, _, _, c = depthwise.shape
    if tuple(pointwise.shape) != (edges, c, c):
        raise ValueError(f"pointwise must have shape {(edges, c, c)}, not {tuple(pointwise.shape)}")
    if x.dim() != 4 or x.shape[1] not in (c, edges * c):
        raise ValueError(f"x must have shape (N, {c} or {edges * c}, H, W), not {tuple(x.shape)}")
    return _serving(kernels, x).stage(x, depthwise, pointwise, stride=stride, dilation=dilation)


def pooling(x: "Tensor", operation: str, *, stride=1, kernels="auto") -> "Tensor":
    """``max_pool_3x3`` or ``avg_pool_3x3`` (padding left out of its count), not normalized.

    x: (N, c, H, W). Returns (N, c, H/stride, W/stride), of x's dtype. Raises ValueError for another operation.
    """
    poolings = [name for name, described in OPERATIONS.items() if described.kind == "pooling"]
    if operation not in poolings:
        raise ValueError(f"unknown pooling {operation!r}; choose one of: {', '.join(poolings)}")
    return _serving(kernels, x).pooling(x, operation, stride=stride)


def factorized_reduction(x: "Tensor", even: "Tensor", odd: "Tensor", *, kernels="auto") -> "Tensor":
    """ReLU, then a 1x1 convolution of the even and one of the odd pixels (both coordinates), concatenated edge by edge.

    x: (N, c, H, W), H and W even. even: (E, c, h). odd: (E, c, h'). All of one dtype. Returns (N, E*(h+h'), H/2, W/2),
    not normalized. Raises ValueError for a tensor of another shape.
    """
    for name, weight in (("even", even), ("odd", odd)):
        if weight.dim() != 3 or weight.shape[:2] != (even.shape[0], x.shape[1]):
            raise ValueError(f"{name} must have shape ({len(even)}, {x.shape[1]}, c_out), not {tuple(weight.shape)}")
    require_even(tuple(x.shape[2:]), "a factorized reduction")
    return _serving(kernels, x).factorized_reduction(x, even, odd)


def normalize(raw: "Tensor", weight: Optional["Tensor"] = None, statistics: Optional[tuple] = None, *, kernels="auto"):
    """Batch normalization without affine parameters, times a coefficient a channel.

    raw: (N, C, H, W). weight: (C,) or None for 1. statistics: (mean, variance), each (C,), to normalize by; None takes
    the batch's own. Returns (out, mean, variance): the batch's own, the variance unbiased, or those given.
    Raises ValueError for a tensor of another shape, and for a batch of fewer than two values a channel.
    """
    for name, table in zip(("weight", "mean", "variance"), (weight, *(statistics or ()))):
        if table is not None and tuple(table.shape) != (raw.shape[1],):
            raise ValueError(f"{name} must have shape {(raw.shape[1],)}, not {tuple(table.shape)}")
    if statistics is None:
        _require_statistics(raw.shape[0], tuple(raw.shape[2:]))
    return _serving(kernels, raw).normalize(raw, weight, statistics)


def node(slices: Sequence[Sequence[tuple]], *, kernels="auto") -> "Tensor":
    """Sum of weighted terms in each channel slice, then the channel shuffle: out[:, K*c + g] = slices[g][:, c].

    slices: K sequences, none empty, of (term (N, c, H, W), coefficient: 0-dim tensor or None for 1).
    Returns (N, K*c, H, W). Raises ValueError for an empty slice and for terms of different shapes.
    """
    if not slices or not all(slices):
        raise ValueError("every slice of a node needs a term; give slices as K sequences that are not empty")
    shapes = {tuple(term.shape) for terms in slices for term, _ in terms}
    if len(shapes) > 1:
        raise ValueError(f"terms of a node must have one shape, not {' and '.join(map(str, sorted(shapes)))}")
    return _serving(kernels, slices[0][0][0]).node(slices)


def stem(
    images: "Tensor",
    weight: "Tensor",
    scale: "Tensor",
    shift: "Tensor",
    statistics: Optional[tuple] = None,
    *,
    kernels="auto",
) -> tuple["Tensor", "Tensor", "Tensor"]:
    """3x3 convolution of images with zero padding 1, and batch normalization: what networks for CIFAR begin with.

    images: (N, 3, H, W), to which no gradient flows. weight: (C, 3, 3, 3), as of torch.nn.Conv2d. scale, shift: (C,),
    as weight and bias of torch.nn.BatchNorm2d. statistics: (mean, variance), each (C,), to normalize by; None takes
    the batch's own. All of one dtype.
    Returns (out (N, C, H, W), mean, variance): the batch's own, the variance unbiased, or those given.
    Raises ValueError for a tensor of another shape, and for a batch of fewer than two values a channel.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (N, 3, H, W), not {tuple(images.shape)}")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (3, 3, 3):
        raise ValueError(f"weight must have shape (C, 3, 3, 3), not {tuple(weight.shape)}")
    for name, table in zip(("scale", "shift", "mean", "variance"), (scale, shift, *(statistics or ()))):
        if tuple(table.shape) != weight.shape[:1]:
            raise ValueError(f"{name} must have shape {tuple(weight.shape[:1])}, not {tuple(table.shape)}")
    if statistics is None:
        _require_statistics(images.shape[0], tuple(images.shape[2:]))
    return _serving(kernels, images, "stem").stem(images, weight, scale, shift, statistics)


def cell(
    spec: CellSpec,
    inputs: tuple["Tensor", "Tensor"],
    weights: Mapping[str, "Tensor"],
    operation_weights: "Tensor",
    edge_weights: "Tensor",
    gates: "Tensor",
    statistics: Optional[tuple] = None,
    *,
    kernels="auto",
) -> tuple["Tensor", Optional[Statistics]]:
    """One cell of the supernet: preprocessing of both inputs, all mixed operations, nodes concatenated.

    inputs: (N, C_0, H_0, W_0) and (N, C_1, H, W), float32, float64 or bfloat16, fastest in channels_last.
    weights: as ``spec.parameters`` names and shapes them.
    operation_weights: (edges, operations), the activated alpha, operations of path 0 first.
    edge_weights: (edges,), the activated beta.
    gates: (edges, paths), best on the CPU; 0 closes a path: it is not computed, its gradient is zero. No gradient flows
        to gates.
    statistics: (mean, variance), each (rows, c), to normalize by in evaluation; None takes the batch's own.
    Returns (out (N, nodes*C, H', W'), Statistics of the batch or None in evaluation).
    Raises ValueError for a tensor of another shape (named), for a size that a stride of 2 would not halve, for inputs
    whose sizes do not fit each other, and for a batch of fewer than two values a channel; BackendUnavailable where the
    back end that is asked for cannot compute in the dtype of the inputs, or of autocast.
    """
    edges = len(spec.edges)
    expected = {name: (weights.get(name), parameter.shape) for name, parameter in spec.parameters.items()}
    expected["operation_weights"] = operation_weights, (edges, len(spec.operations))
    expected["edge_weights"] = edge_weights, (edges,)
    expected["gates"] = gates, (edges, spec.paths)
    for table, name in zip(statistics or (), ("mean", "variance")):
        expected[f"{name} of the statistics"] = table, (spec.statistics_rows, spec.slice_channels)
    _check_shapes(spec, inputs, expected)
    _check_sizes(spec, inputs, statistics)
    module = _serving(kernels, inputs[0])
    return module.cell(spec, inputs, weights, operation_weights, edge_weights, gates, statistics)


def derived_cell(
    spec: DerivedCellSpec,
    inputs: tuple["Tensor", "Tensor"],
    weights: Mapping[str, "Tensor"],
    path_scales: Optional["Tensor"] = None,
    statistics: Optional[tuple] = None,
    *,
    kernels="auto",
) -> tuple["Tensor", Optional[Statistics]]:
    """One cell of a derived network: preprocessing of both inputs, two operations a node, nodes concatenated.

    inputs: (N, C_0, H_0, W_0) and (N, C_1, H, W), float32, float64 or bfloat16, fastest in channels_last.
    weights: as ``spec.parameters`` names and shapes them.
    path_scales: (edges, N, 1, 1, 1), what drop-path multiplies each edge's samples by, identities excepted; no gradient
        flows to it. None drops nothing.
    statistics: (mean, variance), each (rows, C), to normalize by in evaluation; None takes the batch's own.
    Poolings are not normalized.
    Returns (out (N, len(concat)*C, H', W'), Statistics of the batch or None in evaluation).
    Raises ValueError and BackendUnavailable as ``cell`` does.
    """
    expected = {name: (weights.get(name), shape) for name, shape in spec.parameters.items()}
    if path_scales is not None:
        expected["path_scales"] = path_scales, (len(spec.edges), inputs[0].shape[0], 1, 1, 1)
    for table, name in zip(statistics or (), ("mean", "variance")):
        expected[f"{name} of the statistics"] = table, (len(spec.normalizations), spec.channels)
    _check_shapes(spec, inputs, expected)
    _check_sizes(spec, inputs, statistics)
    module = _serving(kernels, inputs[0], "derived_cell")
    return module.derived_cell(spec, inputs, weights, path_scales, statistics)


def _check_shapes(spec, inputs, expected):
    """expected: name -> (tensor, shape)."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            raise ValueError(f"weight {name} is missing; this cell needs {', '.join(spec.parameters)}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    for i, (x, channels) in enumerate(zip(inputs, spec.input_channels, strict=True)):
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"input {i} must have shape (N, {channels}, H, W), not {tuple(x.shape)}")
    if inputs[0].shape[0] != inputs[1].shape[0]:
        raise ValueError(f"the inputs of a cell have {inputs[0].shape[0]} and {inputs[1].shape[0]} images")


def require_stage(kernel: int, dilation: int, stride: int):
    """Raises ValueError for a stage that is in no operation, which only the reference computes."""
    if kernel not in (3, 5) or dilation not in (1, 2) or stride not in (1, 2):
        raise ValueError(
            f"a stage of kernel size {kernel}, dilation {dilation} and stride {stride} is in no operation; "
            "use --kernels reference"
        )


def require_even(size: tuple[int, int], what: str):
    """Raises ValueError for a map that a stride of 2 would not halve."""
    if size[0] % 2 or size[1] % 2:
        raise ValueError(
            f"{what} has stride 2 and needs an even size, but its input is {size[0]}x{size[1]}; "
            "use images whose sides every reduction can halve, or fewer cells"
        )


def _require_statistics(images: int, size: tuple[int, int]):
    if images * size[0] * size[1] < 2:
        raise ValueError(
            f"{images} images of {size[0]}x{size[1]} pixels: statistics of a batch need at least two values a channel; "
            "use a larger batch or larger images"
        )


def _check_sizes(spec, inputs, statistics):
    first, second = (tuple(x.shape[2:]) for x in inputs)
    halved = first
    if spec.factorized_input:
        require_even(first, "a factorized reduction")
        halved = first[0] // 2, first[1] // 2
    if halved != second:
        told = [f"{size[0]}x{size[1]}" for size in (first, second)]
        raise ValueError(f"the inputs of a cell have sizes {told[0]} and {told[1]}, which do not fit each other")
    if spec.reduction:
        require_even(second, "a reduction cell")
    if statistics is None:
        stride = 2 if spec.reduction else 1
        _require_statistics(inputs[0].shape[0], (second[0] // stride, second[1] // stride))
