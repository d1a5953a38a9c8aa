"""Testing a network that was retrained."""

import sys
from dataclasses import replace

import torch

from fpdarts.ahead import compile_steps, take_evaluation
from fpdarts.config import EvaluateConfig, RetrainConfig, require_in_range, resolved
from fpdarts.data import DataError, Loader, in_memory, open_data, select_reader
from fpdarts.genotype import Genotype
from fpdarts.retrain import build_network
from fpdarts.run import load_checkpoint, read_config, require_genotype, restore
from fpdarts.training import evaluate_model, select_amp, select_device, select_kernels


def evaluate(config: EvaluateConfig) -> dict:
    """{test_loss, test_accuracy[, test_top5_accuracy], epoch, images} of a retraining's newest checkpoint.

    Raises RunError for a directory without one, DataError for images that do not fit it, ValueError or
    BackendUnavailable for what cannot be used here.
    """
    device = select_device(config.device)
    require_in_range(config)
    trained = read_config(config.run, RetrainConfig)
    checkpoint = load_checkpoint(config.run)
    genotype = Genotype.load(f"{config.run}/genotype.json")
    require_genotype(genotype, checkpoint, config.run)
    # the list of a retraining holds for its own data only
    skip = config.skip or (None if config.data else trained.skip)
    data = open_data(config.data or trained.data, trained.protocol, trained.image_size, skip)
    trained = resolved(trained, data.protocol)
    if (classes := checkpoint["data"]["classes"]) != list(data.classes):
        names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise DataError(
            f"{data.source} has other classes than the {len(classes)} that {config.run} was trained on: {names}"
        )
    amp = select_amp(config.amp, device, training=False)
    serving, told = select_kernels("auto", amp, device, "derived_cell")  # maybe another machine
    network = build_network(replace(trained, kernels=serving), genotype, len(classes))
    restore(network, checkpoint, "model", config.run)
    network.to(device, memory_format=torch.channels_last)
    reader, told_reader = select_reader(config.loader, data)
    print(told, told_reader, sep="\n", file=sys.stderr)
    compile_steps(take_evaluation, network, data.image_size, serving, device, amp)
    images = data.test if config.limit is None else data.test.limited(config.limit)
    images = in_memory(images, data, None) if reader == "resident" else images
    batch_size = trained.batch_size if config.batch_size is None else config.batch_size
    loader = Loader(images, data, batch_size, None, 0, device, config.workers, reader)
    result = evaluate_model(network, loader, amp, data.protocol == "imagenet", "test")
    return {**result, "epoch": checkpoint["epoch"], "images": len(images)}
