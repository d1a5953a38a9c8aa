"""What the search, retraining and evaluation loops share: metrics, progress, mixed precision, a pass over images."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fpdarts import kernels
from fpdarts.config import RetrainConfig, SearchConfig, learning_rate
from fpdarts.errors import NonFiniteLoss
from fpdarts.run import newest_checkpoint


def select_device(name: str) -> torch.device:
    """``auto`` is CUDA if there is one. Raises ValueError for a name that PyTorch does not know or cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams, graphs and Triton's launches belong to the current one
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def make_reproducible(seed: int):
    """What is random begins with the seed, and stems and the auxiliary head, which cuDNN computes, give the same bits
    each time: a resumed run is the same one."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def select_amp(amp: str | None, device: torch.device, training: bool = True) -> str:
    """``off`` or ``bf16``; of None what the device is fastest in. Raises ValueError for bf16 that trains wrongly."""
    if amp == "bf16" and device.type == "cpu" and training:
        raise ValueError(
            "--amp bf16 trains on CUDA only: PyTorch's gradients on a CPU are wrong with it; use --amp off"
        )
    return amp or ("bf16" if device.type == "cuda" else "off")


def backend_name(name: str, device: torch.device, amp: str, function: str = "cell") -> str:
    """Of the back end that runs there, also for auto. Raises BackendUnavailable, with the reason."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    return kernels.backend(name, device.type, function, dtype).__name__.rpartition(".")[2]


def select_kernels(name: str, amp: str, device: torch.device, function: str = "cell") -> tuple[str, str]:
    """The back end that will serve, by name, and a line that tells which it is and why.

    function: what is to be computed, ``cell`` or ``derived_cell``. Raises BackendUnavailable, with the reason.
    """
    chosen = backend_name(name, device, amp, function)
    why = "as asked" if name != "auto" else "the fastest that can run here"
    if name == "auto" and chosen == "reference":
        others = kernels.available(device.type, function).items()
        why = "; ".join(f"{other}: {reason or f'not with --amp {amp}'}" for other, reason in others if other != chosen)
    return chosen, f"kernels: {chosen} ({why})"


