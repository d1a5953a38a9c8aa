"""Triton's driver of the machine: kernels are compiled for a GPU that is not there, and launched on the CPU."""

import ctypes
import itertools
import re
import struct
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from fpdarts.kernels.triton.launch import interpreted
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from benchmarks.aot import SHARED_LIMIT, Absent
from benchmarks.emulator.program import Program
from fpdarts import kernels

TOLD = 2000  # characters
COUNTS = "instructions", "global", "shared", "products"  # of warps, as in machine.h
_numbers = itertools.count(1000)  # by which Triton keeps apart what was compiled for devices


def build(folder: str) -> ctypes.CDLL:
    """Raises ValueError where no C++ compiler can."""
    library = Path(folder) / "machine.so"
    options = ["-std=c++20", "-O2", "-march=native", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"]
    source = Path(__file__).with_name("machine.cpp")
    try:
        subprocess.run(["c++", *options, "-o", str(library), str(source), "-lpthread"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"the emulator needs a C++20 compiler, c++: {error}") from None
    machine = ctypes.CDLL(str(library))
    machine.machine_kernel.restype = ctypes.c_void_p
    return machine


class Emulated(Absent):
    """The GPU. faults: what kernels did wrong, in words. bounded: whether accesses have to be in a kernel's tensors.
    launches: a kernel's name and its COUNTS, of each launch, in order."""

    def __init__(self, arch: int, machine: ctypes.CDLL):
        super().__init__(arch, next(_numbers))
        self.machine, self.utils = machine, self
        self.programs: dict[bytes, Program] = {}
        self.launches, self.faults, self.bounded = [], [], True

    # what Triton calls

    def launcher_cls(self, source, metadata):
        kinds = list(source.signature.values())

        def launch(x, y, z, stream, function, packed, told, enter, leave, *arguments):
            self.run(*function, (x, y, z), kinds, arguments)

        return launch

    def load_binary(self, name, kernel, shared, device):
        if kernel not in self.programs:
            self.programs[kernel] = Program(self.machine, kernel.decode())
        return None, (self.programs[kernel], shared), 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_LIMIT[self.arch], "multiprocessor_count": 132, "warpSize": 32}

    def run(self, program: Program, shared: int, grid, kinds, arguments):
        values, memory = [], []
        for kind, argument in zip(kinds, arguments, strict=True):
            if kind.startswith("*"):
                storage = argument.untyped_storage()
                memory += [storage.data_ptr(), storage.data_ptr() + storage.nbytes()]
                values.append(argument.data_ptr())
            elif kind == "fp32":
                values.append(struct.unpack("<I", struct.pack("<f", argument))[0])
            elif kind != "constexpr":
                values.append(int(argument) % 2**64)
        memory = memory if self.bounded else []
        values += [0] * (len(program.parameters) - len(values))  # memory for profilers
        count, told, counts = len(values), ctypes.create_string_buffer(TOLD), (ctypes.c_uint64 * len(COUNTS))()
        faults = self.machine.machine_run(
            program.handle, (ctypes.c_uint32 * 3)(*grid), program.warps, shared, (ctypes.c_int * 7)(*program.special),
            (ctypes.c_uint64 * count)(*values), (ctypes.c_int * count)(*program.at),
            (ctypes.c_int * count)(*program.parameters), count, (ctypes.c_uint64 * len(memory))(*memory),
            len(memory) // 2, torch.get_num_threads(), len(self.launches), told, counts,
        )  # fmt: skip
        self.launches.append((program.name, dict(zip(COUNTS, counts))))
        if faults:
            self.faults += re.sub(
                r"line (\d+)", lambda line: program.told(int(line[1])), told.value.decode()
            ).splitlines()


@contextmanager
def emulating(arch: int):
    """Within, Triton's kernels run on CPU tensors as they are compiled for that chip. Yields the Emulated.

    Triton's assembler, whose work is not run, is left out: its cache is another one meanwhile. Raises ValueError where
    kernels are interpreted, or there is no C++ compiler.
    """
    if interpreted():
        raise ValueError("with TRITON_INTERPRET=1 nothing is compiled; unset it")
    with tempfile.TemporaryDirectory() as folder:
        emulated = Emulated(arch, build(folder))
    against, cache = kernels._reason_against, f"{triton.knobs.cache.dir}-emulated"
    with (
        triton.knobs.cache.scope(),
        patch.object(CUDABackend, "make_cubin", lambda self, ptx, *_: ptx.encode()),
        patch.object(
            kernels, "_reason_against", lambda name, device: None if name == "triton" else against(name, device)
        ),
    ):
        triton.knobs.cache.dir = cache
        driver.set_active(emulated)
        try:
            yield emulated
        finally:
            driver.set_active(None)  # it looks again when it is asked
