import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from fpdarts.kernels import reference

from fpdarts import kernels

# On maps as small as the tests', threads mostly wait for one another: ten times slower beside another busy process.
torch.set_num_threads(1)


@pytest.fixture
def plant(monkeypatch):
    """Makes a back end of the reference's functions with some replaced, or left out where they are None, also under the
    name of one that exists."""

    def make(name, **functions):
        module = ModuleType(f"fpdarts.kernels.{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        parts = "stage", "pooling", "factorized_reduction", "normalize", "node"
        for key in ("unavailable", *parts, "cell", "derived_cell"):
            if (function := functions.get(key, getattr(reference, key))) is not None:
                setattr(module, key, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if name not in kernels.BACKENDS:
            monkeypatch.setattr(kernels, "BACKENDS", (*kernels.BACKENDS, name))
        kernels._reason_against.cache_clear()

    yield make
    kernels._reason_against.cache_clear()
