import pytest

from benchmarks.limits import measure


def pytest_addoption(parser):
    group = parser.getgroup("fpdarts")
    group.addoption("--device", default="cpu", help="where the benchmarks run: cpu, cuda, ...")
    group.addoption("--compile", action="store_true", help="time torch.compile too; compiling a cell takes minutes")


@pytest.fixture(scope="session")
def device(pytestconfig):
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def limits(device):
    return measure(device)
