"""The run directory: configuration, metrics, genotype and checkpoints, each written whole or not at all.

config.json      command, version and the resolved configuration
metrics.jsonl    an object an epoch
genotype.json    of a search: rewritten each epoch; of a retraining: what is trained
result.json      the end of the run
checkpoints/     epoch-0000.pt, ...: the newest and the one before it
tensorboard/     the same metrics, for plots
.run.lock        while a process runs, which keeps others out
"""

import io
import json
import random
import re
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from fpdarts.config import as_dict, restored
from fpdarts.errors import RunError
from fpdarts.files import lock, read_json_object, replacing, to_json
from fpdarts.genotype import Genotype

LOCK = ".run.lock"  # of the process that is running


class Run:
    """One run directory, open for writing. result: what write_result wrote, of a run that had reached its end before it
    was opened: then nothing is left to do.
    """

    def __init__(self, path: Path, metrics: list[dict]):
        self.path, self.metrics, self._stateful, self._facts = path, metrics, {}, {"data": {}}
        self.result, self._tensorboard, self._lock = None, None, None

    def _prepare_writing(self):
        """Raises OSError, before anything is trained, where that is impossible."""
        with tempfile.TemporaryFile(dir=self.path):
            pass
        self._lock = lock(self.path / LOCK)
        if self._lock is None:
            raise RunError(f"another process is running in {self.path}; wait for its end, or choose another --out")
        (self.path / "checkpoints").mkdir(exist_ok=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: metrics.jsonl has the metrics, there are no plots", file=sys.stderr)
        else:
            self._tensorboard = SummaryWriter(self.path / "tensorboard", purge_step=len(self.metrics))

    @classmethod
    def open(
        cls, command: str, config, data, stateful: dict, parts: Sequence = (), genotype: Genotype | None = None
    ) -> tuple["Run", int]:
        """The run of a resolved configuration, and the epoch it starts with.

        A new run, or with ``config.resume`` the one in ``config.out``, whose newest readable checkpoint is then loaded.

        stateful: name -> what has state_dict and load_state_dict. data: ImageData, which must be what it was; so must
        be parts of its training images, if their lists are files of their own, and the genotype that is trained.
        Raises RunError for anything else, and where another process is running in the directory.
        """
        facts = {"classes": list(data.classes), "training_images": len(data.train), "listing": data.listing(data.train)}
        facts["test_listing"] = data.listing(data.test)
        facts |= {f"part_{i}": data.listing(part) for i, part in enumerate(parts)}
        if not config.resume:
            out = config.out or Path("runs") / f"{command}-{Path(data.source).name}-{datetime.now():%Y%m%d-%H%M%S}"
            run, first_epoch = cls.create(Path(out), command, as_dict(config)), 0
        else:
            run, checkpoint = cls.resume(Path(config.out))
            first_epoch = len(run.metrics)
            if checkpoint is not None:
                # Only what it has: a run that an older version began has no listing.
                if any(facts.get(name) != value for name, value in checkpoint["data"].items()):
                    lists = " (or --split is not)" if parts else ""
                    raise RunError(
                        f"{data.source} is not the data that the run in {config.out} began with{lists}; restore them"
                    )
                if genotype is not None:
                    require_genotype(genotype, checkpoint, run.path)
                for name, item in stateful.items():
                    restore(item, checkpoint, name, run.path)
                restore_random_state(checkpoint["random"])
            file = run.path / "result.json"
            if len(run.metrics) == config.epochs and file.is_file():
                run.result = read_json_object(file) | {"run": str(run.path)}  # it may have been moved
            else:
                run._prepare_writing()
        run._stateful, run._facts = stateful, {"data": facts}
        if genotype is not None:
            run._facts["genotype"] = genotype.to_dict()
        print(
            f"run directory: {run.path}" + (f", from epoch {first_epoch + 1}" if config.resume else ""), file=sys.stderr
        )
        return run, first_epoch

    @classmethod
    def create(cls, path: Path, command: str, config: dict) -> "Run":
        """A new run. Raises RunError if the directory holds anything, and OSError if it cannot be written to."""
        none = ".partial", ".lock"  # left by a process that was killed before it was a run
        if path.exists() and (not path.is_dir() or any(file.suffix not in none for file in path.iterdir())):
            raise RunError(
                f"{path} is not an empty directory: a run never overwrites another; choose a new --out, or add --resume"
            )
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            raise RunError(
                f"{str(path)!a} is no name in UTF-8, which TensorBoard needs; choose another --out"
            ) from None
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, [])
        run.write_json("config.json", {"command": command, "version": version(), **config})  # first: now it is a run
        run._prepare_writing()
        return run

    @classmethod
    def resume(cls, path: Path) -> tuple["Run", dict | None]:
        """The run and its newest readable checkpoint; None if it was stopped before the first one."""
        checkpoint = load_checkpoint(path, missing_ok=True)
        done = 0 if checkpoint is None else checkpoint["epoch"] + 1
        metrics = read_metrics(path)
        if len(metrics) < done:
            raise RunError(
                f"{path / 'metrics.jsonl'} has {len(metrics)} epochs, the checkpoint {done}; restore its lines"
            )
        if checkpoint is None and len(metrics) > 1:  # one, if it was stopped before the first checkpoint
            raise RunError(f"{path} has metrics of {len(metrics)} epochs, but no checkpoint; restore one")
        return cls(path, metrics[:done]), checkpoint

    def write_json(self, name: str, content: dict):
        with replacing(self.path / name) as file:
            file.write((to_json(content, indent=2) + "\n").encode())

    def write_epoch(self, metrics: dict):
        """Save an epoch's metrics, then a checkpoint of all that a resumed run needs; the previous one stays."""
        epoch = metrics["epoch"]
        self.metrics.append(metrics)
        with replacing(self.path / "metrics.jsonl") as file:
            file.writelines((to_json(line) + "\n").encode() for line in self.metrics)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._tensorboard.add_scalar(name, value, epoch)
            self._tensorboard.flush()

        state = {name: item.state_dict() for name, item in self._stateful.items()}
        written = io.BytesIO()  # of a full disk PyTorch would say only that a position is unexpected
        torch.save({"epoch": epoch, **self._facts, "random": _random_state(), **state}, written)
        with replacing(self.path / "checkpoints" / f"epoch-{epoch:04d}.pt") as file:
            file.write(written.getbuffer())
        for _, old in _checkpoints(self.path)[2:]:
            old.unlink()

    def write_result(self, kernels: str, amp: str, device: torch.device, **found) -> dict:
        """result.json: the run's path, what computed it, the last epoch's metrics, what was found, and its seconds of
        training; returned.
        """
        result = {"run": str(self.path), "kernels": kernels, "amp": amp, "device": str(device)}
        result |= {name: value for name, value in self.metrics[-1].items() if name.startswith(("train_", "valid_"))}
        result |= {**found, "seconds": sum(line.get("seconds", 0) for line in self.metrics)}
        self.write_json("result.json", result)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._lock is not None:
            self._lock.close()
            (self.path / LOCK).unlink(missing_ok=True)
        return result


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("fpdarts")
    except PackageNotFoundError:  # a checkout that is not installed
        return "not installed"


