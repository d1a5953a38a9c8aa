"""The compiled library: found, checked and loaded once; its functions, and memory of its own.

Fields of ``CellArguments`` and the others mirror kernels/csrc/abi.h, where they are explained.
"""

import ctypes
import math
import os
import weakref
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ABI = 6
NAME = "libfpdarts_kernels.so"
_PROCESS = os.getpid()  # where OpenMP's threads live

_pointer, _integer = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS = ("workspace", "scratch", "forward", "backward")


class CellArguments(ctypes.Structure):
    _fields_ = [
        ("geometry", _pointer),
        ("threads", _integer),
        ("x", _pointer * 2),
        ("weights", _pointer),
        *((name, _pointer) for name in ("alpha", "beta", "gates", "path_scales", "given_mean", "given_variance")),
        *((name, _pointer) for name in ("work", "out", "mean", "variance", "updated", "d_out", "scratch")),
        ("d_x", _pointer * 2),
        *((name, _pointer) for name in ("d_weights", "d_alpha", "d_beta")),
    ]


class PartArguments(ctypes.Structure):
    _fields_ = [
        *((name, _integer) for name in ("part", "backward", "threads", "images", "channels", "height", "width")),
        ("step", _integer),
        *((name, _integer) for name in ("edges", "own", "kernel", "dilation", "stride", "kind", "partial", "count")),
        *((name, _pointer) for name in ("x", "depthwise", "pointwise", "out", "d_out", "d_x", "d_depthwise")),
        *((name, _pointer) for name in ("d_pointwise", "slices", "terms", "coefficients", "d_terms")),
        ("d_coefficients", _pointer),
    ]


class StemArguments(ctypes.Structure):
    _fields_ = [
        *((name, _integer) for name in ("backward", "threads", "images", "height", "width", "channels")),
        *((name, _pointer) for name in ("x", "weight", "scale", "shift", "given_mean", "given_variance")),
        *((name, _pointer) for name in ("mean", "inverse", "sums", "out", "variance")),
        *((name, _pointer) for name in ("d_out", "d_weight", "d_scale", "d_shift")),
    ]


class LibraryError(RuntimeError):
    """The library cannot be used here; the message says why and what to do."""


@cache
def library() -> ctypes.CDLL:
    """Raises LibraryError."""
    path = Path(__file__).parent / NAME
    if not path.is_file():
        raise LibraryError(
            "they were not built when fpdarts was installed, which takes x86-64, a C++17 compiler such as g++, and "
            "FPDARTS_NATIVE not set to off; install it again, or use --kernels reference"
        )
    try:
        lib = ctypes.CDLL(str(path))
        if lib.fpdarts_abi() != ABI:
            raise LibraryError(f"{path} was built from another version of the sources; install fpdarts again")
        _declare(lib)
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} cannot be loaded ({error}); install fpdarts again") from None
    if not lib.fpdarts_isa():
        raise LibraryError("this processor has no AVX2; use --kernels reference")
    asked = os.environ.get("FPDARTS_NATIVE_ISA")
    if asked not in (None, "", "avx2", "avx512"):
        raise LibraryError(f"FPDARTS_NATIVE_ISA is {asked!r}; set it to avx2 or avx512, or not at all")
    if asked and asked != lib.fpdarts_isa().decode():
        raise LibraryError(f"FPDARTS_NATIVE_ISA is {asked}, which this processor does not have; set it to avx2")
    return lib


def _declare(lib: ctypes.CDLL):
    """Raises AttributeError for a function that is missing."""
    lib.fpdarts_isa.restype = ctypes.c_char_p
    names = [f"fpdarts_{kind}_{name}" for kind in ("cell", "derived") for name in _FUNCTIONS]
    others = ("fpdarts_part", PartArguments), ("fpdarts_stem", StemArguments)
    for name, arguments in (*((name, CellArguments) for name in names), *others):
        function = getattr(lib, name)
        function.argtypes, function.restype, function.errcheck = [ctypes.POINTER(arguments)], _integer, _checked
    lib.fpdarts_allocate.argtypes, lib.fpdarts_allocate.restype = [_integer], _pointer
    lib.fpdarts_release.argtypes, lib.fpdarts_release.restype = [_pointer], None


def _checked(result: int, function, arguments) -> int:
    if result < 0:
        raise MemoryError("no memory for a cell's sums; use a smaller batch, or fewer threads")
    return result


