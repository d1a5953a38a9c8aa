"""Whether kernels compute on this machine what the reference computes: part by part, or within a running search.

``check_kernels`` compares every operation of ``fpdarts.kernels``, and whole steps of the supernet, with the reference
in float64 on the CPU. ``verify_step`` compares the cells of a supernet in training, on the very numbers of a step.

An error is relative: the norm of the difference over the norm of what was expected. One that is not a number, of a
tensor that is missing, or of one in another shape, is infinite.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fpdarts import kernels as kernel_backends
from fpdarts.architect import frozen
from fpdarts.errors import KernelMismatch
from fpdarts.gates import GateSampler
from fpdarts.kernels.spec import OPERATIONS, CellSpec
from fpdarts.space import DEFAULT_SUBSETS
from fpdarts.supernet import Cell, SuperNet
from fpdarts.training import autocast, select_device


class Tolerance(NamedTuple):
    """Largest relative errors that rounding explains."""

    output: float
    gradient: float


# All by arithmetic: exact float32; tf32, with its 10 bits, which CUDA takes for float32 if it may; bf16, with its 7.
PART_TOLERANCE = {"float32": Tolerance(1e-5, 1e-4), "tf32": Tolerance(2e-3, 5e-3), "bf16": Tolerance(1e-2, 6e-2)}
# In a cell a pixel near a ReLU's zero, or one of two near maxima, sends its gradient another way when it is rounded:
# seldom in float32 (see _worst), but with few bits always some. The reference's own were up to 0.07 and 0.16 off.
CELL_TOLERANCE = {"float32": Tolerance(1e-5, 1e-4), "tf32": Tolerance(2e-3, 0.15), "bf16": Tolerance(3e-2, 0.25)}
# All cells behind such a pixel follow: the gradients of a step, taken as one vector, show gross errors only.
STEP_TOLERANCE = {"float32": Tolerance(1e-3, 5e-2), "tf32": Tolerance(2e-2, 0.3), "bf16": Tolerance(5e-2, 0.5)}
# Of a cell in a search, which has many steps, and so some with such pixels even in float32.
VERIFY_TOLERANCE = {"float32": Tolerance(1e-3, 1e-2), "tf32": Tolerance(1e-2, 0.15), "bf16": Tolerance(5e-2, 0.2)}

# A gradient that all but vanishes beside the largest is rounding: it is judged by this share of the largest.
SHARE = 1e-3


def arithmetic(device: torch.device, amp: str) -> str:
    """Key of the tolerances."""
    if amp == "bf16":
        return "bf16"
    return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "float32"


@contextmanager
def _one_precision():
    """Convolutions of cuDNN take tf32 unless told otherwise; here only where matrix products may."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed and torch.get_float32_matmul_precision() != "highest"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _backend_name(name: str, device: torch.device) -> str:
    """Of the back end that runs there, also for auto."""
    return kernel_backends.backend(name, device.type).__name__.rpartition(".")[2]


def _is_gradient(name: str) -> bool:
    return name.startswith("d_")


def _results(
    call: Callable, tensors: Mapping[str, Tensor], asked: Iterable[str], seed: int, rounded: torch.dtype
) -> dict[str, Tensor | None]:
    """What call makes of the tensors, and ``d_<name>``, the gradients of those asked for (None where one is missing).

    call: takes leaves under the names of the tensors, returns tensors by name; ``out`` among them is differentiated,
        its incoming gradient is random. rounded: what that is rounded to, so that it is the same in every dtype.
    """
    asked = list(asked)
    with torch.enable_grad():
        leaves = {name: tensor.detach().requires_grad_(name in asked) for name, tensor in tensors.items()}
        results = call(leaves)
        if asked:
            out = results["out"]
            incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(rounded).to(out)
            gradients = torch.autograd.grad(out, [leaves[name] for name in asked], incoming, allow_unused=True)
            results |= {f"d_{name}": gradient for name, gradient in zip(asked, gradients)}
    return results


def _cell_results(call_cell: Callable, tensors: Mapping[str, Tensor], spec: CellSpec) -> dict[str, Tensor]:
    """A cell's ``out`` and its Statistics by name. call_cell: takes the first arguments of ``kernels.cell``."""
    inputs, weights = (tensors["input_0"], tensors["input_1"]), {name: tensors[name] for name in spec.parameters}
    out, statistics = call_cell(spec, inputs, weights, tensors["operation_weights"], tensors["edge_weights"])
    return {"out": out} | (statistics._asdict() if statistics else {})


