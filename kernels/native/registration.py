"""Operators of PyTorch, registered by hand.

``torch.library.custom_op`` looks through all arguments and results at each call, and ``register_autograd`` walks
through lists of tensors in Python: together 0.25 ms a cell and step, more than all else around its computation.
"""

from collections.abc import Callable

import torch

OPERATORS = torch.library.Library("fpdarts", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order  # those of a custom_op


def operator(name: str) -> Callable:
    """Makes an operator of CPU tensors of a function whose annotations tell the schema, and which changes no argument
    and returns none."""

    def register(compute):
        OPERATORS.define(name + torch.library.infer_schema(compute, mutates_args=()), tags=_TAGS)
        OPERATORS.impl(name, compute, "CPU")
        return getattr(torch.ops.fpdarts, name).default

    return register


def register_derivative(operator, differentiable: Callable):
    """differentiable: of the operator's arguments, calls an autograd.Function, which calls the operator itself within
    ``below_autograd()``."""
    OPERATORS.impl(operator, differentiable, "AutogradCPU")


below_autograd = torch._C._AutoDispatchBelowAutograd  # a context, as PyTorch's own register_autograd has it
