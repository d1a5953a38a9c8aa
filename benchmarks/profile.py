"""Launches, bytes and FLOPs of steps of a search or of retraining, counted on the meta device: no GPU, no memory.

    python -m benchmarks.profile --kernels eager --batch-size 256 [--json]
    python -m benchmarks.profile --kernels triton --what retrain [--stem imagenet]

What PyTorch dispatches is counted as ``benchmarks/counting.py`` says; beside it stand the least work by formula
(``benchmarks/work.py``) and the time that a GPU of the given bandwidth and peak needs at least for the counted bytes.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks import report, work
from benchmarks.counting import Count
from benchmarks.setting import Setting
from benchmarks.sides import Side
from benchmarks.steps import retrain_config, retrain_network, search_config, search_model
from fpdarts import kernels
from fpdarts.architect import frozen
from fpdarts.gates import GateSampler
from fpdarts.retrain import losses, make_optimizer
from fpdarts.search import optimizers

# Where nothing else is said: the protocols' own, of ImageNet what fits a GPU.
DEFAULTS = {
    ("search", "cifar"): Setting(256, 16, 8, 32),
    ("search", "imagenet"): Setting(128, 16, 8, 224, "imagenet"),
    ("retrain", "cifar"): Setting(96, 36, 20, 32),
    ("retrain", "imagenet"): Setting(128, 48, 14, 224, "imagenet"),
}


@dataclass(frozen=True)
class Options:
    kernels: str = "eager"
    """A side: eager, channels_last or a back end."""
    what: Literal["search", "retrain"] = "search"
    """A weight and an architecture step, or a step of retraining PC_DARTS_cifar."""
    batch_size: int | None = None
    init_channels: int | None = None
    cells: int | None = None
    image_size: int | None = None
    stem: Literal["cifar", "imagenet"] = "cifar"
    gates: Literal["both", "step"] = "both"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; bfloat16 stands for mixed precision."""
    bandwidth: float = 3000.0
    """GB/s that a copy reaches, read plus written; an H100's is about 3000."""
    peak: float | None = None
    """TFLOP/s of a large matrix product; if not given an H100's, about 400 in tf32 and 700 in bf16."""
    top: int = 12
    """List this many operators, most bytes first."""
    json: bool = False
    out: str | None = None