def threads() -> int:
    """As many as PyTorch uses; one in a forked process, where OpenMP has no threads and would wait for them forever."""
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def batch_tables(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Zeros, for what is computed of a batch: float32 whatever PyTorch's default is."""
    return [torch.zeros(shape, dtype=torch.float32) for shape in shapes]


def require_float32(tensors: dict[str, Tensor]):
    """Raises ValueError."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be float32 on the CPU, not {tensor.dtype} on {tensor.device}")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def channels_last_slice(x: Tensor) -> tuple[Tensor, int]:
    """Channels last, or a slice of the channels of such a tensor as it is; and the floats from pixel to pixel."""
    n, c, height, width = x.shape
    step = x.stride(3)
    if step >= c and x.stride() == (height * width * step, 1, width * step, step):
        return x, step
    return channels_last(x), c


def gradient(tensor: Tensor, needed: bool) -> Tensor:
    """To be written; empty where it is not needed."""
    return torch.empty_like(tensor) if needed else tensor.new_empty(0)


def new_map(shape: tuple[int, ...]) -> Tensor:
    """(N, C, H, W) channels last, not initialized; a large one from memory that is kept."""
    floats = math.prod(shape)
    if floats < 1 << 18:  # kept blocks are of 2 MiB at least
        return torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    n, c, height, width = shape
    # no view, which would hold its base: autograd adds to a gradient in place only where nothing else holds its memory
    strides = height * width * c, 1, width * c, c
    return torch.empty(0, dtype=torch.float32).set_(memory(floats), 0, shape, strides)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def pointers(tensors) -> ctypes.Array:
    return (_pointer * max(1, len(tensors)))(*(address(tensor) for tensor in tensors))


def memory(floats: int) -> Tensor:
    """(floats,) float32, not initialized, from memory that is kept for the next one when the tensor is gone. One at
    least. Raises MemoryError.
    """
    lib, floats = library(), max(1, floats)  # a buffer of none has no address
    address = lib.fpdarts_allocate(4 * floats)
    if not address:
        raise MemoryError(f"no {4 * floats / 2**30:.2f} GiB for a cell's workspace; use a smaller batch")
    buffer = (ctypes.c_float * floats).from_address(address)
    weakref.finalize(buffer, lib.fpdarts_release, address).atexit = False
    return torch.frombuffer(buffer, dtype=torch.float32)  # keeps the buffer as long as any view lives


# --- A cell, of the search or derived ---


def _arguments(geometry: list[int], inputs, weights, tensors: dict[str, Tensor | None]) -> CellArguments:
    """tensors: by field. What it points to must live as long, and so is kept with it."""
    arguments = CellArguments(threads=threads(), x=pointers(inputs))
    arguments.keep = (ctypes.c_int64 * len(geometry))(*geometry), pointers(weights), tensors
    arguments.geometry, arguments.weights = map(ctypes.addressof, arguments.keep[:2])
    for name, tensor in tensors.items():
        setattr(arguments, name, address(tensor))
    return arguments


def cell_forward(kind: str, geometry: list[int], shape: tuple[int, ...], inputs, weights, **tensors: Tensor | None):
    """(out, work). kind: ``cell`` or ``derived``. shape: of the output. tensors: what else is read and written."""
    inputs, weights = [channels_last(x) for x in inputs], [weight.contiguous() for weight in weights]
    out = new_map(shape)
    arguments = _arguments(geometry, inputs, weights, {**tensors, "out": out})
    work = memory(getattr(library(), f"fpdarts_{kind}_workspace")(arguments))
    arguments.work = work.data_ptr()
    getattr(library(), f"fpdarts_{kind}_forward")(arguments)
    return out, work


def cell_backward(
    kind: str, geometry: list[int], need: list[bool], d_out: Tensor, inputs, weights, **tensors: Tensor | None
) -> list[Tensor]:
    """Gradients of the inputs and of each weight, empty where not needed. need: of each."""
    inputs, weights = [channels_last(x) for x in inputs], [weight.contiguous() for weight in weights]
    d_out = channels_last(d_out)
    gradients = [new_map(x.shape) if needed else x.new_empty(0) for x, needed in zip(inputs, need)]
    gradients += [gradient(weight, needed) for weight, needed in zip(weights, need[2:])]
    addresses = pointers([d if needed else None for d, needed in zip(gradients, need)])
    arguments = _arguments(geometry, inputs, weights, {**tensors, "d_out": d_out})
    arguments.d_x = (_pointer * 2)(*addresses[:2])
    if any(need[2:]):
        arguments.d_weights = ctypes.addressof(addresses) + 2 * ctypes.sizeof(_pointer)
    scratch = memory(getattr(library(), f"fpdarts_{kind}_scratch")(arguments))
    arguments.scratch = scratch.data_ptr()
    getattr(library(), f"fpdarts_{kind}_backward")(arguments)
    return gradients


def fake_gradients(inputs, weights, need: list[bool]) -> list[Tensor]:
    """What cell_backward's look like to the compiler."""
    made = [channels_last(torch.empty_like(x)) if needed else x.new_empty(0) for x, needed in zip(inputs, need)]
    return made + [gradient(weight.contiguous(), needed) for weight, needed in zip(weights, need[2:])]
