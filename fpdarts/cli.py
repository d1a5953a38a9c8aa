"""The command: parse, call, print. Heavy imports wait until a command needs them."""

import _thread
import atexit
import gc
import json
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from fpdarts.config import Amp, EvaluateConfig, Kernels, RetrainConfig, SearchConfig, Stem
from fpdarts.errors import DataError, KernelMismatch, NonFiniteLoss, RunError
from fpdarts.files import require_writable, to_json
from fpdarts.kernels import BackendUnavailable


@dataclass(frozen=True)
class Show:
    """Print a genotype."""

    genotype: tyro.conf.Positional[str]
    """A published genotype's name, a genotype file, or a run directory."""
    json: bool = False


@dataclass(frozen=True)
class Count:
    """Parameters and multiply-adds of the derived network, without the auxiliary head."""

    genotype: tyro.conf.Positional[str]
    """A published genotype's name, a genotype file, or a run directory."""
    stem: Stem = "cifar"
    init_channels: int = 36
    cells: int = 20
    classes: int | None = None
    """10 for the cifar stem, 1000 for the imagenet stem if not given."""
    json: bool = False


@dataclass(frozen=True)
class Draw:
    """Draw both cells into an SVG or PNG file."""

    genotype: tyro.conf.Positional[str]
    """A published genotype's name, a genotype file, or a run directory."""
    out: str
    """File to write; its suffix, .svg or .png, chooses the format."""


@dataclass(frozen=True)
class Import:
    """Read the Genotype(normal=[...], ...) text that papers print, and write it as a genotype file."""

    text: tyro.conf.Positional[str]
    """A file with the text; - for standard input."""
    out: str
    """Genotype file to write."""


@dataclass(frozen=True)
class GenotypeCommand:
    """Look at genotypes: show, count, draw, import."""

    action: (
        Annotated[Show, tyro.conf.subcommand("show")]
        | Annotated[Count, tyro.conf.subcommand("count")]
        | Annotated[Draw, tyro.conf.subcommand("draw")]
        | Annotated[Import, tyro.conf.subcommand("import")]
    )


@dataclass(frozen=True)
class CheckKernels:
    """Check the kernels on this machine against the reference in float64, operation by operation."""

    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    kernels: Kernels = "auto"
    amp: Amp = "off"
    """Mixed precision: bf16 is for CUDA; gradients of PyTorch on CPUs are wrong with it."""
    json: bool = False
    """Print the result as JSON on standard output; the table goes to standard error."""


@dataclass(frozen=True)
class SplitImagenet:
    """Write the class-balanced parts of a search as two lists of files, which search reads by --split."""

    data: str
    """Image folder."""
    out: str
    """Directory for weights.txt and architecture.txt."""
    weights: float = 0.10
    """Part of the training images that trains the weights."""
    architecture: float = 0.025
    """Part of the training images that trains the architecture and validates."""
    seed: int = 0
    skip: str | None = None
    """List of files to leave out, as check-data --bad writes it; search then takes the same."""


@dataclass(frozen=True)
class CheckData:
    """Look into every file of an image folder: which cannot be used, and what is done with the others."""

    path: tyro.conf.Positional[str]
    """Image folder."""
    bad: str | None = None
    """Write the files that would stop a run into this list, for --skip of search, retrain and evaluate."""
    json: bool = False
    """Print all findings as JSON on standard output."""


Command = (
    Annotated[SearchConfig, tyro.conf.subcommand("search")]
    | Annotated[RetrainConfig, tyro.conf.subcommand("retrain")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[GenotypeCommand, tyro.conf.subcommand("genotype")]
    | Annotated[CheckKernels, tyro.conf.subcommand("check-kernels")]
    | Annotated[CheckData, tyro.conf.subcommand("check-data")]
    | Annotated[SplitImagenet, tyro.conf.subcommand("split-imagenet")]
)
_DESCRIPTION = "Fast parallel differentiable architecture search: search, retrain, evaluate."
_CONF = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)

