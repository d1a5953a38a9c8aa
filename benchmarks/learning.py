"""Does a back end learn what the reference learns? One search from several seeds on each, and a picture of the losses.

    python -m benchmarks.learning --data cifar-10-batches-py --kernels native --steps 200 --out learning-cifar10.json

A step is one of the architecture and one of the weights. Two back ends sum in different orders, so that their losses
part after some steps, as those of two seeds do: told is whether they end within one another's spread. In the first
steps, before that, they are the same.
"""

import itertools
import json
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmarks import report
from fpdarts import config as configuration
from fpdarts.config import SearchConfig
from fpdarts.gates import GateSampler
from fpdarts.search import build_supernet, loaders, optimizers, weight_step
from fpdarts.training import evaluate_model


@dataclass(frozen=True)
class Options:
    data: str
    out: str
    kernels: str = "native"
    seeds: int = 3
    steps: int = 200
    batch_size: int = 16
    init_channels: int = 16
    cells: int = 5
    validation_images: int = 1000
    threads: int | None = None
    device: str = "cpu"
    json: bool = False


def learn(options: Options, kernels: str, seed: int) -> dict:
    """Losses of each step, and at the end alphas and the validation accuracy."""
    from fpdarts.data import Loader, open_data, select_reader

    config = SearchConfig(
        data=options.data, kernels=kernels, seed=seed, batch_size=options.batch_size, amp="off", workers=0,
        init_channels=options.init_channels, cells=options.cells,
    )  # fmt: skip
    data = open_data(config.data, config.protocol, config.image_size)
    config = configuration.resolved(config, data.protocol)
    device = torch.device(options.device)
    weight_loader, architecture_loader, whole = loaders(config, data, device, select_reader("auto", data)[0])
    few = whole.images.limited(options.validation_images)
    validation_loader = Loader(few, data, options.batch_size, None, 0, device)
    torch.manual_seed(seed)
    model = build_supernet(config, len(data.classes)).to(device)
    gates = GateSampler(*model.gate_shape, mode=config.gates, seed=seed)
    sgd, architect = optimizers(config, model, device)
    losses, start = [], time.perf_counter()
    batches, others = (
        itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        for loader in (weight_loader, architecture_loader)
    )
    for batch, held_out in itertools.islice(zip(batches, others), options.steps):
        architect.step(held_out, gates.sample())
        losses.append(weight_step(model, sgd, batch, gates.sample(), config)[0].item())
    seconds = time.perf_counter() - start

    validated = evaluate_model(model, validation_loader, "off", False, "valid", arguments=(gates.expected(),))
    alphas = torch.cat([p.detach().flatten() for p in model.architecture_parameters()])
    return {"losses": losses, "alphas": alphas.tolist(), "accuracy": validated["valid_accuracy"], "seconds": seconds}


def summary(runs: dict[str, list[dict]], steps: int) -> dict:
    """A number a seed: last losses, accuracies, for how many steps both sides' losses are the same to 1e-3; and the
    distances of all alphas, between sides and between seeds."""
    told = {}
    for side, own in runs.items():
        last = [sum(run["losses"][-20:]) / len(run["losses"][-20:]) for run in own]
        told[side] = {"last_losses": last, "accuracies": [run["accuracy"] for run in own]}
        told[side]["seconds_a_step"] = min(run["seconds"] for run in own) / steps
    one, other = (torch.tensor([run["alphas"] for run in own]) for own in runs.values())
    first, second = (torch.tensor([run["losses"] for run in own]) for own in runs.values())
    told["same_for_steps"] = [int(((a - b).abs() <= 1e-3 * b).cumprod(0).sum()) for a, b in zip(first, second)]
    told["alpha_distance"] = {
        "same seed, other side": (one - other).norm(dim=1).tolist(),
        "other seed, same side": [F.pdist(table).tolist() for table in (one, other)],
    }
    return told


def plot(result: dict, path, steps: int = 50):
    """The first steps, where the sides can be told apart if one is wrong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for seed in range(len(next(iter(result["runs"].values())))):
        for (side, own), style in zip(result["runs"].items(), ("-", ":")):
            label = side if seed == 0 else None
            axes.plot(own[seed]["losses"][:steps], style, color=f"C{seed}", label=label, lw=3 if style == ":" else 1)
    axes.set(xlabel="step", ylabel="loss of the weights", title="The same search on both, a color a seed")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main(options: Options) -> dict:
    if options.kernels == "reference":
        raise ValueError("--kernels reference would be compared with itself")
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = {
        side: [learn(options, side, seed) for seed in range(options.seeds)] for side in (options.kernels, "reference")
    }
    result = {"summary": summary(runs, options.steps), "runs": runs}
    path = report.located(options.out)
    report.write(path, result, options.device)
    plot(result, path.with_suffix(".svg"))
    return result["summary"]


if __name__ == "__main__":
    report.command("learning", Options, main, lambda result, _: json.dumps(result, indent=1), __doc__)
