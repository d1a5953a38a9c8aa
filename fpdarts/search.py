"""The bilevel search: weights on one part of the training images, alpha and beta on another."""

import itertools
import sys
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from fpdarts import config as configuration
from fpdarts import kernels
from fpdarts.ahead import compile_steps, take_search_steps
from fpdarts.architect import Architect, frozen
from fpdarts.config import SearchConfig, learning_rate
from fpdarts.data import Loader, augmentation, in_memory, open_data, read_split, select_reader
from fpdarts.gates import GateSampler
from fpdarts.graphs import GraphedStep, prepare_optimizer, set_learning_rate
from fpdarts.run import Run
from fpdarts.supernet import ARCHITECTURE, SuperNet
from fpdarts.training import (
    Meter,
    Progress,
    autocast,
    make_reproducible,
    require_finite,
    select_amp,
    select_device,
    select_kernels,
    validate_if_due,
)
from fpdarts.verify import verify_step


def search(config: SearchConfig) -> dict:
    """Run a search, or go on with one; returns what result.json holds, with the run directory and the genotype.

    Raises DataError, RunError, ValueError or BackendUnavailable before training starts wherever that can be known,
    NonFiniteLoss when training diverges, and KernelMismatch when a step that is verified is not the reference's.
    """
    configuration.require_used(config)
    device = select_device(config.device)
    amp = select_amp(config.amp, device)
    serving, told = select_kernels(config.kernels, amp, device)  # fails now, with the reason, before data is read
    data = open_data(config.data, config.protocol, config.image_size, config.skip)
    config = configuration.resolved(replace(config, amp=amp), data.protocol)
    reader, told_reader = select_reader(config.loader, data)
    weight_loader, architecture_loader, validation_loader = loaders(config, data, device, reader)

    make_reproducible(config.seed)
    model = build_supernet(config, len(data.classes)).to(device)
    gates = GateSampler(*model.gate_shape, mode=config.gates, seed=config.seed)
    weight_optimizer, architect = optimizers(config, model, device)
    take_weight_step, take_architecture_step = _steps(config, serving, model, weight_optimizer, architect, device)
    _try_out(config, data)
    stateful = {"model": model, "gates": gates}
    stateful |= {"weight_optimizer": weight_optimizer, "architecture_optimizer": architect.optimizer}
    parts = [] if config.split is None else [loader.images for loader in (weight_loader, architecture_loader)]
    run, first_epoch = Run.open("search", config, data, stateful, parts)
    if run.result is not None:
        return run.result
    print(told, told_reader, sep="\n", file=sys.stderr)
    compile_steps(take_search_steps, model, data.image_size, serving, device, amp)
    for optimizer in (weight_optimizer, architect.optimizer):
        prepare_optimizer(optimizer, device)  # again: the state may come from another device
    if config.gates == "fixed":
        _report_untrained(model, gates)
    if config.architecture_from >= config.epochs:
        print("no epoch has architecture steps: the genotype is that of random numbers", file=sys.stderr)

    top5, steps = data.protocol == "imagenet", len(weight_loader)
    progress = Progress(config.epochs, steps, first_epoch)
    for epoch in range(first_epoch, config.epochs):
        meter, rate = Meter(top5), learning_rate(config, epoch)
        check = partial(require_finite, meter, epoch * steps, rate, run.path)
        set_learning_rate(weight_optimizer, rate)
        model.train()
        progress.start_epoch()
        held_out = _endless(architecture_loader, epoch * -(-steps // len(architecture_loader)))
        for step, batch in enumerate(weight_loader.epoch(epoch), epoch * steps):
            if epoch >= config.architecture_from:
                take_architecture_step(next(held_out), gates.sample(), batch)
            step_gates = gates.sample()
            if config.verify_every and step % config.verify_every == 0:
                verify_step(model, batch[0], step_gates, config.amp, step)
            loss, logits = take_weight_step(batch, step_gates)
            meter.add(loss, logits, batch[1])
            progress.step(epoch, meter, check)
        check()
        metrics = {"epoch": epoch, **meter.read("train"), "learning_rate": rate, **progress.speed(meter)}

        metrics |= validate_if_due(model, validation_loader, config, epoch, run.path, (gates.expected(),))
        metrics |= {name: getattr(model, name).tolist() for name in ARCHITECTURE}
        model.genotype().save(run.path / "genotype.json")
        run.write_epoch(metrics)
        progress.end_epoch(metrics)
    progress.close()

    return run.write_result(serving, amp, device, genotype=model.genotype().to_dict())


def _steps(config, serving, model, weight_optimizer, architect, device):
    """What takes a weight step, of (batch, gates), and an architecture step, of (batch, gates, batch of the weights).

    On CUDA both are graphs where the kernels allow it: gates then are numbers on the device, like images.
    """

    def step_of_weights(images, labels, gates):
        return weight_step(model, weight_optimizer, (images, labels), gates, config)

    def step_of_architecture(images, labels, gates):
        return architect.step((images, labels), gates)

    if device.type == "cuda" and config.cuda_graphs and config.unrolled:
        print("a second-order step is not run as a CUDA graph; both steps run without", file=sys.stderr)
    elif device.type == "cuda" and config.cuda_graphs:
        if kernels.capturable(serving, "cuda"):
            step_of_weights = GraphedStep(step_of_weights)
            step_of_architecture = GraphedStep(step_of_architecture, step_of_weights)
            return (
                lambda batch, gates: step_of_weights(*batch, gates.to(device, non_blocking=True)),
                lambda batch, gates, _: step_of_architecture(*batch, gates.to(device, non_blocking=True)),
            )
    return (
        lambda batch, gates: step_of_weights(*batch, gates),
        architect.step,
    )


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


def loaders(config, data, device, reader):
    """Of the weight part, of the architecture part for its steps, and of the same for validation."""
    augment = augmentation(data.protocol, "search")
    images = data.train if config.limit is None else data.train.limited(config.limit)
    images = in_memory(images, data, augment) if reader == "resident" else images
    if config.split is not None:
        weight_images, architecture_images = read_split(config.split, images, data)
    else:
        fractions = config.weight_fraction, config.architecture_fraction
        weight_images, architecture_images = images.parts(*fractions, config.seed)

    def loader(part, augment, seed):
        return Loader(part, data, config.batch_size, augment, seed, device, config.workers, reader)

    return (
        loader(weight_images, augment, 2 * config.seed),
        loader(architecture_images, augment, 2 * config.seed + 1),
        loader(architecture_images, None, 0),
    )


def optimizers(config, model, device):
    """SGD of the weights, and the architect with its Adam."""
    sgd = torch.optim.SGD(
        model.weight_parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    adam = torch.optim.Adam(
        model.architecture_parameters(),
        config.architecture_learning_rate,
        betas=(0.5, 0.999),
        weight_decay=config.architecture_weight_decay,
    )
    architect = Architect(
        model,
        adam,
        F.cross_entropy,
        clip=config.architecture_clip or None,
        weight_optimizer=sgd if config.unrolled else None,
        step_size=config.unrolled_step_size,
        autocast=partial(autocast, config.amp, device),
    )
    for optimizer in (sgd, adam):
        prepare_optimizer(optimizer, device)
    return sgd, architect


def _endless(loader, first_pass):
    """Pass after pass over a loader; passes are numbered, so that an epoch always sees the same ones."""
    for number in itertools.count(first_pass):
        yield from loader.epoch(number)


def weight_step(model, optimizer, batch, gates, config):
    """One update of the weights. Returns loss and logits of the batch, before it."""
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


def _try_out(config, data):
    """A forward without memory or arithmetic, so that an image size which does not fit is an error now. One node is as
    good as many, of which it takes half a second."""
    if config.cells < 3:
        raise ValueError(f"--cells must be at least 3, a normal one and two reductions, not {config.cells}")
    with torch.device("meta"):
        model = build_supernet(replace(config, kernels="auto", nodes=1), len(data.classes))
        model(torch.empty(2, 3, data.image_size, data.image_size), torch.ones(model.gate_shape, device="cpu"))


def _report_untrained(model, gates):
    """With fixed gates some paths are closed in every cell of a kind: their alphas stay near 0.5, yet compete."""
    fixed = gates.sample()
    for kind, reduction in (("normal", False), ("reduction", True)):
        cells = [i for i, cell in enumerate(model.cells) if cell.spec.reduction == reduction]
        untrained = int((fixed[cells].sum(0) == 0).sum())
        print(
            f"fixed gates: {untrained} of {fixed[0].numel()} paths of {kind} cells are closed in all of them; "
            "their alphas stay untrained but still compete for the genotype",
            file=sys.stderr,
        )
