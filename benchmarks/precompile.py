"""Compiles all that ``benchmarks.gpu`` launches, on a machine without a GPU, into a file to be carried to one with.

    python -m benchmarks.precompile --arch 90 --out compiled.tar.xz
    python -m benchmarks.gpu --precompiled compiled.tar.xz ...

Compiling takes longer than all measurements together, and a GPU that is paid by the minute need not wait for it. Both
machines need the same versions of Triton and of this checkout; what a file lacks is compiled where it is missing.
Stopped and called again, it goes on.
"""

import json
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules

from benchmarks import aot

SUFFIXES = (".json", ".cubin")  # of what Triton reads again; it leaves sources as well


def jobs(arch: int) -> list[dict]:
    """Of check-kernels, of the steps in the GPU script, and of what ``benchmarks.tune`` times, in this order."""
    from benchmarks import tune

    asked = aot.Options(dtypes=("bfloat16", "tf32"), searches=("cifar",), partial=(2,))
    found = {}
    for job in aot.specialized(_checked(), arch) + aot.configurations(asked, arch) + tune.configurations(arch):
        found.setdefault(job["data"], job)
    return list(found.values())


def _checked():
    """What check-kernels launches."""
    import torch
    from fpdarts.kernels.triton.launch import counting

    from fpdarts.check import compute_all
    from fpdarts.check_cases import Side, operations

    with counting() as launched:
        for amp in ("off", "bf16"):
            compute_all(operations(), Side("triton", torch.device("meta"), torch.float32, amp))
    yield from launched.all


def compile_all(jobs: list[dict]) -> tuple[set[Path], list[str]]:
    """Into Triton's cache, on all cores; returns where there, and what did not compile, and why."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = list(pool.map(_compiled, jobs, chunksize=4))
    errors = [f"{job['kernel']} {job['configuration']}: {error}" for job, (_, error) in zip(jobs, found) if error]
    return {folder for folder, _ in found if folder}, errors


def _compiled(job: dict) -> tuple[Path | None, str | None]:
    """(its folder in the cache, why there is none)."""
    from triton.runtime.cache import get_cache_manager

    same_keys()
    try:
        return Path(get_cache_manager(aot.binary(job).hash).cache_dir), None
    except Exception as error:  # the compiler raises many kinds
        return None, f"{type(error).__name__}: {error}"[:300]


@cache
def same_keys():
    """Makes the keys of Triton's cache the same in all processes, here and where the file is carried to.

    Compilers are told apart by their version, not by the bytes of their libraries, which are others for each Python.
    A function's key has the constants of those that it calls only if their keys were asked for before: that is done.
    """
    import triton
    from fpdarts.kernels import triton as package
    from triton.runtime import JITFunction
    from triton.runtime import cache as compiled

    if hasattr(compiled, "triton_key"):
        compiled.triton_key = lambda: triton.__version__

    def ask(function):
        for name in function.fn.__code__.co_names:
            if isinstance(called := function.fn.__globals__.get(name), JITFunction):
                ask(called)
        return function.cache_key

    for module in iter_modules(package.__path__, package.__name__ + "."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, JITFunction):
                ask(value)


def pack(cache: Path, folders: set[Path], target: Path):
    """Those folders of the cache: in others lie kernels of older checkouts."""
    partial = target.with_name(target.name + ".partial")
    with tarfile.open(partial, "w:xz", preset=2) as archive:  # a higher one takes minutes
        for path in sorted(path for folder in folders for path in folder.iterdir()):
            if path.suffix in SUFFIXES:
                archive.add(path, path.relative_to(cache))
    partial.replace(target)


def unpack(source: Path, cache: Path):
    """Once. Triton writes down where its files lie: that is put right."""
    mark, known = cache / "precompiled", f"{source.name} {source.stat().st_size} {source.stat().st_mtime}"
    if mark.exists() and mark.read_text() == known:
        return
    with tarfile.open(source) as archive:
        archive.extractall(cache, filter="data")
    for path in cache.rglob("__grp__*"):
        names = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}))
    mark.write_text(known)


def main(options):
    target = Path(options.out)
    cache = target.parent.absolute() / (target.name.removesuffix(".tar.xz") + "-cache")
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    same_keys()
    wanted = jobs(options.arch)
    folders, errors = compile_all(wanted)
    pack(cache, folders, target)
    print(f"{len(wanted)} configurations, {target.stat().st_size / 1e6:.1f} MB in {target}")
    print("\n".join(errors) or "all compile")
    return bool(errors)


if __name__ == "__main__":
    import argparse
    import sys

    import fpdarts  # noqa: F401  finds fpdarts.kernels in a checkout

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--out", default="compiled.tar.xz")
    sys.exit(main(parser.parse_args()))
