"""Whether kernels compute on this machine what the reference computes: every operation of ``fpdarts.kernels``, cells of
derived networks and whole steps of the supernet, against the reference in float64 on the CPU.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from fpdarts import kernels as kernel_backends
from fpdarts.ahead import compile_launches
from fpdarts.check_cases import Case, Side, operations
from fpdarts.training import backend_name, select_device
from fpdarts.verify import Tolerance, arithmetic, is_gradient, one_precision, relative_errors

SEEDS = range(7)


def _outcome(case: Case, side: Side, seed: int) -> dict[str, float]:
    """Errors by name. A back end that raises has an infinite one, under the name of what it raised."""
    try:
        found = case.compute(side, seed)
        # here, for a GPU tells what a kernel did wrong only when its results are waited for
        found = {name: None if tensor is None else tensor.detach().cpu() for name, tensor in found.items()}
    except Exception as error:  # whatever it is: the table says so, and the other operations are still checked
        return {f"{type(error).__name__} ({str(error).partition(chr(10))[0]})": math.inf}
    return relative_errors(found, case.compute(side.truth(), seed))


def _lacking(operation: str, side: Side) -> str | None:
    """The reason why the side's back end has no such operation; None for one that every back end has."""
    optional = {"derived": "derived_cell", "stem": "stem"}.get(re.match(r"\w+", operation).group())
    return optional and kernel_backends.available(side.device.type, optional)[side.kernels]


def compute_all(checked: Mapping[str, list[Case]], side: Side):
    """Every case of operations once: on the meta device this tells what a back end launches."""
    for operation, cases in checked.items():
        for case in () if _lacking(operation, side) else cases:
            case.compute(side, SEEDS[0])


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
        gradients = [entry for entry in errors if is_gradient(entry[1])]
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
    kernels: str = "auto",
    device: str = "auto",
    amp: str = "off",
    say: Callable[[str], None] = print,
    checked: Mapping[str, list[Case]] | None = None,
) -> dict:
    """Checks every operation of a back end against the reference in float64 on the CPU.

    kernels: the back end, or auto. say: is given the lines of a table, as they are known. checked: cases of each
    operation; None for all of check_cases.operations.
    Returns {kernels, device, amp, rows: [{operation, output_error, gradient_error (None: has none), output_tolerance,
    gradient_tolerance, worst: the tensor and the setting nearest to, or farthest out of, its tolerance, passed}],
    passed}.
    Raises ValueError for an unknown back end or device and BackendUnavailable for a back end that cannot run.
    """
    chosen = select_device(device)
    name = backend_name(kernels, chosen, amp)
    checked = operations() if checked is None else checked
    side = Side(name, chosen, torch.float32, amp)
    say(f"kernels {name} on {chosen}, mixed precision {amp}: relative errors against the reference in float64")
    say(_columns("operation", "output", "allowed", "gradient", "allowed", "worst"))
    rows = []
    with one_precision():
        compile_launches(partial(compute_all, checked, replace(side, device=torch.device("meta"))), name, chosen)
        for operation, cases in checked.items():
            if lacking := _lacking(operation, side):
                say(f"{operation}: {lacking}")
                continue
            rows.append(_row(operation, cases, side))
            say(_line(rows[-1]))
    passed = all(row["passed"] for row in rows)
    return {"kernels": name, "device": str(chosen), "amp": amp, "rows": rows, "passed": passed}