class Profiler:
    """Counts steps of one side on the meta device."""

    def __init__(self, side: Side, setting: Setting, dtype=torch.float32, bandwidth=3e12, peak=4e14):
        self.side, self.dtype, self.bandwidth, self.peak = side, dtype, bandwidth, peak
        self.setting = replace(setting, device="meta")
        self.backend = kernels.backend(side.kernels, "meta")
        side_length = setting.image_size
        self.images = torch.empty(setting.batch_size, 3, side_length, side_length, device="meta", dtype=dtype)
        self.labels = torch.empty(setting.batch_size, dtype=torch.long, device="meta")

    def prepared(self, model):
        """Mixed precision: a back end of our own keeps the cells' weights in float32 and casts them itself."""
        model = model.to("meta")
        own = hasattr(self.backend, "counting")
        for module in [child for name, child in model.named_children() if name != "cells"] if own else (model,):
            module.to(self.dtype)
        return model

    @contextmanager
    def counting(self):
        """What PyTorch dispatches and, together with it, what the back end launches itself."""
        with getattr(self.backend, "counting", nullcontext)() as launched, Count() as count:
            yield count
        if launched is not None:
            count.launches += launched.launches
            count.bytes += launched.bytes

    def count(self, forward, trained, optimizer, clip, fewest: work.Passes) -> dict:
        """forward: makes the loss."""
        optimizer.param_groups[0]["foreach"] = True  # as on CUDA: all tensors at once
        with self.counting() as first:
            loss = forward()
        with self.counting() as backward:
            gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
        for parameter, gradient in zip(trained, gradients):
            parameter.grad = gradient
        optimizer.step()  # the first one makes momentum buffers, once
        with self.counting() as update:
            if clip:  # what clip_grad_norm_ does on CUDA; on the meta device it takes one tensor after the other
                norm = torch.stack(torch._foreach_norm(gradients)).norm()
                torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
            optimizer.step()
        phases = {"forward": first.total(), "backward": backward.total(), "optimizer": update.total()}
        if hasattr(self.backend, "counting"):  # launchers count no arithmetic; by formula it is what PyTorch dispatches
            for direction in ("forward", "backward"):
                phases[direction]["flops"] = fewest.of(direction).flops
        phases["total"] = {key: sum(phase[key] for phase in phases.values()) for key in ("launches", "bytes", "flops")}
        least = fewest.of("both")
        phases["fewest"] = {"bytes": least.bytes(self.dtype.itemsize), "flops": least.flops}
        for phase in phases.values():
            phase["seconds_at_limit"] = max(phase["bytes"] / self.bandwidth, phase["flops"] / self.peak)
        launches, moved = first.launches + backward.launches, first.bytes + backward.bytes
        operators = {name: {"launches": launches[name], "bytes": moved[name]} for name, _ in moved.most_common()}
        return {**phases, "operators": operators}

    def search(self) -> dict:
        """A weight step computes no gradients of alpha and beta, an architecture step none of weights."""
        setting = self.setting
        config = search_config(setting, self.side)
        with torch.device("cpu"):
            model = self.prepared(search_model(replace(setting, device="cpu"), self.side, config))
        if hasattr(self.backend, "counting"):  # on the meta device, a convolution's result is not channels_last
            model.stem[0].register_forward_hook(lambda *given: given[2].contiguous(memory_format=torch.channels_last))
        gates = GateSampler(setting.cells, 14, mode=setting.gates).sample()
        weight_optimizer, architect = optimizers(config, model, torch.device("meta"))

        def step(fixed, trained, optimizer, clip, d_weight):
            fewest = work.supernet(model, setting.batch_size, (setting.image_size,) * 2, gates, d_weight)
            with frozen(fixed):
                return self.count(
                    lambda: F.cross_entropy(model(self.images, gates), self.labels), trained, optimizer, clip, fewest
                )

        architecture, weights = model.architecture_parameters(), model.weight_parameters()
        return {
            "kernels": str(self.side),
            "weight_step": step(architecture, weights, weight_optimizer, config.gradient_clip, True),
            "architecture_step": step(weights, architecture, architect.optimizer, config.architecture_clip, False),
        }

    def retrain(self) -> dict:
        """With drop-path where the protocol has it, and the auxiliary head."""
        setting, config = self.setting, retrain_config(self.setting, self.side)
        with torch.device("meta"):
            counted = retrain_network(replace(config, kernels="reference"))
        network = self.prepared(retrain_network(config)).to(memory_format=self.side.memory_format)
        optimizer = make_optimizer(config, network, torch.device("meta"))

        def loss():
            out = network(self.images.contiguous(memory_format=self.side.memory_format), config.drop_path)
            return losses(out, self.labels, config)[0]

        fewest = work.network(counted, setting.batch_size, (setting.image_size,) * 2)
        parameters = list(network.parameters())
        return {
            "kernels": str(self.side),
            "retrain_step": self.count(loss, parameters, optimizer, config.gradient_clip, fewest),
        }


def show(result: dict, top: int) -> str:
    lines = []
    steps = [name for name in result if name.endswith("_step")]
    for step in steps:
        phases = result[step]
        lines.append(f"{result['kernels']}, {step.replace('_', ' ')}")
        for name in ("forward", "backward", "optimizer", "total", "fewest"):
            phase = phases[name]
            launches = f"{phase['launches']:7d} launches" if "launches" in phase else " " * 16
            lines.append(
                f"  {name:10s} {launches} {phase['bytes'] / 1e9:9.2f} GB {phase['flops'] / 1e9:8.1f} GFLOP "
                f"{phase['seconds_at_limit'] * 1e3:8.2f} ms at the limit"
            )
    lines.append(f"operators of the {steps[0].replace('_', ' ')}, forward and backward, most bytes first")
    for name, counts in list(result[steps[0]]["operators"].items())[:top]:
        lines.append(f"  {name:36s} {counts['launches']:6d} launches {counts['bytes'] / 1e9:9.2f} GB")
    return "\n".join(lines)


def main(options: Options) -> dict:
    side = Side.parse(options.kernels, "meta")
    if side.name == "compile" or side.bf16 or side.graph:
        raise ValueError(f"{options.kernels} cannot be counted; give eager, channels_last or a back end, and --dtype")
    setting = DEFAULTS[options.what, options.stem]
    given = {name: getattr(options, name) for name in ("batch_size", "init_channels", "cells", "image_size")}
    setting = replace(setting, gates=options.gates, **{k: v for k, v in given.items() if v is not None})
    peak = options.peak or {"float32": 400.0, "bfloat16": 700.0}[options.dtype]
    profiler = Profiler(side, setting, getattr(torch, options.dtype), options.bandwidth * 1e9, 1e12 * peak)
    result = getattr(profiler, options.what)()
    if options.out:
        report.write(options.out, result)
    return result


if __name__ == "__main__":
    report.command("profile", Options, main, lambda result, options: show(result, options.top), __doc__)
