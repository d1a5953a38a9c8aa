"""The bilevel search: weights on one part of the training images, alpha and beta on another."""

import itertools
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from fpdarts import config as configuration
from fpdarts import kernels
from fpdarts.architect import Architect, frozen
from fpdarts.config import SearchConfig, learning_rate
from fpdarts.data import Loader, augmentation, open_data
from fpdarts.gates import GateSampler
from fpdarts.run import Run, default_directory, newest_checkpoint, restore_random_state
from fpdarts.supernet import SuperNet
from fpdarts.training import (
    Meter,
    Progress,
    autocast,
    evaluate_model,
    require_finite,
    select_amp,
    select_device,
)


def search(config: SearchConfig) -> dict:
    """Run a search, or go on with one; returns what result.json holds, with the run directory and the genotype.

    Raises DataError, RunError, ValueError or BackendUnavailable before training starts wherever that can be known, and
    NonFiniteLoss when training diverges.
    """
    device = select_device(config.device)
    kernels.backend(config.kernels, device.type)  # fails here, with the reason, rather than after the data is read
    data = open_data(config.data, config.protocol, config.image_size)
    config = configuration.resolved(replace(config, amp=select_amp(config.amp, device)), data.protocol)
    weight_loader, architecture_loader, validation_loader = _loaders(config, data, device)

    torch.manual_seed(config.seed)
    model = build_supernet(config, len(data.classes)).to(device, memory_format=torch.channels_last)
    gates = GateSampler(*model.gate_shape, mode=config.gates, seed=config.seed)
    weight_optimizer = torch.optim.SGD(
        model.weight_parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    architecture_optimizer = torch.optim.Adam(
        model.architecture_parameters(),
        config.architecture_learning_rate,
        betas=(0.5, 0.999),
        weight_decay=config.architecture_weight_decay,
    )
    architect = Architect(
        model,
        architecture_optimizer,
        F.cross_entropy,
        clip=config.architecture_clip or None,
        weight_optimizer=weight_optimizer if config.unrolled else None,
        step_size=config.unrolled_step_size,
        autocast=lambda: autocast(config.amp, device),
    )
    _try_out(model, data.image_size, gates, device)

    stateful = {
        "model": model, "weight_optimizer": weight_optimizer, "architecture_optimizer": architecture_optimizer, "gates": gates,
    }  # fmt: skip
    first_epoch = 0
    if config.resume:
        run, checkpoint = Run.resume(config.out)
        if checkpoint is not None:
            first_epoch = checkpoint["epoch"] + 1
            for name, item in stateful.items():
                item.load_state_dict(checkpoint[name])
            restore_random_state(checkpoint["random"])
    else:
        out = config.out or default_directory("search", data.source)
        run = Run.create(out, "search", configuration.as_dict(config))
    if config.gates == "fixed":
        _report_untrained(model, gates)

    top5 = data.protocol == "imagenet"
    steps = len(weight_loader)
    progress = Progress(config.epochs, steps, first_epoch)
    for epoch in range(first_epoch, config.epochs):
        progress.start_epoch()
        rate = learning_rate(config, epoch)
        weight_optimizer.param_groups[0]["lr"] = rate
        model.train()
        meter = Meter(top5)

        def check():
            require_finite(meter, epoch * steps, rate, newest_checkpoint(run.path), device)

        held_out = _endless(architecture_loader, epoch * -(-steps // len(architecture_loader)))
        for batch in weight_loader.epoch(epoch):
            if epoch >= config.architecture_from:
                architect.step(next(held_out), gates.sample(), batch if config.unrolled else None)
            loss, logits = _weight_step(model, weight_optimizer, batch, gates.sample(), config)
            meter.add(loss, logits, batch[1])
            progress.step(epoch, meter, check)
        check()
        metrics = {"epoch": epoch, **meter.read("train"), "learning_rate": rate, "seconds": progress.seconds()}
        metrics["images_per_second"] = meter.images / metrics["seconds"]

        validated = (epoch + 1) % config.validate_every == 0 or epoch == config.epochs - 1
        metrics |= evaluate_model(
            model, validation_loader, config.amp, top5, "valid", skip=not validated, arguments=(gates.expected(),)
        )
        for name in ("alpha_normal", "alpha_reduce", "beta_normal", "beta_reduce"):
            metrics[name] = getattr(model, name).tolist()
        model.genotype().save(run.path / "genotype.json")
        run.write_epoch(metrics)
        run.write_checkpoint(epoch, {name: item.state_dict() for name, item in stateful.items()})
        progress.end_epoch(metrics)
    progress.close()

    genotype = model.genotype()
    genotype.save(run.path / "genotype.json")
    result = {"run": str(run.path), "kernels": config.kernels, "amp": config.amp, "device": str(device)}
    result |= {k: v for k, v in run.metrics[-1].items() if k.startswith(("train_", "valid_"))}
    result["seconds"] = sum(line["seconds"] for line in run.metrics)
    run.write_json("result.json", {**result, "genotype": genotype.to_dict()})
    run.close()
    return {**result, "genotype": genotype.to_dict()}


def build_supernet(config: SearchConfig, num_classes: int) -> SuperNet:
    """The supernet of a resolved configuration."""
    return SuperNet(
        num_classes,
        config.init_channels,
        config.cells,
        config.nodes,
        config.partial,
        configuration.stem_of(config.protocol),
        [path.split(",") for path in config.subsets.split("/")],
        config.weighting,
        config.kernels,
    )


def _loaders(config, data, device):
    """Of the weight part, of the architecture part for its steps, and of the same for validation."""
    images = data.train if config.limit is None else data.train.limited(config.limit)
    weight_images, rest = images.split(config.weight_fraction, config.seed)
    share = config.architecture_fraction / (1 - config.weight_fraction)
    architecture_images = rest if share > 1 - 1e-9 else rest.split(share, config.seed)[0]
    augment = augmentation(data.protocol, "search")

    def loader(part, augment, seed):
        return Loader(part, data, config.batch_size, augment, seed, device, config.workers)

    return (
        loader(weight_images, augment, 2 * config.seed),
        loader(architecture_images, augment, 2 * config.seed + 1),
        loader(architecture_images, None, 0),
    )


def _endless(loader, first_pass):
    """Pass after pass over a loader; passes are numbered, so that an epoch always sees the same ones."""
    for number in itertools.count(first_pass):
        yield from loader.epoch(number)


def _weight_step(model, optimizer, batch, gates, config):
    images, labels = batch
    with frozen(model.architecture_parameters()):
        with autocast(config.amp, images.device):
            logits = model(images, gates)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.weight_parameters(), config.gradient_clip)
    optimizer.step()
    return loss, logits


def _try_out(model, image_size, gates, device):
    """A forward of one blank image, so that a size which does not fit is an error now. It leaves no trace."""
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, image_size, image_size, device=device), gates.expected())
    model.train()


def _report_untrained(model, gates):
    """With fixed gates some paths are closed in every cell of a kind: their alphas stay untrained near 0.5, yet compete."""
    fixed = gates.sample()
    for kind, reduction in (("normal", False), ("reduction", True)):
        cells = [i for i, cell in enumerate(model.cells) if cell.spec.reduction == reduction]
        untrained = int((fixed[cells].sum(0) == 0).sum())
        print(
            f"fixed gates: {untrained} of {fixed[0].numel()} paths of {kind} cells are closed in all of them; "
            "their alphas stay untrained but still compete for the genotype",
            file=sys.stderr,
        )
