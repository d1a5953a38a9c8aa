"""check-kernels on compiled Triton kernels, without a GPU: they run on the CPU as they were compiled for one.

    python -m benchmarks.emulate [--arch 90] [--dtypes bfloat16 tf32 float32] [--operations REGEX] [--json]

The cases, tolerances and table are those of check-kernels. Triton compiles each kernel to PTX, which is run instruction
by instruction (benchmarks.emulator), with warps and blocks in random order. Told besides is what a result may not show:
races in shared memory, reads of what was not written, accesses out of bounds or misaligned, copies and products that
nobody waits for. Exit status 1 where a result is out of tolerance or a kernel does any of these. Needs triton and a C++
compiler. Compiling takes most of the time, some minutes for each dtype, and is cached.
"""

import json
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch
from fpdarts.kernels.triton.launch import compiling

from benchmarks.emulator.driver import emulating
from fpdarts import check
from fpdarts.check_cases import Side, operations


@dataclass(frozen=True)
class Options:
    arch: Literal[80, 86, 89, 90, 120] = 90
    """Compute capability times ten."""
    dtypes: tuple[Literal["float32", "bfloat16", "tf32"], ...] = ("bfloat16", "tf32", "float32")
    """tf32: float32 with torch.set_float32_matmul_precision("high")."""
    operations: str = ""
    """Only those of check-kernels in whose names this regular expression is found."""
    json: bool = False


def emulate(arch: int, dtype: str, pattern: str = "", say: Callable[[str], None] = print, shapes=None) -> dict:
    """What check_kernels returns, and faults: in words, programs and instructions (of warps): how many ran.

    shapes: as check_cases.operations takes them. Raises ValueError where no operation has such a name, kernels are
    interpreted, or there is no C++ compiler.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--operations {pattern!r} is no regular expression: {error}") from None
    checked = {name: cases for name, cases in operations(shapes).items() if re.search(pattern, name)}
    if not checked:
        raise ValueError(f"no operation's name has {pattern!r} in it")
    amp = "bf16" if dtype == "bfloat16" else "off"
    with emulating(arch) as gpu, precision(dtype), poisoned_memory():
        with compiling():
            check.compute_all(checked, Side("triton", torch.device("meta"), torch.float32, amp))
        if "node" in checked:  # its terms are told as distances from the first one
            checked["node"] = [case._replace(compute=_unbounded(gpu, case.compute)) for case in checked["node"]]
        found = check.check_kernels("triton", "cpu", amp, say, checked)
    ran = {
        "faults": gpu.faults,
        "programs": len(gpu.programs),
        "instructions": sum(counts["instructions"] for _, counts in gpu.launches),
    }
    return found | ran | {"passed": found["passed"] and not gpu.faults}


def _unbounded(gpu, compute):
    def computed(side, seed):
        gpu.bounded = False
        try:
            return compute(side, seed)
        finally:
            gpu.bounded = True

    return computed


@contextmanager
def precision(dtype: str):
    """Of the kernels' products, and of the tolerances, which for a CPU do not know tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        with patch.object(check, "arithmetic", lambda *_: "bf16" if dtype == "bfloat16" else dtype):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def poisoned_memory():
    """New tensors that nobody filled are full of nan."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def main(options: Options) -> dict:
    say = (lambda line: print(line, file=sys.stderr)) if options.json else print
    results = {dtype: emulate(options.arch, dtype, options.operations, say) for dtype in options.dtypes}
    return {"arch": options.arch, "dtypes": results, "passed": all(result["passed"] for result in results.values())}


def show(result: dict) -> str:
    lines = []
    for dtype, ran in result["dtypes"].items():
        lines += [f"FAULT {fault.strip()}" for fault in ran["faults"]]
        lines.append(
            f"{dtype}, sm_{result['arch']}: {ran['programs']} compiled kernels, {ran['instructions']:,} instructions "
            f"of warps, {len(ran['faults'])} faults told, {'passed' if ran['passed'] else 'FAILED'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    options = tyro.cli(Options, description=__doc__)
    try:
        result = main(options)
    except ValueError as error:
        sys.exit(f"benchmarks.emulate: {error}")
    print(json.dumps(result) if options.json else show(result))
    sys.exit(0 if result["passed"] else 1)
