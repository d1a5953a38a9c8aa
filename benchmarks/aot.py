"""Compiles every Triton kernel, in every configuration that a step launches, for GPUs that are not there.

    python -m benchmarks.aot [--arch 80 90] [--dtypes float32 bfloat16 tf32] [--steps search retrain] [--json]

The configurations are those that the launchers ask for on the meta device: in a weight and an architecture step of the
CIFAR-10 and ImageNet searches with K = 2 and 4 and in their evaluation, and in a step and an evaluation of both
retrainings, of genotypes that have every operation. Told are registers, spills, shared memory, the widest load and the
tensor core instructions of each. Exit status 1 where one spills, wants more shared or tensor memory than the chip has,
loads its data in pieces narrower than 64 bit, or waits for rows that are to be copied ahead (rows.py). Needs triton
and, beside it, PyTorch on the CPU; no GPU, no driver.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# bytes a program may have
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# kernels whose loads are single numbers or strided by their nature, and are a small part of all bytes
NARROW = {"mix_fwd_kernel", "mix_bwd_kernel", "expand_kernel", "unpack_kernel"}
NARROW |= {"arrange_kernel", "collect_kernel"}


@dataclass(frozen=True)
class Options:
    arch: tuple[Literal[80, 86, 89, 90, 100, 120], ...] = (80, 90)
    """Compute capabilities times ten."""
    dtypes: tuple[Literal["float32", "bfloat16", "tf32"], ...] = ("float32", "bfloat16", "tf32")
    """tf32: float32 with torch.set_float32_matmul_precision("high")."""
    steps: tuple[Literal["search", "retrain"], ...] = ("search", "retrain")
    searches: tuple[Literal["cifar", "imagenet"], ...] = ("cifar", "imagenet")
    """Protocols, of retrainings too."""
    partial: tuple[int, ...] = (2, 4)
    """K."""
    init_channels: int = 16
    """Of searches."""
    kernels: tuple[str, ...] = ()
    """Only kernels whose name contains one of these."""
    jobs: int = 2
    """Processes."""
    json: bool = False
    out: str | None = None


def configurations(options: Options, arch: int) -> list[dict]:
    """What a process needs to compile each, over all steps."""
    import torch

    found = {}
    for dtype in options.dtypes:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        storage = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        for protocol in options.searches:
            for step in options.steps:
                for job in specialized(STEPS[step](protocol, storage, options), arch):
                    found.setdefault(job["data"], job | {"dtype": dtype})
    torch.set_float32_matmul_precision("highest")
    return list(found.values())


def searched(protocol, storage, options):
    """Launches of a weight step, of an architecture step and of a forward in evaluation."""
    import torch
    from fpdarts.kernels.triton.launch import counting

    from fpdarts import SuperNet
    from fpdarts.ahead import take_search_steps, twin

    for k in options.partial:
        n, side = (256, 32) if protocol == "cifar" else (128, 224)
        with torch.device("meta"):
            model = SuperNet(10, options.init_channels, 8, partial=k, stem=protocol)
        with counting() as launched:
            images = torch.empty(n, 3, side, side, dtype=storage, device="meta")
            take_search_steps(twin(model, "triton", storage), images)
        yield from launched.all


def _retrained(protocol, storage, options):
    """Launches of a step, and of a forward in evaluation."""
    import torch
    from fpdarts.kernels.triton.launch import counting

    from fpdarts import DerivedNetwork
    from fpdarts.ahead import take_retraining_steps, twin
    from fpdarts.genotype import PUBLISHED, Genotype

    # with what the published ones do not have: factorized reductions, and averages of reduced maps
    normal = ("sep_conv_3x3", 0), ("avg_pool_3x3", 1), ("dil_conv_5x5", 2), ("max_pool_3x3", 1)
    reduce = ("skip_connect", 0), ("avg_pool_3x3", 1), ("sep_conv_5x5", 1), ("skip_connect", 2)
    other = Genotype(normal, (2, 3), reduce, (2, 3))
    n, side, channels, cells = (96, 32, 36, 20) if protocol == "cifar" else (128, 224, 48, 14)
    for genotype in (PUBLISHED["PC_DARTS_cifar"], PUBLISHED["DARTS_V2"], other):
        with torch.device("meta"):
            network = DerivedNetwork(genotype, 10, channels, cells, protocol, False)
        images = torch.empty(n, 3, side, side, dtype=storage, device="meta")
        with counting() as launched:
            take_retraining_steps(twin(network, "triton", storage), images, 0.3 if protocol == "cifar" else 0.0)
        yield from launched.all


STEPS = {"search": searched, "retrain": _retrained}


class Absent:
    """A GPU that is not there, for Triton to compile for. device: a number by which it keeps apart what it compiled."""

    def __init__(self, arch: int, device: int):
        self.arch, self.device = arch, device

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling_for(arch: int, device: int):
    """Triton then compiles for such a GPU, and afterwards again for the one that is there."""
    from triton.runtime import driver

    driver.set_active(Absent(arch, device))
    try:
        yield
    finally:
        driver.set_active(None)  # it looks again when it is asked


def specialized(launches, arch: int) -> list[dict]:
    """What a process needs to compile each configuration, ``data`` being as Triton specializes it. launches: gone
    through while Triton compiles for that chip, which launchers ask for as they choose block shapes."""
    import triton

    found = []

    def keep(compile, **_):
        found.append(compile["specialization_data"])
        return True  # it is not to be compiled now

    # a device where nothing was compiled: of what was, Triton gives no data
    with compiling_for(arch, -arch), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = keep
        jobs = []
        for launch in launches:
            launch.kernel.warmup(**launch.tensors, **launch.arguments, grid=launch.grid)
            function = launch.kernel.fn
            job = {"kernel": function.__name__, "module": function.__module__, "arch": arch}
            jobs.append(job | {"c": launch.arguments.get("C"), "data": found[-1], "configuration": told(launch)})
    return jobs


def binary(job: dict):
    """What Triton makes of a configuration; where a launch asks for the same one later, it is in Triton's cache."""
    from importlib import import_module

    import fpdarts  # noqa: F401  finds fpdarts.kernels in a checkout

    with compiling_for(job["arch"], job["arch"]):
        return getattr(import_module(job["module"]), job["kernel"]).preload(job["data"])


