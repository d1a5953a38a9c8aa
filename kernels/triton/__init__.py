"""The Triton back end, for NVIDIA GPUs. Contracts of the functions are in ``fpdarts.kernels``.

Read in this order: driver.py (a cell: what runs when), forward.py and backward.py (the launches), layout.py and plan.py
(where everything lies, and the tables of jobs), packing.py, convolution.py, rows.py, rows_wgrad.py, pools.py,
mixture.py and statistics.py (the kernels), launch.py and tuning.py (how they are launched), parts.py (a cell's parts as
functions). Then derived cells in the same order: derived.py, derived_forward.py and derived_backward.py,
derived_plan.py, affine.py, depthwise.py, pointwise.py and join.py.

All kernels and their wrappers load at the first call: the package can be imported, and says why it cannot run, where
triton is not installed.
"""

from importlib import import_module
from importlib.util import find_spec

DTYPES = ("float32", "bfloat16")
GRAPHS = ("cell", "derived_cell")  # gates are read on the device, and nothing waits for it


def unavailable(device):
    if find_spec("triton") is None:
        return "triton is not installed; install it with pip install 'triton>=3.6' (Linux), or use --kernels reference"
    import torch

    kind = torch.device(device).type
    if kind == "meta":
        return None  # nothing is computed: launches are counted
    if kind == "cpu":
        if import_module(f"{__name__}.launch").interpreted():
            return None
        return "they are for NVIDIA GPUs; use --device cuda, or TRITON_INTERPRET=1 to run them, very slowly, on the CPU"
    if kind != "cuda" or torch.version.hip:
        return f"they are for NVIDIA GPUs, not for {kind}; use --kernels reference"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU here; use --device cpu"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        has = f"{major}.{minor}"
        return f"they need compute capability 8.0 (Ampere) or newer, this GPU has {has}; use --kernels reference"
    return None


def _lazily(module: str, name: str):
    def function(*args, **options):
        return getattr(import_module(f"{__name__}.{module}"), name)(*args, **options)

    function.__name__ = name
    return function


counting, compiling = _lazily("launch", "counting"), _lazily("launch", "compiling")
cell = _lazily("driver", "cell")
derived_cell = _lazily("derived", "derived_cell")
stage, pooling, factorized_reduction, normalize, node = (
    _lazily("parts", name) for name in ("stage", "pooling", "factorized_reduction", "normalize", "node")
)
