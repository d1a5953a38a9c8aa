"""Sides against each other, interleaved in one run: seconds, ratios, peak memory and the share of the machine's limit.

    python -m benchmarks.compare --what search-step --kernels reference --against eager channels_last --batch-size 64

Ratios are a baseline's seconds over those of ``--kernels``: above 1, the kernels are faster. The two calls of a round
make a pair; told are the median and the range of the pairs' ratios.
"""

import gc
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

from benchmarks import report
from benchmarks.cases import DEFAULTS, Setting, build, check, reference_results
from benchmarks.limits import Limits, measure, timed
from benchmarks.sides import Side
from fpdarts.verify import one_precision

What = Literal["search-step", "arch-step", "retrain-step", "cell", "stage", "pooling", "node"]


@dataclass(frozen=True)
class Options:
    what: What
    kernels: str = "reference"
    """The side that all others are divided by: a back end, or any other side."""
    against: tuple[str, ...] = ("eager", "channels_last")
    """Baselines: eager, channels_last, compile, back ends; each may have +bf16 or, on CUDA, +graph behind it."""
    batch_size: int | None = None
    init_channels: int | None = None
    cells: int | None = None
    image_size: int | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    gates: Literal["both", "step"] | None = None
    operation: str | None = None
    """Of stage and pooling."""
    stride: int | None = None
    reduction: bool | None = None
    direction: Literal["forward", "backward", "both"] | None = None
    device: str | None = None
    threads: int | None = None
    rounds: int = 5
    """Timed calls of each side, after two that warm up."""
    memory: bool = True
    """Measure peak memory, each side in a process of its own."""
    json: bool = False
    out: str | None = None
    """Write the result, with machine, versions, commit and command, to this file; a bare name to benchmarks/results."""


def names_of(options) -> list[str]:
    """Of the sides; baselines may also have commas between them."""
    return [options.kernels, *(name for given in options.against for name in given.split(","))]


def setting_of(options) -> Setting:
    """What the options leave open is the case's default."""
    given = {f.name: getattr(options, f.name, None) for f in fields(Setting)}
    return replace(DEFAULTS[options.what], **{name: value for name, value in given.items() if value is not None})


@one_precision()
def compare(
    what: str,
    names: list[str],
    setting: Setting,
    rounds: int = 5,
    memory: bool = True,
    limits: Limits | None = None,
) -> dict:
    """The first of the names is what the others are divided by; limits: in its precision. Raises AssertionError where a
    side computes wrongly.

    Returns {"what", "setting", "seconds": {side: {"median", "low", "high", "flops_per_second", "bytes_per_second",
    "share_of_limit"}}, "ratio": {baseline: {"median", "low", "high"}}, "peak_memory": {side: bytes or None}, "limit"}.
    """
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {rounds}")
    sides = [Side.parse(name, setting.device) for name in dict.fromkeys(names)]
    expected, cases = reference_results(what, setting), {}
    for side in sides:
        cases[side] = build(what, side, setting)
        check(what, side, setting, cases[side], expected)
        cases[side].step(1)
    del expected
    own = {sides[0].bf16: limits} if limits else {}
    for side in sides:
        if side.bf16 not in own:
            own[side.bf16] = measure(setting.device, torch.bfloat16 if side.bf16 else torch.float32)
    limits = own[sides[0].bf16]

    seconds = {side: [] for side in sides}
    for i in range(rounds):
        for side in sides[i % len(sides) :] + sides[: i % len(sides)]:  # each is first, second, ... in turn
            seconds[side].append(timed(partial(cases[side].step, 2 + i), setting.device))
    work = cases[sides[0]].work
    cases.clear()  # its memory is not to weigh on what follows

    first, *others = sides
    ratios = {str(s): [b / a for a, b in zip(seconds[first], seconds[s])] for s in others}
    return {
        "what": what,
        "setting": {f.name: getattr(setting, f.name) for f in fields(Setting)},
        "kernels": str(first),
        "seconds": {
            str(side): _spread(values) | _speed(values, work, side, own[side.bf16]) for side, values in seconds.items()
        },
        "ratio": {name: _spread(values) for name, values in ratios.items()},
        "peak_memory": {str(side): peak_memory(what, side, setting) if memory else None for side in sides},
        "limit": {
            **limits.as_dict(),
            "flops": work.flops,
            "fewest_bytes": work.bytes(2 if first.bf16 else 4),
            "nearer": limits.nearer(work, 2 if first.bf16 else 4),
            "seconds": limits.seconds(work, 2 if first.bf16 else 4),
        },
    }


