"""Operators of PyTorch that have a derivative and are called with lists of tensors, registered by hand.

``torch.library.custom_op`` looks through all arguments and results at each call, and its ``register_autograd`` walks
through lists in Python: together 0.15 ms a cell and step. For all others, and to refuse second derivatives, it serves.
"""

import sys
from collections.abc import Callable

import torch

OPERATORS = torch.library.Library("fpdarts", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order  # those of a custom_op


def _untraced(compute: Callable) -> Callable:
    """Where a graph breaks, torch.compile would otherwise go on tracing within, as far as the library. It is asked only
    if it was ever imported, which takes more than a second."""
    disabled = torch._disable_dynamo(compute)

    def call(*arguments):
        return (disabled if "torch._dynamo" in sys.modules else compute)(*arguments)

    return call


def operator(name: str) -> Callable:
    """Makes an operator of CPU tensors of a function whose annotations tell the schema, and which changes no argument
    and returns none. Its derivative must be told, see below: nobody would refuse one that is not."""

    def register(compute):
        OPERATORS.define(name + torch.library.infer_schema(compute, mutates_args=()), tags=_TAGS)
        OPERATORS.impl(name, _untraced(compute), "CPU")
        return getattr(torch.ops.fpdarts, name).default

    return register


def derivative(op: Callable, compute: Callable):
    """compute: what "AutogradCPU" calls in place of the operator: an autograd.Function that calls it below_autograd."""
    OPERATORS.impl(op, _untraced(compute), "AutogradCPU")


# A context. "AutogradCPU" may have a function that calls an autograd.Function, which calls the operator itself in this.
below_autograd = torch._C._AutoDispatchBelowAutograd
