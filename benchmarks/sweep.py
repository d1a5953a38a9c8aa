"""Step time against batch size, channels and cells for each side: a JSON file and a plot of it.

    python -m benchmarks.sweep --what search-step --kernels reference --against channels_last --out sweep.json

One quantity varies at a time, the others stay at the base. --plot-only draws an existing file again.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.compare import What, compare, names_of, setting_of
from benchmarks.limits import measure
from benchmarks.sides import Side

AXES = {"batch_size": "batch size", "init_channels": "channels C", "cells": "cells"}


@dataclass(frozen=True)
class Options:
    out: str
    """JSON; the plot lies beside it, as .svg. A bare name goes to benchmarks/results."""
    what: What = "search-step"
    kernels: str = "reference"
    against: tuple[str, ...] = ("eager", "channels_last")
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    channels: tuple[int, ...] = (8, 16, 32)
    depths: tuple[int, ...] = (4, 8, 12)
    """Cells."""
    batch_size: int = 16
    """Where it does not vary."""
    init_channels: int = 16
    cells: int = 8
    rounds: int = 3
    device: str | None = None
    threads: int | None = None
    plot_only: bool = False
    json: bool = False


def sweep(options: Options) -> dict:
    """{"what", "limit", "points": {axis: [{"value", "seconds", "ratio"}, ..]}}."""
    if not (options.batch_sizes and options.channels and options.depths):
        raise ValueError("--batch-sizes, --channels and --depths need a value at least")
    base = setting_of(options)
    bf16 = Side.parse(options.kernels, base.device).bf16
    limits = measure(base.device, torch.bfloat16 if bf16 else torch.float32)
    points = {}
    for axis, values in zip(AXES, (options.batch_sizes, options.channels, options.depths)):
        points[axis] = []
        for value in values:
            setting = replace(base, **{axis: value})
            result = compare(options.what, names_of(options), setting, options.rounds, memory=False, limits=limits)
            points[axis].append({"value": value, "seconds": result["seconds"], "ratio": result["ratio"]})
            told = ", ".join(f"{side} {s['median']:.3g} s" for side, s in result["seconds"].items())
            print(f"{AXES[axis]} {value}: {told}", file=sys.stderr, flush=True)
    return {"what": options.what, "base": vars(base), "limit": limits.as_dict(), "points": points}


def plot(result: dict, path: Path):
    """Three panels, both axes logarithmic: a straight line of slope 1 is time in proportion to work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for panel, (axis, points) in zip(axes, result["points"].items()):
        for side in points[0]["seconds"]:
            values = [point["value"] for point in points]
            panel.plot(values, [point["seconds"][side]["median"] for point in points], "o-", label=side)
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis], xticks=values)
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    base = result["base"]
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"{result['what']}; where it does not vary, batch size {base['batch_size']}, C = {base['init_channels']}, "
        f"{base['cells']} cells"
    )
    figure.savefig(path, metadata={"Date": None})


def main(options: Options) -> dict:
    path = report.located(options.out)
    if not options.plot_only:
        if options.threads:
            torch.set_num_threads(options.threads)
        report.write(path, sweep(options), options.device or "cpu")
    result = json.loads(path.read_text())
    plot(result, path.with_suffix(".svg"))
    return result


if __name__ == "__main__":
    report.command("sweep", Options, main, lambda _, options: report.located(options.out), __doc__)
