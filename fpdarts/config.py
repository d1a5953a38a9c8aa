"""What a run is made of, and each protocol's defaults. No torch here: the command's help reads this file.

A field that is None takes the protocol's value once the data is known (``resolved``); config.json holds the outcome.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fpdarts.kernels import BACKENDS
from fpdarts.space import DEFAULT_SUBSETS

Protocol = Literal["digits", "cifar", "imagenet"]
Kernels = Literal[("auto", *BACKENDS)]
Reader = Literal["auto", "resident", "dali", "torchvision"]
Amp = Literal["off", "bf16"]
Stem = Literal["cifar", "imagenet"]

DEFAULT_SUBSETS_TEXT = "/".join(",".join(subset) for subset in DEFAULT_SUBSETS)


@dataclass(frozen=True)
class RunConfig:
    """What search and retraining share."""

    data: str = "digits"
    """digits (built in), or the path of CIFAR-10, CIFAR-100 or an image folder with train/ and test/ or val/."""
    protocol: Protocol | None = None
    """Stem, augmentation, schedule and defaults; chosen by the data if not given."""
    out: str | None = None
    """Run directory, new or empty; runs/COMMAND-DATA-TIME if not given."""
    epochs: int | None = None
    """Passes over the images that train the weights."""
    batch_size: int | None = None
    """Images a step."""
    init_channels: int | None = None
    """C, channels of the first cell."""
    cells: int | None = None
    """Depth, in cells; those at one and at two thirds of it are reductions."""
    learning_rate: float | None = None
    """Of the weights, at its highest."""
    weight_decay: float | None = None
    """Of the weights."""
    momentum: float = 0.9
    """Of the weights' SGD."""
    gradient_clip: float = 5.0
    """Largest norm of the weights' gradient."""
    image_size: int | None = None
    """Side of the images in pixels, protocol imagenet only (224)."""
    limit: int | None = None
    """Use this many training images, balanced over the classes."""
    seed: int = 0
    """Of everything random: initialization, split, order, augmentation, gates, drop-path."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    kernels: Kernels = "auto"
    """What computes the cells: reference (PyTorch), native (CPU), triton (NVIDIA), or auto, the fastest that can."""
    amp: Amp | None = None
    """Mixed precision, bf16 on CUDA; off elsewhere, and there bf16 is refused."""
    cuda_graphs: bool = True
    """On CUDA, run a whole step as one graph, where the kernels allow it."""
    loader: Reader = "auto"
    """What reads the images: resident (from the device's memory), dali, torchvision, or auto, the fastest that can."""
    workers: int | None = None
    """Threads (dali) or processes (torchvision) that decode image files; as many as cores, at most 8, if not given."""
    skip: str | None = None
    """File with the names of image files to leave out, as check-data writes it."""
    resume: bool = False
    """Continue the run in --out exactly where its last checkpoint was written."""
    json: bool = False
    """Print the result as JSON on standard output; progress goes to standard error."""


@dataclass(frozen=True)
class SearchConfig(RunConfig):
    """Search for a genotype."""

    command: ClassVar[str] = "search"
    partial: int = 2
    """K: a path reads 1/K of the channels."""
    nodes: int = 4
    """Intermediate nodes of a cell."""
    subsets: str = DEFAULT_SUBSETS_TEXT
    """Candidate operations of each path: commas between operations, a slash between paths."""
    weighting: Literal["sigmoid", "softmax"] = "sigmoid"
    """What makes weights of alpha and beta."""
    gates: Literal["step", "fixed", "both"] = "step"
    """Open paths: drawn for every step, drawn once, or always both."""
    unrolled: bool = False
    """Second-order architecture gradient."""
    unrolled_step_size: float = 0.01
    """With --unrolled: r of its finite difference R = r / ||v||."""
    architecture_learning_rate: float | None = None
    """Of the Adam of alpha and beta."""
    architecture_weight_decay: float = 1e-3
    """Of alpha and beta."""
    architecture_clip: float | None = None
    """Largest norm of the architecture gradient; 0 for no clipping."""
    architecture_from: int | None = None
    """First epoch with architecture steps (counted from 0)."""
    weight_fraction: float | None = None
    """Part of the training images that trains the weights."""
    architecture_fraction: float | None = None
    """Part of the training images that trains the architecture and validates."""
    split: str | None = None
    """Directory with the two parts as file lists, as split-imagenet writes it, in place of both fractions."""
    validate_every: int = 1
    """Validate every so many epochs, and after the last one."""
    verify_every: int = 0
    """Compare the cells with the reference at every so many weight steps, and stop where they differ; 0 for never."""


@dataclass(frozen=True)
class RetrainConfig(RunConfig):
    """Train the network that a genotype describes, and test it once, at the end."""

    command: ClassVar[str] = "retrain"
    genotype: str = "PC_DARTS_cifar"
    """A published genotype's name, a genotype file, or the directory of a search."""
    auxiliary_weight: float | None = None
    """Weight of the auxiliary head's loss; 0 for no head."""
    drop_path: float | None = None
    """Probability p at the end of training: in epoch e of E, counted from 0, it is p * e / E."""
    label_smoothing: float | None = None
    """Share of the target that is spread over all classes."""
    cutout: int | None = None
    """Side of the square that is cut out of every image, 16 with protocol cifar; 0 for none."""
    holdout: float = 0.0
    """Part of the training images kept for validation; the test set is read once, at the end."""
    validate_every: int = 1
    """With --holdout: validate every so many epochs, and after the last one."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Test a retrained network."""

    run: str
    """Run directory of a retraining."""
    data: str | None = None
    """What to test on; the run's own data if not given."""
    limit: int | None = None
    """Use this many test images, balanced over the classes."""
    batch_size: int | None = None
    """Images at a time; the run's own if not given."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    amp: Amp | None = None
    """Mixed precision; bf16 on CUDA and off elsewhere if not given."""
    loader: Reader = "auto"
    """What reads the images: resident (from the device's memory), dali, torchvision, or auto, the fastest that can."""
    workers: int | None = None
    """Threads (dali) or processes (torchvision) that decode image files; as many as cores, at most 8, if not given."""
    skip: str | None = None
    """File with the names of image files to leave out, as check-data writes it."""
    json: bool = False
    """Print the result as JSON."""


SEARCH_DEFAULTS = {
    "digits": dict(
        epochs=25, batch_size=64, init_channels=8, cells=5, learning_rate=0.1, weight_decay=3e-4,
        architecture_learning_rate=6e-3, architecture_clip=0.0, weight_fraction=0.5, architecture_fraction=0.5,
    ),
    "cifar": dict(
        epochs=50, batch_size=256, init_channels=16, cells=8, learning_rate=0.1, weight_decay=3e-4,
        architecture_learning_rate=6e-4, architecture_clip=0.0, weight_fraction=0.5, architecture_fraction=0.5,
    ),
    "imagenet": dict(
        epochs=50, batch_size=1024, init_channels=16, cells=8, learning_rate=0.5, weight_decay=3e-4,
        architecture_learning_rate=6e-3, architecture_clip=5.0, weight_fraction=0.10, architecture_fraction=0.025,
    ),
}  # fmt: skip
FRACTIONS = ("weight_fraction", "architecture_fraction")
# Share of the epochs that pass before the first architecture step: 15 of 50, and 35 of 50 on ImageNet.
ARCHITECTURE_START = {"digits": 0.3, "cifar": 0.3, "imagenet": 0.7}

RETRAIN_DEFAULTS = {
    "digits": dict(
        epochs=25, batch_size=64, init_channels=8, cells=5, learning_rate=0.1, weight_decay=3e-4,
        auxiliary_weight=0.0, drop_path=0.0, label_smoothing=0.0, cutout=0,
    ),
    "cifar": dict(
        epochs=600, batch_size=96, init_channels=36, cells=20, learning_rate=0.025, weight_decay=3e-4,
        auxiliary_weight=0.4, drop_path=0.3, label_smoothing=0.0, cutout=16,
    ),
    "imagenet": dict(
        epochs=250, batch_size=1024, init_channels=48, cells=14, learning_rate=0.5, weight_decay=3e-5,
        auxiliary_weight=0.4, drop_path=0.0, label_smoothing=0.1, cutout=0,
    ),
}  # fmt: skip


def stem_of(protocol: str) -> str:
    return "imagenet" if protocol == "imagenet" else "cifar"


def resolved(config: SearchConfig | RetrainConfig, protocol: str) -> SearchConfig | RetrainConfig:
    """The configuration with every open field set to the protocol's default.

    Raises ValueError, naming the field, for a value out of its range.
    """
    searching = isinstance(config, SearchConfig)
    defaults = (SEARCH_DEFAULTS if searching else RETRAIN_DEFAULTS)[protocol]
    if searching and config.split is not None:  # the lists say which images, all of them
        for field in ("limit", *FRACTIONS):
            if getattr(config, field) is not None:
                raise ValueError(f"--{field.replace('_', '-')} and --split exclude each other; leave one of them out")
        defaults = {name: value for name, value in defaults.items() if name not in FRACTIONS}
    config = replace(config, protocol=protocol, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    if searching and config.architecture_from is None:
        start = min(round(config.epochs * ARCHITECTURE_START[protocol]), config.epochs - 1)
        config = replace(config, architecture_from=start)
    require_in_range(config)
    return config


def require_used(config: SearchConfig | RetrainConfig):
    """Raises ValueError for an option that does nothing without another; a run that was saved may have it."""
    if config.resume:
        return
    searching = isinstance(config, SearchConfig)
    name, needs = ("unrolled_step_size", "unrolled") if searching else ("validate_every", "holdout")
    if getattr(config, name) != getattr(type(config), name) and not getattr(config, needs):
        name = name.replace("_", "-")
        raise ValueError(f"--{name} does nothing without --{needs}; add that, or leave --{name} out")


# What a field must be, and when it is; a field that is None stays open.
_RANGES = {
    "at least 1": (
        lambda value: value >= 1,
        "epochs batch_size init_channels cells validate_every partial nodes limit image_size",
    ),
    "positive": (
        lambda value: 0 < value < math.inf,
        "learning_rate gradient_clip architecture_learning_rate unrolled_step_size",
    ),
    "at least 0": (
        lambda value: 0 <= value < math.inf,
        "weight_decay momentum workers architecture_weight_decay architecture_clip architecture_from verify_every "
        "auxiliary_weight cutout",
    ),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, "drop_path holdout label_smoothing"),
    "between 0 and 1": (lambda value: 0 < value < 1, "weight_fraction architecture_fraction"),
    "at least 0 and below 2**63": (lambda value: 0 <= value < 2**63, "seed"),
}


def require_in_range(config: SearchConfig | RetrainConfig | EvaluateConfig):
    """Raises ValueError, naming the field, for a value out of its range."""

    def require(fine: bool, field: str, what: str):
        if not fine:
            raise ValueError(f"--{field.replace('_', '-')} must be {what}, not {getattr(config, field)}")

    for field in fields(config):
        value = getattr(config, field.name)
        require(field.name == "seed" or not isinstance(value, int) or value < 2**31, field.name, "below 2**31")
    for what, (fits, names) in _RANGES.items():
        for field in names.split():
            if (value := getattr(config, field, None)) is not None:
                require(fits(value), field, what)
    if isinstance(config, SearchConfig) and config.split is None:
        fits = config.architecture_fraction < 1 - config.weight_fraction + 1e-9
        require(fits, FRACTIONS[1], f"at most 1 - {config.weight_fraction} (--weight-fraction)")


def restored(kind: type, saved: dict[str, Any]) -> SearchConfig | RetrainConfig:
    """The configuration that config.json holds; a field that it lacks, as an older version's may, has its default.

    Raises ValueError for a field that there is not, or a value that is none of its.
    """
    hints, known = get_type_hints(kind), {field.name for field in fields(kind)}
    for name, value in saved.items():
        if name not in known:
            raise ValueError(f"{name} is no option of this version; go on with the version that wrote it")
        if not _fits(value, hints[name]):
            raise ValueError(f"{value!r} is no value of {name}; restore the file from a copy")
    return kind(**saved)


def _fits(value, hint) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType) or get_args(hint):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def learning_rate(config: SearchConfig | RetrainConfig, epoch: int) -> float:
    """Of the weights in an epoch, 0-based: a cosine; on ImageNet after a warm-up, and a line where it retrains."""
    epochs, highest = config.epochs, config.learning_rate
    cosine = highest * (1 + math.cos(math.pi * epoch / epochs)) / 2
    if config.protocol != "imagenet":
        return cosine
    few = min(5, epochs // 10)  # the protocol's 5 epochs of warm-up and, retraining, of slow end
    if epoch < few:
        return highest * (epoch + 1) / few
    if isinstance(config, SearchConfig):
        return cosine
    if epoch < epochs - few:
        return highest * (epochs - few - epoch) / (epochs - few)
    return highest * (epochs - epoch) / ((epochs - few) * few)


def as_dict(config) -> dict:
    """What config.json holds: every field but those that say how the command was called."""
    return {k: v for k, v in asdict(config).items() if k not in ("out", "resume", "json")}