_NO_MEMORY = "out of memory", "allocate memory", "overflow"  # as PyTorch says it, on CUDA and on a CPU
# A resumed run may move to another machine; all else must be as it was, or it would not be the same run.
_MAY_CHANGE = {"resume", "json", "out", "device", "loader", "workers", "kernels", "verify_every", "cuda_graphs"}
_MAY_MOVE = {"data", "skip", "split"}  # a checkpoint tells whether their content is the same


def main(arguments: list[str] | None = None):
    """Exit status: 0 done, 1 an error of this project's own (one line on standard error), 2 wrong usage."""
    arguments, command = sys.argv[1:] if arguments is None else arguments, None
    atexit.register(gc.freeze)  # at its end Python would look through all of PyTorch, for seconds, for what to free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))
    try:
        with _interrupts_kept():
            command = tyro.cli(
                Command, prog="fpdarts", description=_DESCRIPTION, args=arguments,
                config=(*_CONF, tyro.conf.FlagCreatePairsOff),
            )  # fmt: skip
            _run(_expanded(command), arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RunError, NonFiniteLoss, KernelMismatch, BackendUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        told = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not any(words in told for words in _NO_MEMORY):
            raise
        options = "--batch-size, --init-channels, --image-size or --limit"
        print(f"error: {told}; a smaller {options} needs less", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        runs = isinstance(command, (SearchConfig, RetrainConfig))
        go_on = "; if its run directory was told, it goes on with --resume and that as --out" if runs else ""
        print(f"interrupted{go_on}", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _interrupts_kept():
    """Ctrl-C that falls into a callback, where Python drops what is raised, comes again a moment later."""
    before = sys.unraisablehook

    def hook(unraisable):
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, _thread.interrupt_main).start()  # now it would be lost once more
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


_PATHS = ("data", "out", "genotype", "run", "skip", "split", "path", "bad", "text")


def _expanded(command):
    """With ~ in paths replaced, where the shell leaves it (--out=~/runs). Raises ValueError for an empty one."""
    paths = {f.name: getattr(command, f.name) for f in fields(command) if f.name in _PATHS}
    paths = {name: path for name, path in paths.items() if path is not None}
    for name, path in paths.items():
        if not path:
            raise ValueError(f"--{name} is empty; give a path, or leave it out")
    return replace(command, **{name: os.path.expanduser(path) for name, path in paths.items()})


def _run(command, arguments):
    if isinstance(command, (SearchConfig, RetrainConfig)):
        if command.resume:
            command = _as_saved(command, arguments)
        if isinstance(command, SearchConfig):
            from fpdarts.search import search as run
        else:
            from fpdarts.retrain import retrain as run
        _print_result(run(command), command.json)
    elif isinstance(command, EvaluateConfig):
        from fpdarts.evaluate import evaluate

        _print_result(evaluate(command), command.json)
    elif isinstance(command, CheckKernels):
        _check_kernels(command)
    elif isinstance(command, CheckData):
        _check_data(command)
    elif isinstance(command, SplitImagenet):
        _split_imagenet(command)
    else:
        _genotype(_expanded(command.action))


def _as_saved(command, arguments):
    """The saved configuration of the run to resume; flags that would change it are refused."""
    from fpdarts.run import newest_checkpoint, read_config

    if command.out is None:
        raise RunError("--resume needs --out, the directory of the run to go on with")
    saved = replace(read_config(Path(command.out), type(command)), out=command.out, resume=True)
    may_change = _MAY_CHANGE | (_MAY_MOVE if newest_checkpoint(Path(command.out)) else set())
    if getattr(saved, "split", None) is None:
        may_change -= {"split"}  # parts of its own, which are others
    # Parsed again over what was saved: what differs then was given on the command line. A flag that was saved as true
    # may be given again, for which it must keep both of its forms (--unrolled, --no-unrolled).
    asked = _expanded(tyro.cli(type(command), args=arguments[1:], default=saved, config=_CONF))
    for field in fields(asked):
        old, new = getattr(saved, field.name), getattr(asked, field.name)
        if old != new and field.name not in may_change:
            flag = field.name.replace("_", "-")
            given = f"--{flag} {new}" if not isinstance(new, bool) else f"--{flag}" if new else f"--no-{flag}"
            raise RunError(f"{given} would change the run in {command.out}, which has {old}; leave it out to resume")
    return asked


def _print_result(result: dict, as_json: bool):
    if as_json:
        print(to_json(result))
        return
    for name, value in result.items():
        if name == "genotype":
            print("genotype:")
            print(_readable(value))
        elif value is not None:
            print(f"{name.replace('_', ' ')}: {f'{value:.2%}' if name.endswith('accuracy') else value}")


def _readable(genotype: dict) -> str:
    lines = []
    for kind in ("normal", "reduce"):
        lines.append(f"  {kind}:")
        for i in range(0, len(genotype[kind]), 2):
            edges = ", ".join(f"{name} of state {source}" for name, source in genotype[kind][i : i + 2])
            lines.append(f"    node {i // 2} (state {i // 2 + 2}): {edges}")
    return "\n".join(lines)


def _check_kernels(command):
    from fpdarts.check import check_kernels

    def say(line):
        print(line, file=sys.stderr if command.json else sys.stdout, flush=True)

    report = check_kernels(command.kernels, command.device, command.amp, say)
    rows = report["rows"]
    if command.json:
        print(to_json(report))
    if not report["passed"]:
        wrong = sum(not row["passed"] for row in rows)
        raise KernelMismatch(
            f"kernels {report['kernels']} are out of tolerance in {wrong} of {len(rows)} operations, marked WRONG; "
            "choose others by --kernels, or --amp off"
        )


def _split_imagenet(command):
    from fpdarts.data import open_data, write_split
    from fpdarts.data.folder import is_image_folder

    # Names and labels are the same under every protocol, and this one opens no image to find them.
    protocol = "imagenet" if is_image_folder(Path(command.data)) else None
    data = open_data(command.data, protocol, skip=command.skip)
    counts = write_split(data, command.weights, command.architecture, command.seed, command.out)
    for name, count in counts.items():
        print(f"{Path(command.out) / name}: {count:,} images")


def _check_data(command):
    from fpdarts.data.lists import write_list
    from fpdarts.data.preflight import check_folder, summary

    if command.bad is not None:
        require_writable(command.bad)
    report = check_folder(command.path)
    # A name that is not UTF-8 is printed with its bytes as numbers.
    print(json.dumps(report) if command.json else summary(report).encode(errors="backslashreplace").decode())
    if command.bad is not None:
        write_list(command.bad, report["bad"])
    if not report["ok"]:
        listed = f"listed in {command.bad}" if command.bad else "--bad FILE lists them for --skip"
        raise DataError(
            f"{command.path}: {len(report['bad'])} files cannot be used ({listed}), "
            f"{len(report['problems'])} problems of the folder"
        )


def _genotype(action):
    from fpdarts.genotype import Genotype, find

    if isinstance(action, Import):
        origin = "standard input" if action.text == "-" else action.text
        try:
            text = sys.stdin.read() if action.text == "-" else Path(action.text).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{origin}: not text in UTF-8: {error}") from None
        Genotype.parse(text, origin).save(action.out)
        return
    genotype = find(action.genotype)
    if isinstance(action, Show):
        print(json.dumps(genotype.to_dict()) if action.json else _readable(genotype.to_dict()))
    elif isinstance(action, Draw):
        from fpdarts.draw import draw

        draw(genotype, action.out)
    else:
        from fpdarts.count import count_genotype

        counted = count_genotype(genotype, action.stem, action.init_channels, action.cells, action.classes)
        if action.json:
            print(json.dumps(counted))
        else:
            print(f"parameters: {counted['parameters']:,}\nmacs: {counted['macs']:,}")
