import os
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fpdarts.kernels import reference

from fpdarts import kernels

# On maps as small as the tests', threads mostly wait for one another: ten times slower beside another busy process.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """PyTorch's generator starts anywhere. One draw in some hundred is so badly conditioned that float32 misses a
    tolerance on any back end. With this seed the worst error in agreement.py is a third of what is allowed."""
    torch.manual_seed(5)


@pytest.fixture(scope="session", autouse=True)
def decoded_images_are_kept_elsewhere(tmp_path_factory):
    os.environ["FPDARTS_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # not in the user's folder


@pytest.fixture(scope="session", autouse=True)
def in_the_interpreter(request):
    """Waits for the Triton back end's tests, which run beside all others: they take about as long, on one core.

    Returns (exit status, output). None where their test was not asked for.
    """
    if not any(item.name == "test_in_the_interpreter" for item in request.session.items):
        yield None
        return
    environment = {**os.environ, "FPDARTS_TESTED": "triton", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    with tempfile.TemporaryFile("w+") as output:
        inner = subprocess.Popen(
            [*command, str(Path(__file__).parent / "agreement.py")], env=environment, stdout=output, stderr=output
        )

        def wait():
            inner.wait()
            output.seek(0)
            return inner.returncode, output.read()

        yield wait
        inner.kill()  # if nothing waited
        inner.wait()


@pytest.fixture
def plant(monkeypatch):
    """Makes a back end of the reference's functions with some replaced, or left out where they are None, also under the
    name of one that exists."""

    def make(name, **functions):
        module = ModuleType(f"fpdarts.kernels.{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        parts = "stage", "pooling", "factorized_reduction", "normalize", "node"
        own = {key: getattr(reference, key) for key in ("unavailable", *parts, "cell", "derived_cell")}
        for key, function in (own | functions).items():
            if function is not None:
                setattr(module, key, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if name not in kernels.BACKENDS:
            monkeypatch.setattr(kernels, "BACKENDS", (*kernels.BACKENDS, name))
        forget()

    def forget():
        for reason in (kernels._reason_against, kernels._reason_lacking, kernels._reason_of_dtype):
            reason.cache_clear()

    yield make
    forget()
