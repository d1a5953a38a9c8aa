"""Retraining: the network that a genotype describes, from scratch, tested once at the end."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fpdarts import config as configuration
from fpdarts import kernels
from fpdarts.ahead import compile_steps, take_retraining_steps
from fpdarts.config import RetrainConfig, learning_rate
from fpdarts.count import count
from fpdarts.data import Loader, augmentation, in_memory, open_data, select_reader
from fpdarts.genotype import Genotype, find
from fpdarts.graphs import GraphedStep, prepare_optimizer, set_learning_rate
from fpdarts.network import DerivedNetwork
from fpdarts.run import Run
from fpdarts.training import (
    Meter,
    Progress,
    autocast,
    evaluate_model,
    make_reproducible,
    require_finite,
    require_finite_loss,
    select_amp,
    select_device,
    select_kernels,
    validate_if_due,
)


def retrain(config: RetrainConfig) -> dict:
    """Run a retraining, or go on with one; returns what result.json holds, with the run directory.

    Raises DataError, GenotypeError, RunError, ValueError or BackendUnavailable before training starts wherever that can
    be known, and NonFiniteLoss when training diverges.
    """
    configuration.require_used(config)
    device = select_device(config.device)
    amp = select_amp(config.amp, device)
    serving, told = select_kernels(config.kernels, amp, device, "derived_cell")  # fails now, with the reason
    kept = config.resume and (Path(config.out) / "genotype.json").is_file()
    genotype = find(config.out if kept else config.genotype)  # a resumed run keeps the copy it started with
    data = open_data(config.data, config.protocol, config.image_size, config.skip)
    config = configuration.resolved(replace(config, amp=amp), data.protocol)
    reader, told_reader = select_reader(config.loader, data)
    train_loader, holdout_loader, test_loader = _loaders(config, data, device, reader)

    make_reproducible(config.seed)
    network = build_network(config, genotype, len(data.classes)).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config, network, device)
    take_step = _steps(config, serving, network, optimizer, device)
    _try_out(config, genotype, data)
    run, first_epoch = Run.open("retrain", config, data, {"model": network, "optimizer": optimizer}, genotype=genotype)
    if run.result is not None:
        return run.result
    if not (run.path / "genotype.json").is_file():
        genotype.save(run.path / "genotype.json")
    print(told, told_reader, sep="\n", file=sys.stderr)
    take_steps = partial(take_retraining_steps, drop_path=config.drop_path)
    compile_steps(take_steps, network, data.image_size, serving, device, amp)
    prepare_optimizer(optimizer, device)  # again: the state may come from another device

    top5, steps = data.protocol == "imagenet", len(train_loader)
    progress = Progress(config.epochs, steps, first_epoch)
    for epoch in range(first_epoch, config.epochs):
        meter, rate = Meter(top5), learning_rate(config, epoch)
        check = partial(require_finite, meter, epoch * steps, rate, run.path)
        set_learning_rate(optimizer, rate)
        drop_path = config.drop_path * epoch / config.epochs
        network.train()
        progress.start_epoch()
        for batch in train_loader.epoch(epoch):
            loss, logits = take_step(batch, drop_path)
            meter.add(loss, logits, batch[1])
            progress.step(epoch, meter, check)
        check()
        metrics = {"epoch": epoch, **meter.read("train"), "learning_rate": rate, **progress.speed(meter)}
        if holdout_loader is not None:
            metrics |= validate_if_due(network, holdout_loader, config, epoch, run.path)
        run.write_epoch(metrics)
        progress.end_epoch(metrics)
    progress.close()

    tested = evaluate_model(network, test_loader, amp, top5, "test")
    require_finite_loss(tested, "test", learning_rate(config, config.epochs - 1), run.path)
    return run.write_result(serving, amp, device, **tested, **count(network, data.image_size))


def _steps(config, serving, network, optimizer, device):
    """What takes a step, of (batch, drop_path); on CUDA a graph."""
    if device.type != "cuda":
        return lambda batch, drop_path: training_step(network, optimizer, batch, drop_path, config)
    chance = torch.zeros((), device=device)  # the same kernels, and one graph, serve all epochs

    def step(images, labels):
        return training_step(network, optimizer, (images, labels), chance if config.drop_path else 0.0, config)

    graphed = config.cuda_graphs and kernels.capturable(serving, "cuda", "derived_cell")
    take_one = GraphedStep(step) if graphed else step

    def take(batch, drop_path):
        chance.fill_(drop_path)
        return take_one(*batch)

    return take


def build_network(config: RetrainConfig, genotype: Genotype, num_classes: int) -> DerivedNetwork:
    """The network of a resolved configuration."""
    return DerivedNetwork(
        genotype,
        num_classes,
        config.init_channels,
        config.cells,
        configuration.stem_of(config.protocol),
        auxiliary=config.auxiliary_weight > 0,
        kernels=config.kernels,
    )


def make_optimizer(config, network, device) -> torch.optim.SGD:
    sgd = torch.optim.SGD(network.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay)
    prepare_optimizer(sgd, device)
    return sgd


def _loaders(config, data, device, reader):
    """Of the training images, of those held out (None without --holdout) and of the test images."""
    augment = replace(augmentation(data.protocol, "retrain"), cutout=config.cutout)
    images = data.train if config.limit is None else data.train.limited(config.limit)
    test_images = data.test
    if reader == "resident":
        images, test_images = in_memory(images, data, augment), in_memory(test_images, data, None)
    held_out = None
    if config.holdout:
        held_out, images = images.split(config.holdout, config.seed)

    def loader(part, augment):
        return Loader(part, data, config.batch_size, augment, config.seed, device, config.workers, reader)

    return loader(images, augment), None if held_out is None else loader(held_out, None), loader(test_images, None)


def training_step(network, optimizer, batch, drop_path, config):
    """One update. Returns loss and logits of the classifier, before it and without the auxiliary head's share."""
    images, labels = batch
    with autocast(config.amp, images.device):
        out = network(images, drop_path)
    total, loss, logits = losses(out, labels, config)
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
    optimizer.step()
    return loss, logits


def losses(out, labels, config):
    """(what is descended, loss of the classifier, its logits) of what a network returned: with an auxiliary head, a
    pair."""
    logits, auxiliary_logits = out if isinstance(out, tuple) else (out, None)
    loss = total = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if auxiliary_logits is not None:
        auxiliary = F.cross_entropy(auxiliary_logits, labels, label_smoothing=config.label_smoothing)
        total = loss + config.auxiliary_weight * auxiliary
    return total, loss, logits


def _try_out(config, genotype, data):
    """A forward without memory or arithmetic, so that an image size which does not fit is an error now."""
    with torch.device("meta"):
        network = build_network(replace(config, kernels="auto"), genotype, len(data.classes))
        network(torch.empty(2, 3, data.image_size, data.image_size))
