"""What every result says about where it comes from, and how it is written."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fpdarts.training import select_device

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: str = "cpu") -> dict:
    """Machine, versions, commit and command of a measurement."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            **{p: _version(p) for p in ("torch", "triton", "torchvision", "nvidia-dali-cuda130")},
        },
        "commit": _commit(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
    }


def located(path: str | Path) -> Path:
    """A path without a folder is one of benchmarks/results."""
    return Path(path) if Path(path).parent != Path() else RESULTS / path


def write(path: str | Path, result: dict, device: str = "cpu"):
    """As JSON, after the environment that it was measured in."""
    path = located(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(device), **result}, indent=1) + "\n")


def command(name: str, options, main: Callable, show: Callable, description: str):
    """What ``python -m benchmarks.<name>`` does: parse, run, print, as JSON or for people.

    options: dataclass with a field json. main: of the options, returns the result. show: of (result, options), a text.
    """
    import tyro  # here: on a GPU machine that has none, the functions are called directly

    options = tyro.cli(options, prog=f"python -m benchmarks.{name}", description=description)
    try:
        select_device(getattr(options, "device", None) or "cpu")  # makes it the current one
        result = main(options)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"benchmarks.{name}: {error}")
    print(json.dumps(result) if options.json else show(result, options))
