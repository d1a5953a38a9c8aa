"""Cases of whole steps: weights, architecture, retraining. They call the very functions that the loops call."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from benchmarks import work
from benchmarks.setting import Case, Setting
from benchmarks.sides import Side
from fpdarts import config as configuration
from fpdarts.config import RetrainConfig, SearchConfig
from fpdarts.gates import GateSampler
from fpdarts.genotype import PUBLISHED
from fpdarts.graphs import GraphedStep
from fpdarts.retrain import build_network, make_optimizer, training_step
from fpdarts.search import build_supernet, optimizers, weight_step
from tests.naive import NaiveSuperNet

DRAWS = 16  # of gates, used in turn


def _images(setting, memory_format):
    torch.manual_seed(1)  # whatever numbers building the model took
    images = torch.randn(setting.batch_size, 3, setting.image_size, setting.image_size)
    labels = torch.randint(10, (setting.batch_size,))
    return images.to(setting.device, memory_format=memory_format), labels.to(setting.device)


def search_config(setting: Setting, side: Side) -> SearchConfig:
    config = SearchConfig(
        batch_size=setting.batch_size, init_channels=setting.init_channels, cells=setting.cells, gates=setting.gates,
        kernels=side.kernels, amp="bf16" if side.bf16 else "off", image_size=setting.image_size,
    )  # fmt: skip
    return configuration.resolved(config, setting.stem)


def search_model(setting: Setting, side: Side, config: SearchConfig) -> nn.Module:
    """The supernet of a side; the naive one has its weights."""
    model = build_supernet(config, 10).to(setting.device)
    if side.today:
        model = NaiveSuperNet(model, side.branches).to(memory_format=side.memory_format)
    if side.name == "compile":
        for cell in model.cells:
            cell.compile()
    return model


def search_step(side, setting, architecture):
    config = search_config(setting, side)
    model = search_model(setting, side, config)
    weight_optimizer, architect = optimizers(config, model, torch.device(setting.device))
    batch = _images(setting, side.memory_format)
    spec_model = build_supernet(config, 10)
    sampler = GateSampler(*spec_model.gate_shape, mode=setting.gates)
    draws = [sampler.sample() for _ in range(DRAWS)]
    last, on_device = {}, draws if side.branches else [gates.to(setting.device) for gates in draws]

    def once(images, labels, gates):
        batch = images, labels
        if architecture:
            loss, logits = architect.step(batch, gates)
        else:
            loss, logits = weight_step(model, weight_optimizer, batch, gates, config)
        last.update(loss=loss.detach(), logits=logits.detach())
        return tuple(last.values())

    def step(i):
        once(*batch, on_device[i % DRAWS])

    def results():
        if side.today:
            gradients = model.packed_gradients()
        else:
            gradients = {name: p.grad for name, p in model.named_parameters()}
        asked = [name for name in gradients if name.startswith(("alpha", "beta")) == architecture]
        return {**last, **{f"d_{name}": gradients[name] for name in asked}}

    if side.graph:
        replay = _graphed(once, model, *batch, on_device[0])

        def step(i):
            replay(*batch, on_device[i % DRAWS])

    size, n = (setting.image_size,) * 2, setting.batch_size
    each = [work.supernet(spec_model, n, size, gates, not architecture).of("both") for gates in draws]
    mean = work.Work(*(sum(values) / DRAWS for values in zip(*each)))
    return Case(step, results, mean)


def _graphed(once, model, *arguments):
    """A call as one replay, after calls that make the graph; the weights are then what they were before these."""
    weights, graphed = deepcopy(model.state_dict()), GraphedStep(once)
    for _ in range(GraphedStep.WARM_UP + 1):
        graphed(*arguments)
    model.load_state_dict(weights)
    return graphed


def retrain_config(setting: Setting, side: Side) -> RetrainConfig:
    config = RetrainConfig(
        batch_size=setting.batch_size, init_channels=setting.init_channels, cells=setting.cells,
        kernels=side.kernels, amp="bf16" if side.bf16 else "off", image_size=setting.image_size,
    )  # fmt: skip
    config = configuration.resolved(config, setting.stem)
    if setting.image_size != {"cifar": 32, "imagenet": 224}[setting.stem]:
        config = replace(config, auxiliary_weight=0.0)  # the head needs the protocol's own size
    return config


def retrain_network(config: RetrainConfig) -> nn.Module:
    return build_network(config, PUBLISHED["PC_DARTS_cifar"], 10)


def retrain_step(side, setting):
    config = retrain_config(setting, side)
    device = torch.device(setting.device)
    network = retrain_network(config).to(device, memory_format=side.memory_format)
    if side.name == "compile":
        for cell in network.cells:
            cell.compile()
    optimizer = make_optimizer(config, network, device)
    batch, last = _images(setting, side.memory_format), {}

    def once(images, labels):
        loss, logits = training_step(network, optimizer, (images, labels), config.drop_path, config)
        return loss.detach(), logits.detach()

    call = _graphed(once, network, *batch) if side.graph else once

    def step(i):
        torch.manual_seed(i)  # the same paths are dropped on all sides
        last.update(zip(("loss", "logits"), call(*batch)))

    def results():
        return {**last, **{f"d_{name}": p.grad for name, p in network.named_parameters()}}

    with torch.device("meta"):
        counted = retrain_network(replace(config, kernels="reference"))
    return Case(step, results, work.network(counted, setting.batch_size, (setting.image_size,) * 2).of("both"))