def relative_errors(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Of every expected tensor, by name; names of gradients begin with ``d_``."""
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    least = SHARE * max((norm for name, norm in norms.items() if _is_gradient(name)), default=0.0)
    errors = {}
    for name, tensor in expected.items():
        ours, error = found.get(name), math.inf
        if ours is not None and ours.shape == tensor.shape:
            difference = (ours.detach().to(tensor.device).double() - tensor.double()).norm().item()
            error = difference / max(norms[name], least if _is_gradient(name) else 0.0, 1e-30)
        errors[name] = math.inf if math.isnan(error) else error
    return errors


# --- check_kernels: what computes, and what is computed ---------------------------------------------------------------


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

    def autocast(self):
        return autocast("off" if self.dtype == torch.float64 else self.amp, self.device)

    def run(self, call: Callable, tensors: Mapping[str, Tensor], seed: int, asked: Iterable[str] | None = None):
        """_results, the forward under autocast; gradients of all tensors if it is not said of which."""

        def forward(leaves):
            with self.autocast():
                return call(leaves)

        return _results(forward, tensors, tensors if asked is None else asked, seed, self.rounded)


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
SEEDS = range(7)


def _draw(seed: int) -> Callable[..., Tensor]:
    """Draws normal numbers in a shape."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def _slice(state: Tensor, shape: Shape) -> Tensor:
    """What path 1 reads: not contiguous."""
    c = shape.channels // shape.partial
    return state[:, c : 2 * c]


def _state(side: Side, draw: Callable, shape: Shape) -> Tensor:
    return side.state(draw(BATCH, shape.channels, shape.size, shape.size))


def _stage(side, seed, shape, name, stride, own=False):
    draw, operation, c = _draw(seed), OPERATIONS[name], shape.channels // shape.partial
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

    return side.run(call, {"x": _state(side, _draw(seed), shape)}, seed)


def _factorized_reduction(side, seed, shape):
    draw, c = _draw(seed), shape.channels // shape.partial
    tensors = {"x": _state(side, draw, shape)}
    tensors |= {name: side.weight(draw(EDGES, c, c // 2) / c**0.5) for name in ("even", "odd")}

    def call(t):
        x = _slice(t["x"], shape)
        return {"out": kernel_backends.factorized_reduction(x, t["even"], t["odd"], kernels=side.kernels)}

    return side.run(call, tensors, seed)


def _normalize(side, seed, shape, given=False):
    draw, channels = _draw(seed), shape.channels
    mean, variance = side.weight(draw(channels)), side.weight(draw(channels).square() + 0.5)
    tensors = {"raw": side.state(1 + draw(BATCH, channels, shape.size, shape.size))}
    tensors["weight"] = side.weight(draw(channels))

    def call(t):
        statistics = (mean, variance) if given else None
        results = kernel_backends.normalize(t["raw"], t["weight"], statistics, kernels=side.kernels)
        return dict(zip(("out", "mean", "variance"), results))

    return side.run(call, tensors, seed, () if given else None)


def _node(side, seed, shape):
    draw, c = _draw(seed), shape.channels // shape.partial
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
    spec, draw = _spec(kind, shape), _draw(seed)
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
        return _cell_results(partial(kernel_backends.cell, **options), t, spec)

    without = {"all": (), "weights": ARCHITECTURE, "architecture": spec.parameters, "none": tensors}[asked]
    return side.run(call, tensors, seed, [name for name in tensors if name not in without])


def _step(side, seed, trained):
    """Loss, logits and gradient of a step of the ``weights`` or of the ``architecture``, as the search takes it."""
    draw = _draw(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SuperNet(10, STEP_CHANNELS, STEP_CELLS, kernels=side.kernels)
    model.to(side.device, side.dtype)
    images = side.weight(draw(STEP_BATCH, 3, STEP_SIZE, STEP_SIZE))
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
    if any(gradient is None for gradient in gradients):
        return {"loss": loss, "logits": logits, f"d_{trained}": None}
    return {"loss": loss, "logits": logits, f"d_{trained}": torch.cat([g.flatten() for g in gradients])}


def operations() -> dict[str, list[Case]]:
    """Every operation that is checked, in all its settings."""

    def part(compute, *arguments, shapes=SHAPES, **options):
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

    found, small = {}, SHAPES[-2:-1]
    for name, operation in OPERATIONS.items():
        for stride in (1, 2):
            if operation.kind == "convolution":
                found[f"stage {name}, stride {stride}"] = part(_stage, name, stride)
            elif operation.kind == "pooling":
                found[f"pooling {name}, stride {stride}"] = part(_pooling, name, stride)
        if operation.stages == 2:
            found[f"stage {name}, a slice an edge"] = part(_stage, name, 1, own=True)
    even = [shape for shape in SHAPES if shape.size % 2 == 0]
    found["factorized_reduction"] = part(_factorized_reduction, shapes=even)
    found["normalize"] = part(_normalize)
    found["normalize, statistics given"] = part(_normalize, given=True)
    found["node"] = part(_node)
    for kind in CELLS:
        found[f"cell, {kind}"] = cell([kind], SHAPES)
    for gates in GATES:
        found[f"cell, gates {gates}"] = cell(CELLS, small, gates=gates)
    for asked in ("weights", "architecture"):
        found[f"cell, gradients of {asked}"] = cell(CELLS, small, gates="sampled", asked=asked)
    found["cell, evaluation"] = cell(CELLS, small, gates="expected", asked="none")
    for trained in ("weights", "architecture"):
        found[f"step of {trained}"] = [Case("a supernet", partial(_step, trained=trained), STEP_TOLERANCE)]
    return found


def _outcome(case: Case, side: Side, seed: int) -> dict[str, float]:
    """Errors by name. A back end that raises has an infinite one, under the name of what it raised."""
    try:
        found = case.compute(side, seed)
    except Exception as error:  # whatever it is: the table says so, and the other operations are still checked
        return {f"{type(error).__name__} ({str(error).partition(chr(10))[0]})": math.inf}
    return relative_errors(found, case.compute(side.truth(), seed))


def _worst(case: Case, side: Side, tolerance: Tolerance) -> tuple[tuple[float, str], tuple[float, str] | None]:
    """(error, tensor) of the worst output and of the worst gradient, None if none was asked for.

    A pre-activation within rounding of 0, or two maxima within rounding of each other, send a gradient another way in
    another order of summation. One such pixel turns a gradient by 1e-4 to 1e-2 though nothing is wrong, and about one
    cell in twenty has one. A true error shows with all numbers, a tie does not: where a gradient alone is out of
    tolerance the case is repeated with other seeds, and the median is reported. Seven, because with three, two would
    have a tie in one of the thirty-odd cells on every fifth machine. What is not finite is no tie.
    """

    def once(seed):
        errors = [(error, name) for name, error in _outcome(case, side, seed).items()]
        gradients = [entry for entry in errors if _is_gradient(entry[1])]
        return max(entry for entry in errors if entry not in gradients), max(gradients, default=None)

    output, gradient = once(SEEDS[0])
    if gradient is None or not tolerance.gradient < gradient[0] < math.inf:
        return output, gradient
    outputs, gradients = zip((output, gradient), *(once(seed) for seed in SEEDS[1:]))
    ranked = sorted(entry for entry in gradients if entry is not None)
    return max(outputs), ranked[-1] if ranked[-1][0] == math.inf else ranked[len(ranked) // 2]


def _row(operation: str, cases: list[Case], side: Side) -> dict:
    """What check_kernels says of an operation."""
    tolerance = cases[0].tolerances[arithmetic(side.device, side.amp)]
    shares, worst = [], {"output": None, "gradient": None}
    for case in cases:
        for kind, entry in zip(("output", "gradient"), _worst(case, side, tolerance)):
            if entry is not None:
                shares.append((entry[0] / getattr(tolerance, kind), f"{entry[1]}, {case.setting}"))
                worst[kind] = entry[0] if worst[kind] is None else max(worst[kind], entry[0])
    share, where = max(shares)
    return {
        "operation": operation,
        **{f"{kind}_error": error for kind, error in worst.items()},
        "output_tolerance": tolerance.output,
        "gradient_tolerance": tolerance.gradient,
        "worst": where,
        "passed": share <= 1,
    }


def _columns(operation, output, output_tolerance, gradient, gradient_tolerance, worst) -> str:
    return f"{operation:35}{output:>9}{output_tolerance:>9}{gradient:>11}{gradient_tolerance:>9}  {worst}"


def _line(row: dict) -> str:
    def number(name):
        return "-" if row[name] is None else f"{row[name]:.0e}"

    names = "output_error", "output_tolerance", "gradient_error", "gradient_tolerance"
    return _columns(row["operation"], *map(number, names), ("" if row["passed"] else "WRONG: ") + row["worst"])


def check_kernels(
    kernels: str = "auto", device: str = "auto", amp: str = "off", say: Callable[[str], None] = print
) -> dict:
    """Checks every operation of a back end against the reference in float64 on the CPU.

    kernels: the back end, or auto. say: is given the lines of a table, as they are known.
    Returns {kernels, device, amp, rows: [{operation, output_error, gradient_error (None: has none), output_tolerance,
    gradient_tolerance, worst: the tensor and the setting nearest to, or farthest out of, its tolerance, passed}],
    passed}.
    Raises ValueError for an unknown back end or device and BackendUnavailable for a back end that cannot run.
    """
    chosen = select_device(device)
    name = _backend_name(kernels, chosen)
    side = Side(name, chosen, torch.float32, amp)
    say(f"kernels {name} on {chosen}, mixed precision {amp}: relative errors against the reference in float64")
    say(_columns("operation", "output", "allowed", "gradient", "allowed", "worst"))
    rows = []
    with _one_precision():
        for operation, cases in operations().items():
            rows.append(_row(operation, cases, side))
            say(_line(rows[-1]))
    passed = all(row["passed"] for row in rows)
    return {"kernels": name, "device": str(chosen), "amp": amp, "rows": rows, "passed": passed}


# --- verify_step: a supernet in training ------------------------------------------------------------------------------


def verify_step(model: SuperNet, images: Tensor, gates: Tensor, amp: str, step: int):
    """Computes every cell of a step forward and backward by the model's back end and by the reference in float32.

    Both get the inputs, weights and gates that the cell has in this step, and the same random gradient of its output:
    with gradients of the whole network, one pixel that went another way would hide what a cell did wrong. Running
    statistics, gradients and the global random state are left as they are.

    model: in training mode. images: (N, 3, H, W). gates: (cells, edges, paths). step: its number, for the message.
    Raises KernelMismatch, naming step, cell and tensor.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hooks = [
        cell.register_forward_pre_hook(partial(_verify_cell, f"step {step}: cells.{i}", amp, step))
        for i, cell in enumerate(model.cells)
    ]
    try:
        with torch.no_grad(), _one_precision(), autocast(amp, images.device):
            functional_call(model, buffers, (images, gates))
    finally:
        for hook in hooks:
            hook.remove()


def _verify_cell(where: str, amp: str, seed: int, cell: Cell, arguments: tuple):
    """A forward pre-hook: compares, before the cell is computed, what its arguments come to.

    Where gradients alone are off, a tensor is judged by the smaller of its errors on two inputs, the second 1 % off:
    the pixels whose gradient goes another way are then others, but an error stays.
    """
    inputs, operation_weights, edge_weights, gates, asked = arguments
    name = _backend_name(asked, inputs[0].device)
    tensors = {"input_0": inputs[0], "input_1": inputs[1], **dict(cell.named_parameters(recurse=False))}
    tensors |= {"operation_weights": operation_weights, "edge_weights": edge_weights}
    tolerance = VERIFY_TOLERANCE[arithmetic(inputs[0].device, amp)]

    def allowed(tensor):
        return tolerance.gradient if _is_gradient(tensor) else tolerance.output

    def excess(tensor):
        return errors[tensor] / allowed(tensor)

    errors = _cell_errors(cell.spec, tensors, gates, name, amp, seed)
    wrong = [tensor for tensor in errors if excess(tensor) > 1]
    if wrong and all(_is_gradient(tensor) and errors[tensor] < math.inf for tensor in wrong):
        draw = _draw(seed)
        moved = {f"input_{i}": x + 0.01 * x.std() * draw(*x.shape).to(x) for i, x in enumerate(inputs)}
        again = _cell_errors(cell.spec, tensors | moved, gates, name, amp, seed)
        errors = {tensor: min(error, again.get(tensor, error)) for tensor, error in errors.items()}
    worst = max(errors, key=excess, default=None)
    if worst is not None and excess(worst) > 1:
        raise KernelMismatch(
            f"{where} {worst} is off by {errors[worst]:.1e}, relative; allowed {allowed(worst):g} (kernels {name} "
            f"against reference). `fpdarts check-kernels --kernels {name}` says more; the run goes on from its last "
            "checkpoint with --kernels reference, --resume and its --out"
        )


def _cell_errors(
    spec: CellSpec, tensors: dict[str, Tensor], gates: Tensor, kernels: str, amp: str, seed: int
) -> dict[str, float]:
    """Of a back end against the reference in float32, without what is not finite there: a run that has diverged says so
    itself."""
    device, rounded = tensors["input_1"].device, tensors["input_1"].dtype

    def results(kernels, amp, tensors):
        def call(leaves):
            with autocast(amp, device):
                return _cell_results(partial(kernel_backends.cell, gates=gates, kernels=kernels), leaves, spec)

        return _results(call, tensors, tensors, seed, rounded)

    with autocast("off", device):  # as in a step, where backward passes are outside of it
        found = results(kernels, amp, tensors)
        expected = results("reference", "off", {name: tensor.float() for name, tensor in tensors.items()})
    finite = {n: tensor for n, tensor in expected.items() if tensor is not None and tensor.isfinite().all()}
    return relative_errors(found, finite)
