"""Launching kernels: counting them, compiling them beforehand, and what all launchers need."""

import ast
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.compiler.compiler import max_shared_mem
from triton.language.target_info import current_target

# A kernel that the launchers call. Numbers of rows are not specialized on (divisible by 16 or not), which would compile
# each kernel again for a last batch; distances are: that they are aligned is what makes loads wide.
_SIZES = ["M", "IMAGES", "first", "ROWS", "LAST", "COUNTERS", "EPSILON", "SHARES"]
kernel = triton.jit(do_not_specialize=_SIZES)


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU (TRITON_INTERPRET=1 in the environment)."""
    return bool(triton.knobs.runtime.interpret)


INTERPRETED = tl.constexpr(interpreted())


@triton.constexpr_function
def chip() -> int:
    """Compute capability, times ten, of the GPU that is launched on or compiled for; of none, as where kernels are
    interpreted or only counted, an H100's."""
    target = current_target()
    return 90 if target is None or target.backend != "cuda" else target.arch


TENSOR_MEMORY = 512  # columns a block


@triton.constexpr_function
def in_tensor_memory() -> bool:
    """Whether products of 64 rows and more by 4 or 8 warps have their sums in tensor memory, as on Blackwell's chips
    for data centers (not on its others): it has no room for the sums of many rows of a map."""
    return 100 <= chip() < 120


VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
SINCE_3_7 = tl.constexpr(VERSION >= (3, 7))  # what was seen with 3.8 and not with 3.6


@triton.jit
def both(mask, condition):
    """mask & condition, a scalar: triton 3.9's interpreter makes integers of that, which are no mask there."""
    if INTERPRETED:
        return tl.where(condition, mask, False)
    return mask & condition


class Launch(NamedTuple):
    """For who wants to compile, or to time, what runs. moved: bytes."""

    kernel: triton.runtime.JITFunction
    grid: tuple[int, ...]
    tensors: dict
    arguments: dict
    moved: float


class Launches:
    """What the launchers did: launches and bytes by kernel, for closed paths none, and all launches in order."""

    def __init__(self):
        self.launches, self.bytes, self.all = Counter(), Counter(), []


_counting: list[Launches] = []


@contextmanager
def counting():
    """Counts the launches within. On the meta device nothing else happens."""
    _counting.append(Launches())
    try:
        yield _counting[-1]
    finally:
        _counting.pop()


def is_counting() -> bool:
    return bool(_counting)


@contextmanager
def parsing_in_turn():
    """Within, one thread at a time makes a syntax tree. Python 3.11 has all of them count its depth in one place, and
    raises SystemError where another thread came between."""
    parse, lock = ast.parse, Lock()

    def parse_alone(*arguments, **options):
        with lock:
            return parse(*arguments, **options)

    ast.parse = parse_alone
    try:
        yield
    finally:
        ast.parse = parse


@contextmanager
def compiling():
    """Compiles what is launched within, on the meta device, for the GPU at hand: on all cores, and before it is left.

    Otherwise a kernel is compiled when it is first launched, one after the other. Raises what the compiler raises, and
    ValueError for a kernel that the GPU has too little shared or tensor memory for.
    """
    with counting() as launched:
        yield
    with ThreadPoolExecutor(os.cpu_count()) as threads, parsing_in_turn(), triton.AsyncCompileMode(threads):
        made = [launch.kernel.warmup(**launch.tensors, **launch.arguments, grid=launch.grid) for launch in launched.all]
    if torch.cuda.is_available():
        limit = max_shared_mem(torch.cuda.current_device())
        for launch, compiled in zip(launched.all, made):
            _require_fitting(launch, compiled, limit)


def _require_fitting(launch: Launch, compiled, limit: int):
    compiled = compiled.result() if hasattr(compiled, "result") else compiled  # of those that were compiled just now
    needs = compiled.metadata
    for needed, there, what in (
        (needs.shared, limit, "bytes of shared memory"), (needs.tmem_size, TENSOR_MEMORY, "columns of tensor memory")
    ):  # fmt: skip
        if needed > there:
            raise ValueError(
                f"{launch.kernel.fn.__name__} for slices of {launch.arguments.get('C')} channels needs {needed:,} "
                f"{what}, and this GPU has {there:,} a block; use fewer --init-channels, or --kernels reference"
            )


def launch(function, grid: tuple[int, ...], tensors: dict, moved: float, **arguments):
    """function[grid](**tensors, **arguments), counted as one launch that moves that many bytes."""
    for counter in _counting:
        counter.launches[function.fn.__name__] += 1
        counter.bytes[function.fn.__name__] += moved
        counter.all.append(Launch(function, grid, tensors, arguments, moved))
    first = next(iter(tensors.values()))
    if first.device.type != "meta":
        with torch.cuda.device_of(first):  # Triton launches on the current GPU, whatever holds the tensors
            function[grid](**tensors, **arguments)


def padded(channels: int) -> int:
    """Block sizes are powers of two."""
    return triton.next_power_of_2(channels)


def pieces(count: int, size: int) -> int:
    return -(-count // size)


def require_addressable(elements: int, images: int, size):
    """Kernels count the elements of a map in 32 bits. Raises ValueError where that does not suffice."""
    if elements >= 2**31:
        raise ValueError(f"{images} images of {size[0]}x{size[1]} are too many for one launch; use a smaller batch")


TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def dot_options(dtype: torch.dtype) -> dict:
    """PRECISION of tl.dot in float32: exact, or tf32 where torch.set_float32_matmul_precision allows it."""
    exact = torch.get_float32_matmul_precision() == "highest" or interpreted()
    return {"PRECISION": "ieee" if exact or dtype != torch.float32 else "tf32"}


def _let_numbers_be_taken():
    """Triton 3.6's interpreter has int() take a number out of an array of one element, which NumPy 2.5 refuses; 3.7's
    does not."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if interpreted() and VERSION < (3, 7):
    _let_numbers_be_taken()
