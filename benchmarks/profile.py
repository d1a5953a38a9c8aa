"""Launches, bytes and FLOPs of a weight and of an architecture step, counted on the meta device: no GPU, no memory.

    python -m benchmarks.profile --kernels eager --batch-size 256 [--json]

What PyTorch dispatches is counted as ``benchmarks/counting.py`` says; beside it stand the least work by formula
(``benchmarks/work.py``) and the time that a GPU of the given bandwidth and peak needs at least for the counted bytes.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks import report, work
from benchmarks.cases import Setting
from benchmarks.counting import Count
from benchmarks.sides import Side
from benchmarks.steps import search_config, search_model
from fpdarts import kernels
from fpdarts.architect import frozen
from fpdarts.gates import GateSampler
from fpdarts.search import optimizers


@dataclass(frozen=True)
class Options:
    kernels: str = "eager"
    """A side: eager, channels_last or a back end."""
    batch_size: int = 256
    init_channels: int = 16
    cells: int = 8
    image_size: int = 32
    stem: Literal["cifar", "imagenet"] = "cifar"
    gates: Literal["both", "step"] = "both"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; bfloat16 stands for mixed precision."""
    bandwidth: float = 3000.0
    """GB/s that a copy reaches, read plus written; an H100's is about 3000."""
    peak: float = 400.0
    """TFLOP/s of a large matrix product; an H100's is about 400 in tf32 and 700 in bf16."""
    top: int = 12
    """List this many operators, most bytes first."""
    json: bool = False
    out: str | None = None


def profile(side: Side, setting: Setting, dtype=torch.float32, bandwidth=3e12, peak=4e14) -> dict:
    """{"weight_step": {"forward", "backward", "optimizer", "total", "fewest", "operators"}, "architecture_step": ..}.

    Each phase has launches, bytes, flops and seconds_at_limit. A weight step computes no gradients of alpha and beta,
    an architecture step none of weights.
    """
    setting = replace(setting, device="meta")
    config = search_config(setting, side)
    with torch.device("cpu"):
        model = search_model(replace(setting, device="cpu"), side, config)
    model = model.to("meta")
    # mixed precision: a back end of our own keeps weights in float32 and casts them itself
    own = hasattr(kernels.backend(side.kernels, "meta"), "counting")
    for module in (model.stem, model.classifier) if own else (model,):
        module.to(dtype)
    sampler = GateSampler(setting.cells, 14, mode=setting.gates)
    gates = sampler.sample()
    weight_optimizer, architect = optimizers(config, model, torch.device("meta"))
    for optimizer in (weight_optimizer, architect.optimizer):
        optimizer.param_groups[0]["foreach"] = True  # as on CUDA: all tensors at once
    images = torch.empty(setting.batch_size, 3, setting.image_size, setting.image_size, device="meta", dtype=dtype)
    labels = torch.empty(setting.batch_size, dtype=torch.long, device="meta")

    @contextmanager
    def counting():
        """What PyTorch dispatches and, together with it, what the back end launches itself."""
        own = getattr(kernels.backend(side.kernels, "meta"), "counting", nullcontext)
        with own() as launched, Count() as count:
            yield count
        if launched is not None:
            count.launches += launched.launches
            count.bytes += launched.bytes

    def count(fixed, trained, optimizer, clip, d_weight):
        with frozen(fixed):
            with counting() as forward:
                loss = F.cross_entropy(model(images, gates), labels)
            with counting() as backward:
                gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
        for parameter, gradient in zip(trained, gradients):
            parameter.grad = gradient
        optimizer.step()  # the first one makes momentum buffers, once
        with counting() as update:
            if clip:  # what clip_grad_norm_ does on CUDA; on the meta device it takes one tensor after the other
                norm = torch.stack(torch._foreach_norm(gradients)).norm()
                torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
            optimizer.step()
        phases = {"forward": forward.total(), "backward": backward.total(), "optimizer": update.total()}
        phases["total"] = {key: sum(phase[key] for phase in phases.values()) for key in ("launches", "bytes", "flops")}
        least = work.supernet(model, setting.batch_size, (setting.image_size,) * 2, gates, d_weight).of("both")
        phases["fewest"] = {"bytes": least.bytes(dtype.itemsize), "flops": least.flops}
        for phase in phases.values():
            phase["seconds_at_limit"] = max(phase["bytes"] / bandwidth, phase["flops"] / peak)
        launches, moved = forward.launches + backward.launches, forward.bytes + backward.bytes
        operators = {name: {"launches": launches[name], "bytes": moved[name]} for name, _ in moved.most_common()}
        return {**phases, "operators": operators}

    architecture, weights = model.architecture_parameters(), model.weight_parameters()
    return {
        "kernels": str(side),
        "weight_step": count(architecture, weights, weight_optimizer, config.gradient_clip, True),
        "architecture_step": count(weights, architecture, architect.optimizer, config.architecture_clip, False),
    }


def show(result: dict, top: int) -> str:
    lines = []
    for step in ("weight_step", "architecture_step"):
        phases = result[step]
        lines.append(f"{result['kernels']}, {step.replace('_', ' ')}")
        for name in ("forward", "backward", "optimizer", "total", "fewest"):
            phase = phases[name]
            launches = f"{phase['launches']:7d} launches" if "launches" in phase else " " * 16
            lines.append(
                f"  {name:10s} {launches} {phase['bytes'] / 1e9:9.2f} GB {phase['flops'] / 1e9:8.1f} GFLOP "
                f"{phase['seconds_at_limit'] * 1e3:8.2f} ms at the limit"
            )
    lines.append("operators of the weight step, forward and backward, most bytes first")
    for name, counts in list(result["weight_step"]["operators"].items())[:top]:
        lines.append(f"  {name:36s} {counts['launches']:6d} launches {counts['bytes'] / 1e9:9.2f} GB")
    return "\n".join(lines)


def main(options: Options) -> dict:
    side = Side.parse(options.kernels, "meta")
    if side.name == "compile" or side.bf16 or side.graph:
        raise ValueError(f"{options.kernels} cannot be counted; give eager, channels_last or a back end, and --dtype")
    setting = Setting(
        options.batch_size,
        options.init_channels,
        options.cells,
        options.image_size,
        options.stem,
        options.gates,
    )
    result = profile(side, setting, getattr(torch, options.dtype), options.bandwidth * 1e9, options.peak * 1e12)
    if options.out:
        report.write(options.out, result)
    return result


if __name__ == "__main__":
    report.command("profile", Options, main, lambda result, options: show(result, options.top), __doc__)