def read_config(path: Path, kind: type):
    """The configuration of a run; kind: SearchConfig or RetrainConfig. Raises RunError if there is none, if it is of
    another command, or of an option or value that there is not.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise RunError(f"{path} holds no run: {file} is missing")
    saved = read_json_object(file)
    if saved.pop("command", None) != kind.command:
        raise RunError(f"{path} is the directory of another command's run; give one of {kind.command}")
    version = saved.pop("version", None)
    try:
        return restored(kind, saved)
    except ValueError as error:
        raise RunError(f"{file}, which fpdarts {version} wrote: {error}") from None


def read_metrics(path: Path) -> list[dict]:
    """Of each epoch. Raises RunError for a line that is none's."""
    file, metrics = Path(path) / "metrics.jsonl", []
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        found = line if isinstance(line, dict) else {}
        if found.get("epoch") != number - 1 or not isinstance(found.get("seconds", 0), (int, float)):
            raise RunError(f"{file}: line {number} is not of epoch {number - 1}; restore the file from a copy")
        metrics.append(found)
    return metrics


def _checkpoints(path: Path) -> list[tuple[int, Path]]:
    """(epoch, file), the newest first."""
    found = []
    for file in (Path(path) / "checkpoints").glob("epoch-*.pt"):
        if match := re.fullmatch(r"epoch-(\d+)\.pt", file.name):
            found.append((int(match[1]), file))
    return sorted(found, reverse=True)


def newest_checkpoint(path: Path) -> Path | None:
    return next((file for _, file in _checkpoints(path)), None)


def load_checkpoint(path: Path, missing_ok: bool = False) -> dict | None:
    """The newest checkpoint that can be read; says so where that is the one before the newest.

    Raises RunError if there is none (None with missing_ok), or if none can be read.
    """
    files = _checkpoints(path)
    if not files and missing_ok:
        return None
    if not files:
        raise RunError(f"{path} holds no checkpoint yet: let its first epoch end")
    for _, file in files:
        try:
            return _read_checkpoint(file)
        except Exception as error:  # what damaged bytes raise has no limits
            told = str(error).partition("\n")[0] or type(error).__name__
            print(f"warning: {file} cannot be read ({told}); trying the one before it", file=sys.stderr, flush=True)
    raise RunError(f"none of the checkpoints in {path} can be read; restore one, or start anew in another --out")


def _read_checkpoint(file: Path) -> dict:
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()  # PyTorch does not look at the sums that it writes
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not {"epoch", "data", "random"} <= checkpoint.keys():
        raise ValueError("it is no checkpoint of a run")
    return checkpoint


def require_genotype(genotype: Genotype, checkpoint: dict, run: str | Path):
    """Raises RunError if it is not the one that was trained. The checkpoint of an older version does not tell."""
    if checkpoint.get("genotype", genotype.to_dict()) != genotype.to_dict():
        raise RunError(f"the checkpoint of {run} is of another genotype than its genotype.json; restore that file")


def restore(item, checkpoint: dict, name: str, run: str | Path):
    """Loads a part of a checkpoint. Raises RunError if it is not of what the run's files describe."""
    try:
        item.load_state_dict(checkpoint[name])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())[:300]
        raise RunError(
            f"the checkpoint of {run} has another {name.replace('_', ' ')} than its config.json and genotype.json "
            f"describe ({told}); restore what was changed"
        ) from None


def _random_state() -> dict:
    kind, numbers, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [kind, list(numbers), gauss]}
    if torch.cuda.is_initialized():
        state["cuda"] = [torch.cuda.get_rng_state()]  # of the run's own; it may go on where there are fewer
    return state


def restore_random_state(state: dict):
    torch.set_rng_state(state["torch"])
    kind, numbers, gauss = state["python"]
    random.setstate((kind, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
