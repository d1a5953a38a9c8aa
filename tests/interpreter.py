"""Fixtures for kernels in Triton's interpreter: what would stop a GPU is found here too, and it takes less time.

They replace functions that are private to triton's interpreter.
"""

import math
import sys

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch):
    """The interpreter looks through Triton's language for what it has to replace, whenever a kernel calls a function:
    a fifth of the time. Of one that was replaced already it finds nothing."""
    patch = getattr(interpreter, "_patch_lang", None)  # another version may not have it
    if patch is None:
        return

    def patch_once(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture(autouse=True)
def said_multiples_are_some(monkeypatch):
    """tl.multiple_of makes loads wide, and stops a GPU where memory lies otherwise. The interpreter takes no notice of
    it. Of C channels that are no such multiple, masks keep loads as narrow as C allows: that must hold."""

    def set_attr(handle, name, values):
        if name == "tt.divisibility" and len(values) == 2:  # of a block of pointers, where runs along an axis begin
            axis = int(values[1] > 1)
            places = np.moveaxis(handle.data, axis, 0)
            size = handle.get_element_ty().primitive_bitwidth // 8
            begins = np.concatenate([places[:1], places[1:][places[1:] != places[:-1] + size]], axis=None)
            assert (begins % values[axis] == 0).all(), f"a run begins at no multiple of {values[axis]} bytes"
        elif name == "tt.divisibility":
            channels = sys._getframe(2).f_locals.get("C", values[0])  # of the kernel
            needed = math.gcd(values[0], getattr(channels, "value", channels))
            assert (handle.data % needed == 0).all(), f"{handle.data} is no multiple of {needed}"

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)


@pytest.fixture(autouse=True)
def memory_is_the_kernels(request, monkeypatch):
    """All that is loaded and stored lies in a tensor that the kernel was given."""
    if request.node.name.startswith("test_node"):
        return  # its terms are told as distances from the first one
    given = {}  # start -> end
    convert, call, builder = (
        interpreter._implicit_cvt,
        interpreter.GridExecutor.__call__,
        interpreter.InterpreterBuilder,
    )
    load, store = builder.create_masked_load, builder.create_masked_store

    def called(executor, *args, **kwargs):
        given.clear()
        return call(executor, *args, **kwargs)

    def converted(argument):
        if hasattr(argument, "data_ptr"):
            storage = argument.untyped_storage()
            given[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
        return convert(argument)

    def check(pointers, mask, what):
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not places.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first, last = int(places.min()), int(places.max()) + size
        if any(start <= first and last <= end for start, end in given.items()):
            return
        inside = np.zeros(places.shape, bool)
        for start, end in given.items():
            inside |= (places >= start) & (places + size <= end)
        assert inside.all(), f"a {what} of {(~inside).sum()} elements is not in the kernel's memory"

    def loaded(self, pointers, mask, *rest):
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def stored(self, pointers, value, mask, *rest):
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", called)
    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)


@triton.jit
def copy_kernel(x_ptr, out_ptr, START, C: tl.constexpr):
    place = tl.multiple_of(START, 2) + tl.arange(0, C)
    tl.store(out_ptr + place, tl.load(x_ptr + place))
