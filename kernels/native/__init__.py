"""The native back end: C++ kernels for CPUs with AVX2 or AVX-512. Contracts of the functions are in ``fpdarts.kernels``.

library.py loads what CMakeLists.txt built from kernels/csrc; operators.py registers it with PyTorch.
"""

from importlib import import_module


def unavailable(device):
    if device.partition(":")[0] != "cpu":
        return f"they are for CPUs, not for {device}; use --kernels triton or --kernels reference"
    library = import_module(f"{__name__}.library")
    try:
        library.library()
    except library.LibraryError as error:
        return str(error)
    return None


def cell(*arguments):
    return import_module(f"{__name__}.operators").cell(*arguments)
