"""What is timed: a step of the search or of retraining, a cell, or one of a cell's parts, on one side.

All sides of a case start from the same weights and images, made from one seed, and compute the same numbers:
``check`` says so before anything is timed.
"""

import math

import torch
from torch import Tensor

from benchmarks import parts, steps
from benchmarks.setting import Case, Setting
from benchmarks.sides import Side
from fpdarts.verify import SHARE, arithmetic

STEPS = ("search-step", "arch-step", "retrain-step")
PARTS = ("cell", "stage", "pooling", "node")

# What a case is timed with where nothing else is said.
DEFAULTS = {
    **dict.fromkeys((*STEPS, *PARTS), Setting()),
    "retrain-step": Setting(batch_size=32, init_channels=36, cells=20),
    "pooling": Setting(operation="max_pool_3x3"),
}


def build(what: str, side: Side, setting: Setting) -> Case:
    """Raises ValueError for a case that the side does not have."""
    if side.graph and what not in STEPS:
        raise ValueError(f"{what} is not timed under a CUDA graph; leave +graph off")
    torch.manual_seed(0)
    if what in ("search-step", "arch-step"):
        return steps.search_step(side, setting, what == "arch-step")
    if what == "retrain-step":
        return steps.retrain_step(side, setting)
    return getattr(parts, what)(side, setting)


# Relative errors (of norms) that the order of sums explains, by arithmetic (verify.arithmetic).
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "bf16": 5e-2}
# A step passes many ReLUs and maxima, and where two orders of summation choose differently, a pixel goes another way.
# Through 20 cells that has been seen to turn logits by 2e-4 and gradients by 5 %. So gradients of steps are compared as
# one vector, for gross errors; small ones are for cells and parts to show.
STEP_TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bf16": 5e-2}
STEP_GRADIENT_TOLERANCE = {"float32": 0.2, "tf32": 0.3, "bf16": 0.5}


def check(what: str, side: Side, setting: Setting, case: Case, expected: dict[str, Tensor]):
    """Makes call 0 and raises AssertionError, naming the tensor, where its results are not those expected."""
    case.step(0)
    results = case.results()
    assert results.keys() == expected.keys(), f"{what} on {side}: only one side has {results.keys() ^ expected.keys()}"
    norms = {name: value.double().norm().item() for name, value in expected.items()}
    errors = {name: (results[name].double() - value.double()).norm().item() for name, value in expected.items()}
    gradients = [name for name in expected if name.startswith("d_")]
    computed = arithmetic(torch.device(setting.device), "bf16" if side.bf16 else "off")
    tolerance = (STEP_TOLERANCE if what in STEPS else TOLERANCE)[computed]
    if what == "retrain-step" and side.bf16:
        # Through 20 cells PyTorch's own bf16 turns logits by 0.3 and gradients by 1.4, as much as unrelated ones: that
        # kernels are right is for cells to show (check-kernels), here only the loss tells anything.
        gradients, errors = [], {"loss": errors["loss"]}
    if what in STEPS and gradients:
        error = math.hypot(*(errors.pop(name) for name in gradients)) / math.hypot(*(norms[name] for name in gradients))
        allowed = STEP_GRADIENT_TOLERANCE[computed]
        assert error <= allowed, (
            f"{what} on {side}: its gradients are off by {error:.1e}, relative; allowed {allowed:g}"
        )
    largest = max((norms[name] for name in gradients), default=0)
    for name, error in errors.items():
        # a gradient that all but vanishes beside the largest is rounding
        error /= max(norms[name], SHARE * largest if name in gradients else 1e-12)
        # not "error > tolerance": NaN is an error too
        assert error <= tolerance, f"{what} on {side}: {name} is off by {error:.1e}, relative; allowed {tolerance:g}"


def reference_results(what: str, setting: Setting) -> dict[str, Tensor]:
    """Of call 0, on the reference back end."""
    case = build(what, Side("reference"), setting)
    case.step(0)
    return {name: value.detach().clone() for name, value in case.results().items()}
