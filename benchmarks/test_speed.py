"""pytest-benchmark suites: each part, each cell and each step, on every side that can run here.

    python -m pytest benchmarks -m small          the shapes of both searches at small batches
    python -m pytest benchmarks -m full           as they are searched
    ... --device cuda --compile                   on a GPU; torch.compile too

A result is checked against the reference before it is timed. extra_info holds what a call amounts to: launches (of what
PyTorch dispatches), FLOPs and fewest bytes by formula, the share of the nearer limit.
"""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from benchmarks.cases import DEFAULTS, STEPS, Setting, build, check, reference_results
from benchmarks.counting import Count
from benchmarks.limits import timed
from benchmarks.sides import Side, here
from fpdarts import kernels

# C and side of the states of normal cells, of the first to the last third of the supernet
CIFAR, IMAGENET = ((16, 32), (32, 16), (64, 8)), ((16, 28), (32, 14), (64, 7))
CONVOLUTIONS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
BATCH = {"small": 8, "full": 64}


def _shapes(size: str):
    """Of parts and cells: (C, side) by search; the small ones leave the middle third out."""
    every = [(c, side, name) for name, shapes in (("cifar", CIFAR), ("imagenet", IMAGENET)) for c, side in shapes]
    return every if size == "full" else [every[0], every[2], every[5]]


def _parts(size: str):
    for c, side, search in _shapes(size):
        base = Setting(BATCH[size], c, image_size=side)
        for direction in ("forward", "backward"):
            for operation in CONVOLUTIONS if size == "full" else CONVOLUTIONS[1:3]:
                for stride in (1, 2) if side % 2 == 0 and size == "full" else (1,):
                    yield search, "stage", replace(base, operation=operation, stride=stride, direction=direction)
            for operation in ("max_pool_3x3", "avg_pool_3x3"):
                yield search, "pooling", replace(base, operation=operation, direction=direction)
            yield search, "node", replace(base, direction=direction)


def _cells(size: str):
    for c, side, search in _shapes(size):
        yield search, "cell", Setting(BATCH[size], c, image_size=side)
        if size == "full" and side % 2 == 0:
            yield search, "cell", Setting(BATCH[size], c, image_size=side, reduction=True)


def _steps(size: str):
    n = BATCH[size]
    for what in ("search-step", "arch-step"):
        for gates in ("both", "step"):
            yield "cifar", what, Setting(n, gates=gates)
        yield "imagenet", what, Setting(n // 4, image_size=224, stem="imagenet")
    retraining = DEFAULTS["retrain-step"]
    yield "cifar", "retrain-step", retraining if size == "full" else replace(retraining, batch_size=8)
    if size == "full":
        yield "imagenet", "retrain-step", Setting(8, 48, 14, 224, "imagenet")


def _name(search, what, s: Setting) -> str:
    words = [search, what, f"N{s.batch_size}", f"C{s.init_channels}", f"{s.image_size}x{s.image_size}"]
    words += {"stage": [s.operation, f"s{s.stride}"], "pooling": [s.operation]}.get(what, [])
    words += [s.direction] if what in ("stage", "pooling", "node") else []
    words += ["reduction"] if s.reduction else []
    return "-".join([*words, *([s.gates] if what in ("search-step", "arch-step") else [])])


def _parameters():
    for size in BATCH:
        for cases in (_parts, _cells, _steps):
            for search, what, setting in cases(size):
                yield pytest.param(what, setting, id=_name(search, what, setting), marks=getattr(pytest.mark, size))


@lru_cache(1)
def _expected(what, setting):
    return reference_results(what, setting)


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    metafunc.parametrize("what, setting", list(_parameters()))
    metafunc.parametrize("side", here(options.device, options.compile))  # the sides of a case follow each other


def test_speed(benchmark, what, setting, side, device, limits, request):
    side, setting = Side.parse(side, device), replace(setting, device=device)
    small = request.node.get_closest_marker("small") is not None
    if side.name == "compile" and small and (what, setting.image_size) != ("cell", 8):
        pytest.skip("of torch.compile the small suite times one cell; it takes minutes to compile one")
    if what == "retrain-step":
        kind = torch.device(device).type
        if reason := kernels.available(kind, "derived_cell")[side.kernels]:
            pytest.skip(reason)
    if side.graph and what not in STEPS:
        pytest.skip("only whole steps are timed under a CUDA graph")
    case = build(what, side, setting)
    check(what, side, setting, case, _expected(what, setting))

    calls = iter(range(1, 10**9))
    rounds = 3 if what.endswith("step") else 10
    benchmark.group = request.node.callspec.id.removesuffix(f"-{side}").removeprefix(f"{side}-")
    benchmark.pedantic(lambda: timed(lambda: case.step(next(calls)), device), rounds=rounds, warmup_rounds=1)

    size, median = 2 if side.bf16 else 4, benchmark.stats.stats.median
    benchmark.extra_info |= {
        "side": str(side),
        "what": what,
        "launches": launches(side, what, setting, case),
        "flops": case.work.flops,
        "bytes": case.work.bytes(size),
        "gflops_per_second": case.work.flops / median / 1e9,
        "gb_per_second": case.work.bytes(size) / median / 1e9,
        "nearer_limit": limits(side.bf16).nearer(case.work, size),
        "share_of_limit": limits(side.bf16).seconds(case.work, size) / median,
    }


def launches(side, what, setting, case) -> int | None:
    """Of one call: operators that PyTorch dispatches. None for compiled code and replayed graphs, which have none."""
    if side.name == "compile" or side.graph:
        return None
    with Count(setting.device) as count:
        case.step(0)
    return count.total()["launches"]
