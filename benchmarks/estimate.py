"""What the Triton kernels of a search step ask of a GPU, counted on compiled code that runs on the CPU.

    python -m benchmarks.estimate [--batch-size 64] [--arch 90] [--dtype bfloat16] [--json]

Of each kernel: launches, the bytes that its launcher counts, and, by benchmarks.emulator, instructions of warps and
passes through the first-level cache and shared memory, of 128 bytes each. Over what the chip can do in a second these
are three times. A kernel's estimate is the longer one of memory's and of the sum of the other two, launch by launch: of
what was measured on an H100, launches of over 190 us took 0.8 to 1.3 times that sum. It is an estimate: second-level
cache, latencies, the gaps between launches and PyTorch's own operations are not in it. Counts grow with the batch.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from fpdarts.kernels.triton.launch import compiling, counting

from benchmarks import report
from benchmarks.emulate import poisoned_memory, precision
from benchmarks.emulator.driver import emulating
from benchmarks.profile import DEFAULTS
from benchmarks.sides import Side
from benchmarks.steps import search_config, search_model
from fpdarts.ahead import take_search_steps, twin
from fpdarts.architect import frozen
from fpdarts.training import autocast

# An H100: multiprocessors, Hz, instructions a clock of each; bytes a second of a large copy were measured.
PROCESSORS, CLOCK, ISSUED, BANDWIDTH = 132, 1.755e9, 4, 2.9e12


@dataclass(frozen=True)
class Options:
    batch_size: int = 64
    init_channels: int | None = None
    cells: int | None = None
    image_size: int | None = None
    stem: Literal["cifar", "imagenet"] = "cifar"
    arch: Literal[80, 86, 89, 90, 120] = 90
    """Compute capability times ten of the chip that is compiled for; speeds are an H100's."""
    dtype: Literal["float32", "bfloat16", "tf32"] = "bfloat16"
    steps: tuple[Literal["weights", "architecture"], ...] = ("weights", "architecture")
    json: bool = False
    out: str | None = None


def estimated(counts: dict) -> dict:
    """Seconds by limit, of one launch."""
    issue = counts["instructions"] / (PROCESSORS * ISSUED * CLOCK)
    cache = (counts["global"] + counts["shared"]) / (PROCESSORS * CLOCK)
    memory = counts["bytes"] / BANDWIDTH
    return {"issue": issue, "cache": cache, "memory": memory, "seconds": max(issue + cache, memory)}


def estimate(options: Options) -> dict:
    """Of each step a table of its kernels, longest first: launches, bytes, COUNTS and seconds by limit."""
    setting = DEFAULTS["search", options.stem]
    given = {name: getattr(options, name) for name in ("batch_size", "init_channels", "cells", "image_size")}
    setting = replace(setting, **{name: value for name, value in given.items() if value is not None})
    amp, result = "bf16" if options.dtype == "bfloat16" else "off", {}
    with emulating(options.arch) as gpu, precision(options.dtype), poisoned_memory():
        side = Side("triton", amp == "bf16")
        model = search_model(setting, side, search_config(setting, side))
        shape = 3, setting.image_size, setting.image_size
        stored = torch.bfloat16 if amp == "bf16" else torch.float32
        with compiling():
            take_search_steps(twin(model, "triton", stored), torch.empty(2, *shape, dtype=stored, device="meta"))
        images, labels = torch.randn(setting.batch_size, *shape), torch.arange(setting.batch_size) % 10
        gates = torch.ones(model.gate_shape)
        trained = {"weights": model.weight_parameters(), "architecture": model.architecture_parameters()}
        for step in options.steps:
            (resting,) = (parameters for name, parameters in trained.items() if name != step)
            gpu.launches.clear()
            with counting() as counted, frozen(resting):
                with autocast(amp, torch.device("cpu")):
                    loss = F.cross_entropy(model(images, gates).float(), labels)
                torch.autograd.grad(loss, trained[step], materialize_grads=True)
            if gpu.faults:
                raise RuntimeError(f"a kernel is wrong, see benchmarks.emulate: {gpu.faults[0]}")
            result[step] = table(gpu.launches, [launch.moved for launch in counted.all])
    return {"arch": options.arch, "dtype": options.dtype, "batch_size": setting.batch_size, **result}


def table(launches, moved) -> dict:
    """launches: of Emulated. moved: bytes, of each."""
    rows = defaultdict(lambda: defaultdict(float))
    for (name, counts), size in zip(launches, moved, strict=True):
        counts = {"launches": 1, "bytes": size, **counts}
        for key, value in (counts | estimated(counts)).items():
            rows[name][key] += value
            rows["total"][key] += value
    return {name: dict(row) for name, row in sorted(rows.items(), key=lambda item: -item[1]["seconds"])}


def show(result: dict, options: Options) -> str:
    lines = []
    for step in options.steps:
        lines.append(
            f"{step}, {result['dtype']}, {result['batch_size']} images, sm_{result['arch']}\n"
            f"  {'kernel':28s} launches      MB  instructions  passes  us: issue + cache / memory  estimate"
        )
        for name, row in result[step].items():
            passes = row["global"] + row["shared"]
            lines.append(
                f"  {name:28s} {row['launches']:8.0f} {row['bytes'] / 1e6:7.0f} {row['instructions'] / 1e6:11.1f} M "
                f"{passes / 1e6:5.1f} M {1e6 * row['issue']:10.0f} + {1e6 * row['cache']:5.0f} / "
                f"{1e6 * row['memory']:6.0f} {1e6 * row['seconds']:9.0f}"
            )
    return "\n".join(lines)


def main(options: Options) -> dict:
    result = estimate(options)
    if options.out:
        report.write(options.out, result)
    return result


if __name__ == "__main__":
    report.command("estimate", Options, main, show, __doc__)
