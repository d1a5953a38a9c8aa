"""fpdarts: fast parallel differentiable architecture search.

The public names load on first use, so that ``import fpdarts`` and the command's help do not wait for torch.
"""

from importlib import import_module
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "kernels" / "spec.py").is_file() and (_ROOT / "setup.py").is_file():
    __path__.append(str(_ROOT))  # a source checkout: kernels/ lies beside this package

_PUBLIC = {
    "Architect": "fpdarts.architect",
    "DerivedNetwork": "fpdarts.network",
    "GateSampler": "fpdarts.gates",
    "Genotype": "fpdarts.genotype",
    "SuperNet": "fpdarts.supernet",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fpdarts' has no attribute {name!r}")


def __dir__():
    return __all__