def _spread(values):
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _speed(values, work, side, limits):
    median, size = statistics.median(values), 2 if side.bf16 else 4
    return {
        "flops_per_second": work.flops / median,
        "bytes_per_second": work.bytes(size) / median,
        "share_of_limit": limits.seconds(work, size) / median,
    }


def peak_memory(what: str, side: Side, setting: Setting) -> int | None:
    """Bytes at the highest point of two calls: on CUDA those that were allocated on the device for it, on the CPU those
    of a process of its own, without what importing took. None where the system does not tell.
    """
    if torch.device(setting.device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        case = build(what, side, setting)
        for i in range(2):
            case.step(i)
        return torch.cuda.max_memory_allocated(setting.device) - before
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        return pool.submit(_peak_memory, what, side, setting, torch.get_num_threads()).result()


def _peak_memory(what, side, setting, threads):
    torch.set_num_threads(threads)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    import_module("torch._dynamo")  # the first optimizer imports it, which is not the step's doing
    before = _status(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    case = build(what, side, setting)
    for i in range(2):
        case.step(i)
    return _status(status, "VmHWM") - before


def _status(path, field):
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def show(result: dict) -> str:
    """A table for people."""
    limit = result["limit"]
    lines = [
        f"{result['what']}: {limit['flops'] / 1e9:.1f} GFLOP and at least {limit['fewest_bytes'] / 1e9:.2f} GB; "
        f"the nearer limit is the {limit['nearer']}, {limit['seconds'] * 1e3:.3g} ms",
        f"limits of {limit['device']}, {limit['threads']} threads: {limit['flops_per_second'] / 1e9:.0f} GFLOP/s"
        + (f" ({limit['scaling']:.2f} times one thread's)" if limit["scaling"] else "")
        + f", {limit['bytes_per_second'] / 1e9:.1f} GB/s",
        *(["this machine is busy with something else: shares of its limits mean little"] if limit["disturbed"] else []),
        f"{'side':20s} {'seconds':>10s} {'(low':>9s} {'high)':>9s} {'GFLOP/s':>9s} {'GB/s':>8s} {'limit':>6s} "
        f"{'memory':>9s}  over {result['kernels']} (low, high)",
    ]
    for side, s in result["seconds"].items():
        memory, ratio = result["peak_memory"][side], result["ratio"].get(side)
        lines.append(
            f"{side:20s} {s['median']:10.4g} {s['low']:9.4g} {s['high']:9.4g} {s['flops_per_second'] / 1e9:9.1f} "
            f"{s['bytes_per_second'] / 1e9:8.2f} {s['share_of_limit']:6.1%} "
            + (f"{memory / 1e6:6.0f} MB" if memory is not None else f"{'':9s}")
            + (f"  {ratio['median']:.2f} ({ratio['low']:.2f}, {ratio['high']:.2f})" if ratio else "")
        )
    return "\n".join(lines)


def main(options: Options) -> dict:
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = setting_of(options)
    result = compare(options.what, names_of(options), setting, options.rounds, options.memory)
    if options.out:
        report.write(options.out, result, setting.device)
    return result


if __name__ == "__main__":
    report.command("compare", Options, main, lambda result, options: show(result), __doc__)