def compiled(job: dict) -> dict:
    """Resources and instructions of one kernel; with "error" in place of them where it does not compile."""
    from fpdarts.kernels.triton.launch import TENSOR_MEMORY

    row = {name: job[name] for name in ("kernel", "arch", "dtype", "configuration")}
    try:
        made = binary(job)
    except Exception as error:  # the compiler raises many kinds, and one failure is not to hide the others
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0], "passed": False}
    row |= _resources(made.asm["cubin"]) | {"shared": made.metadata.shared}
    problems = []
    if row["spills"]:
        problems.append("spills")
    if row["shared"] > SHARED_LIMIT[job["arch"]] or made.metadata.tmem_size > TENSOR_MEMORY:
        problems.append("too much shared or tensor memory")
    if job["kernel"].startswith("rows_") and job["dtype"] == "bfloat16" and not row["copied"]:
        problems.append("nothing copied ahead")
    if job["kernel"] not in NARROW:
        if row["widest_load"] < 64:
            problems.append("narrow loads")
        # of a small tile of weights, a thread may load single elements; of 4 channels, rows.py has code for 16 of them:
        # for each row of taps, of sides 3 and 5, of both dilations
        elif row["loads"].get("16", 0) > (16 if job["kernel"].startswith("rows_") and job["c"] < 8 else 2):
            problems.append("16-bit loads")
    return row | {"problems": problems, "passed": not problems}


