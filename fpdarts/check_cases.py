"""What check-kernels computes: every operation of ``fpdarts.kernels``, cells of derived networks and whole steps of the
supernet, each as a function of a back end and of a seed.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fpdarts import kernels as kernel_backends
from fpdarts.ahead import twin
from fpdarts.architect import frozen
from fpdarts.gates import GateSampler
from fpdarts.kernels.spec import OPERATIONS, CellSpec, DerivedCellSpec
from fpdarts.space import DEFAULT_SUBSETS
from fpdarts.supernet import SuperNet
from fpdarts.training import autocast
from fpdarts.verify import Tolerance, cell_results, normal_numbers, results_of

# All by arithmetic: exact float32; tf32, with its 10 bits, which CUDA takes for float32 if it may; bf16, with its 7.
PART_TOLERANCE = {"float32": Tolerance(1e-5, 1e-4), "tf32": Tolerance(2e-3, 5e-3), "bf16": Tolerance(1e-2, 6e-2)}
# In a cell a pixel near a ReLU's zero, or one of two near maxima, sends its gradient another way when it is rounded:
# seldom in float32 (see check._worst), but with few bits always some. The reference's own were up to 0.07 and 0.16 off.
CELL_TOLERANCE = {"float32": Tolerance(1e-5, 1e-4), "tf32": Tolerance(2e-3, 0.15), "bf16": Tolerance(3e-2, 0.25)}
# All cells behind such a pixel follow: the gradients of a step, taken as one vector, show gross errors only.
STEP_TOLERANCE = {"float32": Tolerance(1e-3, 5e-2), "tf32": Tolerance(2e-2, 0.3), "bf16": Tolerance(5e-2, 0.5)}


@dataclass(frozen=True)
class Side:
    """What computes a case: a back end on a device, in a dtype of the weights. With amp bf16 states are bf16."""

    kernels: str
    device: torch.device
    dtype: torch.dtype
    amp: str

    def truth(self) -> "Side":
        """The reference in float64, which reads the same numbers."""
        return replace(self, kernels="reference", device=torch.device("cpu"), dtype=torch.float64)

    @property
    def rounded(self) -> torch.dtype:
        """What states and their gradients are rounded to."""
        return torch.bfloat16 if self.amp == "bf16" else torch.float32

    def weight(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def state(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.rounded)
        if self.dtype == torch.float64:
            tensor = tensor.double()
        return tensor.to(self.device, memory_format=torch.channels_last)

    def network(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.device.type == "meta":
            return twin(model, self.kernels, self.rounded)
        return model.to(self.device, self.dtype)

    def autocast(self):
        if self.device.type == "meta":  # there is none; states, and what is around cells, have its dtype all the same
            return nullcontext()
        return autocast("off" if self.dtype == torch.float64 else self.amp, self.device)

    def run(self, call: Callable, tensors: Mapping[str, Tensor], seed: int, asked: Iterable[str] | None = None):
        """verify.results_of, the forward under autocast; gradients of all tensors if it is not said of which."""

        def forward(leaves):
            with self.autocast():
                return call(leaves)

        return results_of(forward, tensors, tensors if asked is None else asked, seed, self.rounded)


class Case(NamedTuple):
    """setting: in words. compute: what a side makes of the numbers of a seed, by name; gradients begin with ``d_``."""

    setting: str
    compute: Callable[[Side, int], dict[str, Tensor | None]]
    tolerances: dict[str, Tolerance] = PART_TOLERANCE


class Shape(NamedTuple):
    """Of the states in a cell: C channels in K slices, and pixels a side."""

    channels: int
    partial: int
    size: int

    def __str__(self):
        return f"C/K={self.channels // self.partial}, K={self.partial}, {self.size}x{self.size}"


# The slices of a search on CIFAR, and an odd size with four slices. Few images: rounding does not grow with them, but
# the number of near ties does.
SHAPES = (Shape(16, 2, 32), Shape(32, 2, 16), Shape(64, 2, 8), Shape(16, 4, 7))
BATCH = 2
EDGES = 4  # of a stage: the most that leave one state
TERMS = 20  # in each slice of a node: five incoming edges, three normalized operations and the bypass
STEP_BATCH, STEP_CHANNELS, STEP_CELLS, STEP_SIZE = 4, 16, 8, 32


def _slice(state: Tensor, shape: Shape) -> Tensor:
    """What path 1 reads: not contiguous."""
    c = shape.channels // shape.partial
    return state[:, c : 2 * c]


def _state(side: Side, draw: Callable, shape: Shape) -> Tensor:
    return side.state(draw(BATCH, shape.channels, shape.size, shape.size))


def _stage(side, seed, shape, name, stride, own=False):
    draw, operation, c = normal_numbers(seed), OPERATIONS[name], shape.channels // shape.partial
    k = operation.kernel_size
    tensors = {
        "x": side.state(draw(BATCH, EDGES * c, shape.size, shape.size)) if own else _state(side, draw, shape),
        "depthwise": side.weight(draw(EDGES, k, k, c) / k),
        "pointwise": side.weight(draw(EDGES, c, c) / c**0.5),
    }

    def call(t):
        x = t["x"] if own else _slice(t["x"], shape)
        options = {"stride": stride, "dilation": operation.dilation, "kernels": side.kernels}
        return {"out": kernel_backends.stage(x, t["depthwise"], t["pointwise"], **options)}

    return side.run(call, tensors, seed)


def _pooling(side, seed, shape, name, stride):
    def call(t):
        return {"out": kernel_backends.pooling(_slice(t["x"], shape), name, stride=stride, kernels=side.kernels)}

    return side.run(call, {"x": _state(side, normal_numbers(seed), shape)}, seed)


def _factorized_reduction(side, seed, shape):
    draw, c = normal_numbers(seed), shape.channels // shape.partial
    tensors = {"x": _state(side, draw, shape)}
    tensors |= {name: side.weight(draw(EDGES, c, c // 2) / c**0.5) for name in ("even", "odd")}

    def call(t):
        x = _slice(t["x"], shape)
        return {"out": kernel_backends.factorized_reduction(x, t["even"], t["odd"], kernels=side.kernels)}

    return side.run(call, tensors, seed)


def _normalize(side, seed, shape, given=False):
    draw, channels = normal_numbers(seed), shape.channels
    mean, variance = side.weight(draw(channels)), side.weight(draw(channels).square() + 0.5)
    tensors = {"raw": side.state(1 + draw(BATCH, channels, shape.size, shape.size))}
    tensors["weight"] = side.weight(draw(channels))

    def call(t):
        statistics = (mean, variance) if given else None
        results = kernel_backends.normalize(t["raw"], t["weight"], statistics, kernels=side.kernels)
        return dict(zip(("out", "mean", "variance"), results))

    return side.run(call, tensors, seed, () if given else None)


def _stem(side, seed, shape, given=False):
    draw, channels = normal_numbers(seed), 3 * shape.channels
    images = side.state(1 + draw(BATCH, 3, shape.size, shape.size))
    mean, variance = side.weight(draw(channels)), side.weight(draw(channels).square() + 0.5)
    tensors = {"weight": side.weight(draw(channels, 3, 3, 3) / 27**0.5)}
    tensors |= {name: side.weight(draw(channels)) for name in ("scale", "shift")}

    def call(t):
        statistics = (mean, variance) if given else None
        results = kernel_backends.stem(images, *t.values(), statistics, kernels=side.kernels)
        return dict(zip(("out", "mean", "variance"), results))

    return side.run(call, tensors, seed)


def _node(side, seed, shape):
    draw, c = normal_numbers(seed), shape.channels // shape.partial
    tensors = {"coefficients": side.weight(draw(shape.partial, TERMS))}
    for s in range(shape.partial):
        for i in range(TERMS):
            tensors[f"term_{s}_{i}"] = side.state(draw(BATCH, c, shape.size, shape.size))

    def call(t):
        slices = [
            [(t[f"term_{s}_{i}"], coefficient if i else None) for i, coefficient in enumerate(row.unbind())]
            for s, row in enumerate(t["coefficients"].unbind())
        ]
        return {"out": kernel_backends.node(slices, kernels=side.kernels)}

    return side.run(call, tensors, seed)


GATES = {
    "path 0 only": lambda seed: torch.tensor([1.0, 0.0]).repeat(14, 1),
    "path 1 only": lambda seed: torch.tensor([0.0, 1.0]).repeat(14, 1),
    "both": lambda seed: torch.ones(14, 2),
    "expected": lambda seed: GateSampler(1, 14).expected()[0],
    "sampled": lambda seed: GateSampler(1, 14, seed=seed).sample()[0],
}
CELLS = ("normal", "reduction", "factorized input")
ARCHITECTURE = ("operation_weights", "edge_weights")


def _spec(kind: str, shape: Shape) -> CellSpec:
    """Of a cell whose nodes have these states; what comes before a reduction is half as wide."""
    wide, narrow = 4 * shape.channels, 2 * shape.channels
    inputs = {"normal": (wide, wide), "reduction": (narrow, narrow), "factorized input": (narrow, wide)}[kind]
    options = {"reduction": kind == "reduction", "factorized_input": kind == "factorized input"}
    return CellSpec(shape.channels, inputs, shape.partial, DEFAULT_SUBSETS, **options)


def _cell(side, seed, kind, shape, gates="both", asked="all"):
    """asked: for gradients of ``all``, of ``weights`` or of the ``architecture`` (and of inputs), or of ``none``."""
    spec, draw = _spec(kind, shape), normal_numbers(seed)
    edges, tensors = len(spec.edges), {}
    for i, wide in enumerate(spec.input_channels):
        pixels = 2 * shape.size if i == 0 and spec.factorized_input else shape.size
        tensors[f"input_{i}"] = side.state(draw(BATCH, wide, pixels, pixels))
    for name, parameter in spec.parameters.items():
        tensors[name] = side.weight(draw(*parameter.shape) * parameter.bound / 3**0.5)  # of a start's variance
    tensors["operation_weights"] = side.weight(draw(edges, len(spec.operations)).sigmoid())
    tensors["edge_weights"] = side.weight(draw(edges).sigmoid())
    statistics = None
    if asked == "none":
        table = spec.statistics_rows, spec.slice_channels
        statistics = side.weight(draw(*table)), side.weight(draw(*table).square() + 0.5)

    def call(t):
        options = {"gates": GATES[gates](seed), "statistics": statistics, "kernels": side.kernels}
        return cell_results(partial(kernel_backends.cell, **options), t, spec)

    without = {"all": (), "weights": ARCHITECTURE, "architecture": spec.parameters, "none": tensors}[asked]
    return side.run(call, tensors, seed, [name for name in tensors if name not in without])


# Of derived cells: C, and pixels a side of a normal cell's states; the sizes of retraining on CIFAR, and an odd one.
DERIVED_SHAPES = ((36, 32), (72, 16), (144, 8), (48, 7))
DERIVED_BATCH = 4  # so many that no channel has few samples
NORMAL = (
    ("sep_conv_3x3", 1), ("skip_connect", 0), ("dil_conv_3x3", 2), ("max_pool_3x3", 1), ("sep_conv_5x5", 2),
    ("avg_pool_3x3", 3), ("dil_conv_5x5", 3), ("skip_connect", 2),
)  # fmt: skip
REDUCE = (
    ("max_pool_3x3", 0), ("skip_connect", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 1), ("avg_pool_3x3", 1),
    ("skip_connect", 2), ("max_pool_3x3", 3), ("sep_conv_5x5", 0),
)  # fmt: skip
DERIVED = {
    "normal": (NORMAL, False, False),
    "reduction": (REDUCE, True, False),
    "factorized input": (NORMAL, False, True),
}  # all operations, at both strides


def _derived_cell(side, seed, kind, channels, size, drop_path=False, evaluation=False):
    edges, reduction, factorized = DERIVED[kind]
    before = channels // 2 if reduction else channels
    spec = DerivedCellSpec(channels, (4 * before, 4 * before), edges, (2, 3, 4, 5), reduction, factorized)
    draw, tensors = normal_numbers(seed), {}
    for i, wide in enumerate(spec.input_channels):
        pixels = 2 * size if factorized and i == 0 else size
        tensors[f"input_{i}"] = side.state(draw(DERIVED_BATCH, wide, pixels, pixels))
    for name, shape in spec.parameters.items():
        tensors[name] = side.weight(draw(*shape) / math.sqrt(math.prod(shape[1:])))
    scales, table = None, (len(spec.normalizations), channels)
    if drop_path:
        scales = side.weight((draw(len(edges), DERIVED_BATCH, 1, 1, 1) < 0.5) / 0.7)
    given = (side.weight(draw(*table)), side.weight(draw(*table).square() + 0.5)) if evaluation else None

    def call(t):
        inputs, weights = (t["input_0"], t["input_1"]), {name: t[name] for name in spec.parameters}
        out, statistics = kernel_backends.derived_cell(spec, inputs, weights, scales, given, kernels=side.kernels)
        return {"out": out} | ({"mean": statistics.mean, "variance": statistics.variance} if statistics else {})

    return side.run(call, tensors, seed, () if evaluation else None)


def _step(side, seed, trained):
    """Loss, logits and gradient of a step of the ``weights`` or of the ``architecture``, as the search takes it."""
    draw = normal_numbers(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SuperNet(10, STEP_CHANNELS, STEP_CELLS, kernels=side.kernels)
    model = side.network(model)
    images = side.state(draw(STEP_BATCH, 3, STEP_SIZE, STEP_SIZE))
    labels = (torch.arange(STEP_BATCH) % 10).to(side.device)
    gates = GateSampler(*model.gate_shape, seed=seed).sample()
    asked, resting = model.weight_parameters(), model.architecture_parameters()
    if trained == "architecture":
        asked, resting = resting, asked
    with frozen(resting):
        with side.autocast():
            logits = model(images, gates)
            loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, asked, allow_unused=True)
    missing = any(gradient is None for gradient in gradients)
    d_trained = None if missing else torch.cat([gradient.flatten() for gradient in gradients])
    return {"loss": loss, "logits": logits, f"d_{trained}": d_trained}


def operations(
    shapes: tuple[Shape, ...] | None = None, derived_shapes: tuple[tuple[int, int], ...] | None = None
) -> dict[str, list[Case]]:
    """Every operation that is checked, in all its settings; those of SHAPES and DERIVED_SHAPES if not given."""
    shapes, derived_shapes = shapes or SHAPES, derived_shapes or DERIVED_SHAPES

    def part(compute, *arguments, shapes=shapes, **options):
        def at(shape):
            return lambda side, seed: compute(side, seed, shape, *arguments, **options)

        return [Case(str(shape), at(shape)) for shape in shapes]

    def cell(kinds, shapes, **options):
        cases = []
        for kind in kinds:
            for shape in shapes:
                if kind == "reduction":
                    shape = shape._replace(size=shape.size + shape.size % 2)
                compute = partial(_cell, kind=kind, shape=shape, **options)
                cases.append(Case(f"{kind}, {shape}", compute, CELL_TOLERANCE))
        return cases

    found, small = {}, shapes[-2:-1]  # the last of an even size
    for name, operation in OPERATIONS.items():
        for stride in (1, 2):
            if operation.kind == "convolution":
                found[f"stage {name}, stride {stride}"] = part(_stage, name, stride)
            elif operation.kind == "pooling":
                found[f"pooling {name}, stride {stride}"] = part(_pooling, name, stride)
        if operation.stages == 2:
            found[f"stage {name}, a slice an edge"] = part(_stage, name, 1, own=True)
    even = [shape for shape in shapes if shape.size % 2 == 0]
    found["factorized_reduction"] = part(_factorized_reduction, shapes=even)
    found["normalize"] = part(_normalize)
    found["normalize, statistics given"] = part(_normalize, given=True)
    found["node"] = part(_node)
    found["stem"] = part(_stem)
    found["stem, statistics given"] = part(_stem, given=True)
    for kind in CELLS:
        found[f"cell, {kind}"] = cell([kind], shapes)
    for gates in GATES:
        found[f"cell, gates {gates}"] = cell(CELLS, small, gates=gates)
    for asked in ("weights", "architecture"):
        found[f"cell, gradients of {asked}"] = cell(CELLS, small, gates="sampled", asked=asked)
    found["cell, evaluation"] = cell(CELLS, small, gates="expected", asked="none")
    odd = derived_shapes[-1:]

    def derived(kinds, shapes, **options):
        cases = []
        for kind in kinds:
            for c, size in shapes:
                size += size % 2 * DERIVED[kind][1]
                compute = partial(_derived_cell, kind=kind, channels=c, size=size, **options)
                cases.append(Case(f"{kind}, C={c}, {size}x{size}", compute, CELL_TOLERANCE))
        return cases

    for kind in DERIVED:
        found[f"derived cell, {kind}"] = derived([kind], derived_shapes)
    found["derived cell, drop-path"] = derived(DERIVED, odd, drop_path=True)
    found["derived cell, evaluation"] = derived(DERIVED, odd, evaluation=True)
    for trained in ("weights", "architecture"):
        found[f"step of {trained}"] = [Case("a supernet", partial(_step, trained=trained), STEP_TOLERANCE)]
    return found
