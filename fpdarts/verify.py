"""Whether kernels compute in a running search what the reference computes: cell by cell, on the very numbers of a step.

An error is relative: the norm of the difference over the norm of what was expected. One that is not a number, of a
tensor that is missing, or of one in another shape, is infinite.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from fpdarts import kernels as kernel_backends
from fpdarts.errors import KernelMismatch
from fpdarts.kernels.spec import CellSpec
from fpdarts.network import CifarStem
from fpdarts.supernet import Cell, SuperNet
from fpdarts.training import autocast, backend_name


class Tolerance(NamedTuple):
    """Largest relative errors that rounding explains."""

    output: float
    gradient: float


# A gradient that all but vanishes beside the largest is rounding: it is judged by this share of the largest.
SHARE = 1e-3


def arithmetic(device: torch.device, amp: str) -> str:
    """Key of the tolerances."""
    if amp == "bf16":
        return "bf16"
    return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "float32"


@contextmanager
def one_precision():
    """Convolutions of cuDNN take tf32 unless told otherwise; here only where matrix products may."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed and torch.get_float32_matmul_precision() != "highest"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def normal_numbers(seed: int) -> Callable[..., Tensor]:
    """Draws normal numbers in a shape."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def is_gradient(name: str) -> bool:
    return name.startswith("d_")


def results_of(
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


def cell_results(call_cell: Callable, tensors: Mapping[str, Tensor], spec: CellSpec) -> dict[str, Tensor]:
    """A cell's ``out`` and its Statistics by name. call_cell: takes the first arguments of ``kernels.cell``."""
    inputs, weights = (tensors["input_0"], tensors["input_1"]), {name: tensors[name] for name in spec.parameters}
    out, statistics = call_cell(spec, inputs, weights, tensors["operation_weights"], tensors["edge_weights"])
    return {"out": out} | (statistics._asdict() if statistics else {})


def relative_errors(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Of every expected tensor, by name; names of gradients begin with ``d_``."""
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    least = SHARE * max((norm for name, norm in norms.items() if is_gradient(name)), default=0.0)
    errors = {}
    for name, tensor in expected.items():
        ours, error = found.get(name), math.inf
        if ours is not None and ours.shape == tensor.shape:
            difference = (ours.detach().to(tensor.device).double() - tensor.double()).norm().item()
            error = difference / max(norms[name], least if is_gradient(name) else 0.0, 1e-30)
        errors[name] = math.inf if math.isnan(error) else error
    return errors


# Of a cell, by arithmetic: exact float32; tf32, with its 10 bits, which CUDA takes for float32 if it may; bf16, with
# its 7. Of a search's many steps some have a pixel near a ReLU's zero, or two near maxima, whose gradient goes another
# way.
VERIFY_TOLERANCE = {"float32": Tolerance(1e-3, 1e-2), "tf32": Tolerance(1e-2, 0.15), "bf16": Tolerance(5e-2, 0.2)}


def verify_step(model: SuperNet, images: Tensor, gates: Tensor, amp: str, step: int):
    """Computes every cell of a step forward and backward by the model's back end and by the reference in float32, and
    the stem where the back end has a kernel for it.

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
    if isinstance(model.stem[0], CifarStem):
        hooks.append(model.stem[0].register_forward_pre_hook(partial(_verify_stem, f"step {step}: stem", amp, step)))
    try:
        with torch.no_grad(), one_precision(), autocast(amp, images.device):
            functional_call(model, buffers, (images, gates))
    finally:
        for hook in hooks:
            hook.remove()


def _verify_cell(where: str, amp: str, seed: int, cell: Cell, arguments: tuple):
    """A forward pre-hook: compares, before the cell is computed, what its arguments come to."""
    inputs, operation_weights, edge_weights, gates, asked = arguments
    tensors = {"input_0": inputs[0], "input_1": inputs[1], **dict(cell.named_parameters(recurse=False))}
    tensors |= {"operation_weights": operation_weights, "edge_weights": edge_weights}

    def results(kernels, leaves):
        return cell_results(partial(kernel_backends.cell, gates=gates, kernels=kernels), leaves, cell.spec)

    _verify(where, results, tensors, ("input_0", "input_1"), asked, amp, seed)


def _verify_stem(where: str, amp: str, seed: int, stem: CifarStem, arguments: tuple):
    """The same of a stem."""
    images, asked = arguments
    if not kernel_backends.offers("stem", asked, images):
        return
    convolution, norm = stem
    tensors = {"images": images, "weight": convolution.weight, "scale": norm.weight, "shift": norm.bias}

    def results(kernels, leaves):
        return dict(zip(("out", "mean", "variance"), kernel_backends.stem(*leaves.values(), kernels=kernels)))

    _verify(where, results, tensors, ("images",), asked, amp, seed)


def _verify(
    where: str,
    results: Callable[[str, dict[str, Tensor]], dict[str, Tensor]],
    tensors: dict[str, Tensor],
    inputs: tuple[str, ...],
    asked: str,
    amp: str,
    seed: int,
):
    """results: of the back end of that name. inputs: of the tensors those that are maps. asked: the back end.

    Where gradients alone are off, a tensor is judged by the smaller of its errors on two inputs, the second 1 % off:
    the pixels whose gradient goes another way are then others, but an error stays.
    """
    like = tensors[inputs[-1]]
    name, tolerance = backend_name(asked, like.device, amp), VERIFY_TOLERANCE[arithmetic(like.device, amp)]

    def allowed(tensor):
        return tolerance.gradient if is_gradient(tensor) else tolerance.output

    def excess(tensor):
        return errors[tensor] / allowed(tensor)

    errors = _errors(results, tensors, like, name, amp, seed)
    wrong = [tensor for tensor in errors if excess(tensor) > 1]
    if wrong and all(is_gradient(tensor) and errors[tensor] < math.inf for tensor in wrong):
        draw = normal_numbers(seed)
        maps = {key: tensors[key] for key in inputs}
        moved = {key: x + 0.01 * x.std() * draw(*x.shape).to(x) for key, x in maps.items()}
        again = _errors(results, tensors | moved, like, name, amp, seed)
        errors = {tensor: min(error, again.get(tensor, error)) for tensor, error in errors.items()}
    worst = max(errors, key=excess, default=None)
    if worst is not None and excess(worst) > 1:
        cure = "the run goes on from its last checkpoint with --kernels reference, --resume and its --out"
        if name == "reference":
            cure = "start anew with --amp off"
        raise KernelMismatch(
            f"{where} {worst} is off by {errors[worst]:.1e}, relative; allowed {allowed(worst):g} (kernels {name} "
            f"against reference). `fpdarts check-kernels --kernels {name}` says more; {cure}"
        )


def _errors(
    results: Callable, tensors: dict[str, Tensor], like: Tensor, kernels: str, amp: str, seed: int
) -> dict[str, float]:
    """Of a back end against the reference in float32, without what is not finite there, and without any where an output
    is not (its gradients then mean nothing): a run that has diverged says so itself. like: one of the maps."""

    def of(kernels, amp, tensors):
        def call(leaves):
            with autocast(amp, like.device):
                return results(kernels, leaves)

        return results_of(call, tensors, tensors, seed, like.dtype)

    with autocast("off", like.device):  # as in a step, where backward passes are outside of it
        found = of(kernels, amp, tensors)
        expected = of("reference", "off", {name: tensor.float() for name, tensor in tensors.items()})
    finite = {n: tensor for n, tensor in expected.items() if tensor is not None and tensor.isfinite().all()}
    if any(name not in finite for name in expected if not is_gradient(name)):
        return {}
    return relative_errors(found, finite)