def told(launch) -> str:
    """Its configuration, in words."""
    shown = (
        "C",
        "C_IN",
        "STRIDE",
        "TAPS",
        "POOLED",
        "DROP",
        "ACTIVATE",
        "EDGES",
        "NORMALIZE",
        "STATISTICS",
        "K",
        "IS_NODE",
        "BLOCK",
        "TALL",
        "WIDE",
        "ACROSS",
        "BLOCK_K",
        "COLUMNS",
        "PRECISION",
        "num_warps",
        "num_stages",
        "maxnreg",
    )
    return " ".join(f"{name}={launch.arguments[name]}" for name in shown if name in launch.arguments)


def _resources(cubin: bytes) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command):
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", run(str(tools / "cuobjdump"), "--dump-resource-usage"))
        assembly = run(str(tools / "cuobjdump"), "--dump-sass")
    operations = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", assembly, re.M))

    def named(*prefixes):
        return sum(count for name, count in operations.items() if name.split(".")[0] in prefixes)

    loads = Counter()
    for name, count in operations.items():
        parts = name.split(".")
        if parts[0] in ("LDG", "LDGSTS"):
            width = next((w for w in ("128", "64") if w in parts), "16" if {"U16", "S16"} & set(parts) else "32")
            loads["8" if {"U8", "S8"} & set(parts) else width] += count
    return {
        "registers": int(usage[1]), "stack": int(usage[2]), "spills": named("LDL", "STL"), "loads": dict(loads),
        "widest_load": max((int(width) for width in loads), default=0),
        "tensor_core": named("HMMA", "HGMMA", "UTCHMMA"), "copied": named("LDGSTS"), "fma": named("FFMA"),
        "instructions": sum(operations.values()), "barriers": named("BAR"),
    }  # fmt: skip


def main(options: Options) -> dict:
    jobs = [
        job for arch in options.arch for job in configurations(options, arch)
        if not options.kernels or any(part in job["kernel"] for part in options.kernels)
    ]  # fmt: skip
    if not jobs:
        raise ValueError(f"no kernel's name contains {' or '.join(options.kernels)}")
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        pending = [pool.submit(compiled, job) for job in jobs]
        for i, future in enumerate(pending):
            rows.append(future.result())
            print(f"\r{i + 1} of {len(pending)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    import triton

    result = {"triton": triton.__version__, "rows": rows, "passed": all(row["passed"] for row in rows)}
    if options.out:
        from benchmarks import report

        report.write(options.out, result)
    return result


def show(result: dict) -> str:
    """The worst of each kernel, architecture and dtype, and every one that failed."""
    lines = [
        f"{'kernel':24s} {'arch':>4s} {'dtype':>8s} {'':>5s} {'regs':>5s} {'spills':>6s} {'shared':>7s} "
        f"{'load':>5s} {'mma':>5s}"
    ]
    groups = {}
    for row in result["rows"]:
        groups.setdefault((row["kernel"], row["arch"], row["dtype"]), []).append(row)
    for (kernel, arch, dtype), rows in sorted(groups.items()):
        good = [row for row in rows if "error" not in row]
        if good:
            lines.append(
                f"{kernel:24s} {arch:4d} {dtype:>8s} {len(rows):5d} {max(r['registers'] for r in good):5d} "
                f"{max(r['spills'] for r in good):6d} {max(r['shared'] for r in good):7d} "
                f"{min(r['widest_load'] for r in good):5d} {min(r['tensor_core'] for r in good):5d}"
            )
    for row in result["rows"]:
        if not row["passed"]:
            why = row.get("error") or ", ".join(row["problems"])
            lines.append(f"FAILED {row['kernel']} sm_{row['arch']} {row['dtype']} {row['configuration']}: {why}")
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    options = tyro.cli(Options, description=__doc__)
    try:
        result = main(options)
    except ValueError as error:
        sys.exit(f"benchmarks.aot: {error}")
    print(json.dumps(result) if options.json else show(result))
    sys.exit(0 if result["passed"] else 1)