def autocast(amp: str, device: torch.device):
    """A context of mixed precision, or of none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


class Meter:
    """Mean loss and accuracy of many batches, summed up on the device: nothing waits for it until it is read."""

    def __init__(self, top5: bool = False):
        self.ranks = (1, 5) if top5 else (1,)
        self.images = 0
        self._losses, self._sizes, self._correct = [], [], []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor):
        """loss: mean of the batch. logits: (N, classes). labels: (N,)."""
        ranked = logits.detach().topk(min(self.ranks[-1], logits.shape[1]), 1).indices == labels[:, None]
        self._correct.append(torch.stack([ranked[:, :rank].any(1).sum() for rank in self.ranks]))
        self._losses.append(loss.detach().float())
        self._sizes.append(len(labels))
        self.images += len(labels)

    def first_non_finite(self) -> int | None:
        """Index of the first batch whose loss is infinite or not a number."""
        bad = (~torch.isfinite(torch.stack(self._losses))).nonzero()
        return int(bad[0]) if len(bad) else None

    def read(self, prefix: str) -> dict[str, float]:
        """{prefix_loss, prefix_accuracy[, prefix_top5_accuracy]}, accuracies in 0..1."""
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        loss = (torch.stack(self._losses).double().cpu() * sizes).sum() / self.images
        correct = torch.stack(self._correct).sum(0).tolist()
        names = ("accuracy", "top5_accuracy")
        accuracies = {f"{prefix}_{name}": hits / self.images for name, hits in zip(names, correct)}
        return {f"{prefix}_loss": loss.item(), **accuracies}


class Progress:
    """A progress bar over all steps of a run, on standard error; a plain line an epoch where that is no terminal."""

    REFRESH = 0.5  # seconds between looks at the device's sums, each of which waits for the device

    def __init__(self, epochs: int, steps: int, first_epoch: int = 0):
        self.epochs, self._epoch_start, self._looked = epochs, time.perf_counter(), 0.0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=epochs * steps, initial=first_epoch * steps, unit="step", dynamic_ncols=True)

    def start_epoch(self):
        self._epoch_start = time.perf_counter()

    def speed(self, meter: Meter) -> dict[str, float]:
        """{seconds, images_per_second} of the epoch so far."""
        seconds = time.perf_counter() - self._epoch_start
        return {"seconds": seconds, "images_per_second": meter.images / seconds}

    def step(self, epoch: int, meter: Meter, check: Callable[[], None]):
        """After every step; looks at the sums, and calls check, twice a second."""
        if self._bar is not None:
            self._bar.update()
        if time.perf_counter() - self._looked < self.REFRESH:
            return
        self._looked = time.perf_counter()
        check()
        if self._bar is not None:
            now = meter.read("train")
            self._bar.set_description(f"epoch {epoch + 1}/{self.epochs}")
            speed = f"{self.speed(meter)['images_per_second']:.0f} images/s"
            self._bar.set_postfix_str(f"loss {now['train_loss']:.3f}, accuracy {now['train_accuracy']:.1%}, {speed}")

    def end_epoch(self, metrics: dict):
        parts = [f"epoch {metrics['epoch'] + 1}/{self.epochs}"]
        for name in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "valid_top5_accuracy"):
            if metrics.get(name) is not None:
                value = f"{metrics[name]:.2%}" if name.endswith("accuracy") else f"{metrics[name]:.4f}"
                parts.append(f"{name.replace('_', ' ')} {value}")
        parts.append(f"{metrics['images_per_second']:.0f} images/s")
        parts.append(f"{metrics['seconds'] * (self.epochs - metrics['epoch'] - 1):.0f} s left")
        self.say(", ".join(parts))

    def say(self, line: str):
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self):
        if self._bar is not None:
            self._bar.close()


def require_finite(meter: Meter, steps_before: int, learning_rate: float, run: Path):
    """Raises NonFiniteLoss if any loss of the epoch so far is infinite or not a number."""
    bad = meter.first_non_finite()
    if bad is not None:
        _diverged(
            f"the loss became infinite or not a number at step {steps_before + bad} (step {bad} of its epoch)",
            learning_rate,
            run,
        )


def require_finite_loss(metrics: dict, prefix: str, learning_rate: float, run: Path):
    """Raises NonFiniteLoss if that of an evaluation is infinite or not a number: an epoch's last step may do that."""
    if not math.isfinite(metrics[f"{prefix}_loss"]):
        _diverged(f"the loss of the {prefix} images is infinite or not a number after the epoch", learning_rate, run)


def _diverged(what: str, learning_rate: float, run: Path):
    checkpoint = newest_checkpoint(run)
    last = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    raise NonFiniteLoss(
        f"{what}, learning rate {learning_rate:g}; {last}. Start anew with a lower --learning-rate, or with --amp off"
    )


@torch.no_grad()
def evaluate_model(
    model: torch.nn.Module, loader, amp: str, top5: bool, prefix: str, arguments: tuple = ()
) -> dict[str, float]:
    """{prefix_loss, prefix_accuracy[, prefix_top5_accuracy]} over all of a loader's images.

    The model is left in evaluation mode. arguments: what its forward takes after the images.
    """
    model.eval()
    meter = Meter(top5)
    for images, labels in loader.epoch():
        with autocast(amp, images.device):
            logits = model(images, *arguments)
        meter.add(F.cross_entropy(logits.float(), labels), logits, labels)
    return meter.read(prefix)


def validate_if_due(model, loader, config: SearchConfig | RetrainConfig, epoch: int, run: Path, arguments: tuple = ()):
    """evaluate_model's metrics as valid_..., each None in an epoch without validation. Raises NonFiniteLoss."""
    top5 = config.protocol == "imagenet"
    if (epoch + 1) % config.validate_every and epoch != config.epochs - 1:
        return dict.fromkeys(f"valid_{name}" for name in ("loss", "accuracy", "top5_accuracy")[: 3 if top5 else 2])
    metrics = evaluate_model(model, loader, config.amp, top5, "valid", arguments)
    require_finite_loss(metrics, "valid", learning_rate(config, epoch), run)
    return metrics
