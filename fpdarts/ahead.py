"""Compiling what a run's steps launch, on all cores and before the first one, which would compile it one by one.

A twin of the model on PyTorch's meta device, which has neither memory nor arithmetic, takes each kind of step once, and
what it launches is compiled. Only the model's layout counts for that, not the number of images.
"""

import copy
import sys
from collections.abc import Callable

import torch

from fpdarts import kernels
from fpdarts.architect import frozen
from fpdarts.network import DerivedNetwork
from fpdarts.supernet import SuperNet

IMAGES = 2  # their number compiles nothing of its own; statistics need two


def compile_launches(launch: Callable[[], None], name: str, device: torch.device):
    """Has the back end of that name compile, for the device, what ``launch`` launches on the meta device. Those with
    nothing to compile are not asked."""
    compiling = getattr(kernels.backend(name, device.type), "compiling", None)
    if compiling is None or device.type != "cuda":  # in the interpreter nothing is compiled
        return
    print("compiling kernels for this GPU, where that was not done before", file=sys.stderr)
    with compiling():
        launch()


def compile_steps(
    take_steps: Callable, model: torch.nn.Module, image_size: int, name: str, device: torch.device, amp: str
):
    """Of a search, a retraining or a test. take_steps: of the twin and a batch of images, see below."""

    def launch():
        dtype = torch.bfloat16 if amp == "bf16" else torch.float32
        images = torch.empty(IMAGES, 3, image_size, image_size, dtype=dtype, device="meta")
        take_steps(twin(model, name, dtype), images)

    compile_launches(launch, name, device)


def twin(model: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """On the meta device, with the kernels of that name. There is no autocast there: what is around the cells is of its
    dtype, and so are maps."""
    model = copy.deepcopy(model).to("meta")
    model.kernels = name
    for part, module in model.named_children():
        if part != "cells":
            module.to(dtype)
    return model


def take_search_steps(model: SuperNet, images: torch.Tensor):
    """Of the weights, of the architecture, and one of evaluation."""
    gates = torch.ones(model.gate_shape)  # an open path is compiled for, and closed ones have no code of their own
    trained = model.weight_parameters(), model.architecture_parameters()
    for asked, resting in (trained, trained[::-1]):
        with frozen(resting):
            torch.autograd.grad(model(images, gates).sum(), asked, materialize_grads=True)
    with torch.no_grad():
        model.eval()(images, gates)


def take_retraining_steps(network: DerivedNetwork, images: torch.Tensor, drop_path: float):
    """One of training, and one of evaluation."""
    out = network(images, drop_path)
    sum(logits.sum() for logits in (out if isinstance(out, tuple) else (out,))).backward()
    take_evaluation(network, images)


def take_evaluation(network: DerivedNetwork, images: torch.Tensor):
    with torch.no_grad():
        network.eval()(images)
