"""The stem as a PyTorch operator: see kernels/csrc/stem.h."""

import torch
from torch import Tensor

from .library import StemArguments, address, batch_tables, channels_last, library, new_map, require_float32, threads

_SUMS = 32, 32  # of products of a patch's values


def _run(images: Tensor, channels: int, backward: bool, **tensors: Tensor | None):
    n, _, height, width = images.shape
    fields = {name: address(tensor) for name, tensor in tensors.items()}
    library().fpdarts_stem(
        StemArguments(
            backward=backward,
            threads=threads(),
            images=n,
            height=height,
            width=width,
            channels=channels,
            x=images.data_ptr(),
            **fields,
        )
    )


def _by_taps(weight: Tensor) -> Tensor:
    """(C, 3, 3, inputs)."""
    return weight.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("fpdarts::stem", mutates_args=(), device_types="cpu")
def _stem(
    images: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    given_mean: Tensor | None,
    given_variance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, mean, variance, inverse deviation, sums that backward reads)."""
    images, channels = channels_last(images), weight.shape[0]
    out = new_map((images.shape[0], channels, *images.shape[2:]))
    mean, variance, inverse = batch_tables((channels,), (channels,), (channels,))
    sums = torch.zeros(_SUMS, dtype=torch.float64)
    _run(
        images, channels, False, weight=_by_taps(weight), scale=scale.contiguous(), shift=shift.contiguous(),
        given_mean=given_mean, given_variance=given_variance, mean=mean, inverse=inverse, sums=sums, out=out,
        variance=variance,
    )  # fmt: skip
    return out, mean, variance, inverse, sums


@_stem.register_fake
def _(images, weight, scale, shift, given_mean, given_variance):
    n, _, height, width = images.shape
    out = images.new_empty((n, weight.shape[0], height, width)).contiguous(memory_format=torch.channels_last)
    tables = [images.new_empty(weight.shape[0]) for _ in range(3)]
    return out, *tables, images.new_empty(_SUMS, dtype=torch.float64)


@torch.library.custom_op("fpdarts::stem_backward", mutates_args=(), device_types="cpu")
def _stem_backward(
    d_out: Tensor,
    images: Tensor,
    weight: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse: Tensor,
    sums: Tensor,
    given: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the weight, the scale and the shift. given: whether statistics were."""
    images, channels = channels_last(images), weight.shape[0]
    d_weight = torch.empty_like(_by_taps(weight))
    d_scale, d_shift = torch.empty_like(mean), torch.empty_like(mean)
    _run(
        images, channels, True, weight=_by_taps(weight), scale=scale.contiguous(), given_mean=mean if given else None,
        mean=mean, inverse=inverse, sums=sums, d_out=channels_last(d_out), d_weight=d_weight, d_scale=d_scale,
        d_shift=d_shift,
    )  # fmt: skip
    return d_weight.permute(0, 3, 1, 2), d_scale, d_shift


@_stem_backward.register_fake
def _(d_out, images, weight, scale, mean, inverse, sums, given):
    d_weight = torch.empty_like(_by_taps(weight)).permute(0, 3, 1, 2)
    return d_weight, torch.empty_like(mean), torch.empty_like(mean)


def _save(ctx, inputs, output):
    images, weight, scale, _, given_mean, _ = inputs
    _, mean, variance, inverse, sums = output
    ctx.given = given_mean is not None
    ctx.save_for_backward(images, weight, scale, mean, inverse, sums)
    ctx.mark_non_differentiable(mean, variance, inverse, sums)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, *_):
    needed = ctx.needs_input_grad
    if d_out is None:
        return (None,) * len(needed)
    gradients = _stem_backward(d_out, *ctx.saved_tensors, ctx.given)
    return None, *(d if wanted else None for d, wanted in zip(gradients, needed[1:])), None, None


_stem.register_autograd(_backward, setup_context=_save)


def stem(images, weight, scale, shift, statistics=None):
    require_float32({"images": images, "weight": weight, "scale": scale, "shift": shift})
    mean, variance = (None, None) if statistics is None else (table.float().contiguous() for table in statistics)
    out, *batch = _stem(images.detach(), weight, scale, shift, mean, variance)
    return out, *(batch[:2] if statistics is None else statistics)
