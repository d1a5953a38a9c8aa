"""Kernels compiled before a run: they are those that its steps launch, and a launch finds them compiled."""

import ast
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="triton is not installed")

from fpdarts.kernels.triton.launch import compiling, counting, parsing_in_turn
from triton.runtime import JITFunction, driver

from fpdarts import DerivedNetwork, SuperNet, ahead, kernels
from fpdarts.architect import frozen
from fpdarts.genotype import PUBLISHED
from fpdarts.training import autocast

from benchmarks import aot


@pytest.fixture
def nothing_runs(monkeypatch):
    """Triton's kernels can be launched anywhere, and do nothing."""
    monkeypatch.setattr(kernels, "_reason_against", lambda name, device: None)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)


def configurations(launches):
    """What kernels are compiled for, sizes aside."""
    return {
        (
            launch.kernel.fn.__name__,
            tuple((name, tensor.dtype) for name, tensor in launch.tensors.items()),
            tuple((p.name, launch.arguments.get(p.name)) for p in launch.kernel.params if p.is_constexpr),
            tuple((name, launch.arguments.get(name)) for name in ("num_warps", "num_stages", "maxnreg")),
        )
        for launch in launches
    }


@pytest.fixture
def compiled_ahead(monkeypatch):
    """Of a model, what is to be compiled for it."""

    def found(take_steps, model, amp):
        launches = []

        @contextmanager
        def instead():
            with counting() as launched:
                yield
            launches.extend(launched.all)

        monkeypatch.setattr(kernels.backend("triton", "cuda"), "compiling", instead)
        ahead.compile_steps(take_steps, model, 16, "triton", torch.device("cuda"), amp)
        return configurations(launches)

    return found


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_search_compiles_what_it_launches(amp, nothing_runs, compiled_ahead):
    model = SuperNet(5, 8, 3, nodes=2, kernels="triton")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = compiled_ahead(ahead.take_search_steps, model, amp)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and model.training
    images, labels, gates = torch.rand(3, 3, 16, 16), torch.zeros(3, dtype=torch.long), torch.ones(model.gate_shape)
    trained = model.weight_parameters(), model.architecture_parameters()
    with counting() as launched:
        for resting in trained:
            with frozen(resting):
                with autocast(amp, images.device):
                    loss = F.cross_entropy(model(images, gates), labels)
                loss.backward()
        with torch.no_grad(), autocast(amp, images.device):
            model.eval()(images, gates)
    assert configurations(launched.all) == ready


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_a_retraining_compiles_what_it_launches(amp, drop_path, nothing_runs, compiled_ahead):
    network = DerivedNetwork(PUBLISHED["PC_DARTS_cifar"], 5, 8, 3, auxiliary=False, kernels="triton")
    ready = compiled_ahead(partial(ahead.take_retraining_steps, drop_path=drop_path), network, amp)
    images, labels = torch.rand(3, 3, 16, 16), torch.zeros(3, dtype=torch.long)
    with counting() as launched:
        with autocast(amp, images.device):
            logits = network(images, torch.tensor(drop_path) if drop_path else 0.0)
        F.cross_entropy(logits, labels).backward()
        with torch.no_grad(), autocast(amp, images.device):
            network.eval()(images)
    assert configurations(launched.all) == ready
    with counting() as launched, torch.no_grad(), autocast(amp, images.device):
        network(images)
    assert configurations(launched.all) == compiled_ahead(ahead.take_evaluation, network.train(), amp) < ready


@pytest.mark.parametrize("name, device", [("reference", "cuda"), ("native", "cuda"), ("triton", "cpu")])
def test_back_ends_without_a_compiler_have_nothing_to_do(name, device, nothing_runs, capsys):
    def never():
        raise AssertionError

    ahead.compile_launches(never, name, torch.device(device))
    assert capsys.readouterr().err == ""


def test_a_launch_finds_what_was_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda cache_hit, **_: hits.append(cache_hit))

    def launch():
        x = torch.empty(2, 8, 4, 4, device="meta")
        kernels.pooling(x, "max_pool_3x3", kernels="triton")
        kernels.normalize(x, kernels="triton")

    with counting() as launched:
        launch()
    jobs = {job["data"]: job for job in aot.specialized(launched.all, 90)}
    for job in jobs.values():
        aot.binary(job)
    assert hits == [False] * len(jobs)
    for each in launched.all:
        each.kernel.device_caches.clear()  # as another process would begin
    hits.clear()
    with aot.compiling_for(90, 90):
        with compiling():
            launch()
        assert hits == [True] * len(jobs)
        for each in launched.all:
            each.kernel.warmup(**each.tensors, **each.arguments, grid=each.grid)
    assert len(hits) == len(jobs)
    assert {job["data"] for job in aot.specialized(launched.all, 90)} == jobs.keys()

    # and that the GPU has room for it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for shared, columns, fits in (
        (10**6, 512, nullcontext()),
        (-1, 512, pytest.raises(ValueError, match="of shared memory")),
        (10**6, -1, pytest.raises(ValueError, match="of tensor memory")),
    ):
        monkeypatch.setattr("fpdarts.kernels.triton.launch.max_shared_mem", lambda device: shared)
        monkeypatch.setattr("fpdarts.kernels.triton.launch.TENSOR_MEMORY", columns)
        for each in launched.all:
            each.kernel.device_caches.clear()
        with fits, aot.compiling_for(90, 90), compiling():
            launch()
    assert driver._active is None  # the GPU that is there, if there is one, is not left out


def test_threads_make_syntax_trees_in_turn(monkeypatch):
    """Python 3.11 raises SystemError now and then where they do not."""
    now, most = 0, 0

    def parse(source):
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.005)
        now -= 1

    monkeypatch.setattr(ast, "parse", parse)
    with ThreadPoolExecutor(4) as threads, parsing_in_turn():
        list(threads.map(ast.parse, ["pass"] * 8))
    assert most == 1 and ast.parse is parse
