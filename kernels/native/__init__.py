"""The native back end: C++ kernels for CPUs with AVX2 or AVX-512. Contracts of the functions: ``fpdarts.kernels``.

library.py loads what CMakeLists.txt built from kernels/csrc; operators.py, derived.py, stems.py and parts.py register
it with PyTorch (registration.py): a cell, a cell of a derived network, the stem, and the parts of a cell. They load at
the first call: the package can be imported, and says why it cannot run, where nothing was built.
"""

from importlib import import_module

DTYPES = ("float32",)


def unavailable(device):
    if device.partition(":")[0] != "cpu":
        return f"they are for CPUs, not for {device}; use --kernels triton or --kernels reference"
    library = import_module(f"{__name__}.library")
    try:
        library.library()
    except library.LibraryError as error:
        return str(error)
    return None


_MODULES = dict.fromkeys(("stage", "pooling", "factorized_reduction", "normalize", "node"), "parts") | {
    "cell": "operators",
    "derived_cell": "derived",
    "stem": "stems",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = function  # from now on found without coming here, also by torch.compile, which cannot import
    return function
