from functools import cache

import pytest
import torch

from benchmarks.limits import measure
from fpdarts.training import select_device
from fpdarts.verify import one_precision


def pytest_addoption(parser):
    group = parser.getgroup("fpdarts")
    group.addoption("--device", default="cpu", help="where the benchmarks run: cpu, cuda, ...")
    group.addoption("--compile", action="store_true", help="time torch.compile too; compiling a cell takes minutes")


@pytest.fixture(scope="session")
def device(pytestconfig):
    return str(select_device(pytestconfig.getoption("--device")))


@pytest.fixture(scope="session", autouse=True)
def precision():
    """The same for all sides."""
    with one_precision():
        yield


@pytest.fixture(scope="session")
def limits(device):
    """Of whether it is in bfloat16."""
    return cache(lambda bf16=False: measure(device, torch.bfloat16 if bf16 else torch.float32))
