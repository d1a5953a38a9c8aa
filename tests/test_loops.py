"""The loops of search and retraining against plain ones, written out step by step."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fpdarts import DerivedNetwork, GateSampler, SuperNet
from fpdarts.config import RetrainConfig, SearchConfig, resolved
from fpdarts.data import Loader, augmentation, open_data
from fpdarts.genotype import PUBLISHED
from fpdarts.retrain import retrain
from fpdarts.run import load_checkpoint, read_metrics
from fpdarts.search import build_supernet, optimizers, search
from fpdarts.training import Meter
from tests.made import write_cifar


def close(found, expected):
    for name, value in expected.items():  # fused optimizers round otherwise
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


def validated(model, loader, *more):
    model.eval()
    with torch.no_grad():
        logits, labels = (torch.cat(part) for part in zip(*((model(x, *more), y) for x, y in loader.epoch())))
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def descend(parameters, gradients, clip, optimizer):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def test_a_search_is_the_plain_loop(tmp_path):
    search(
        SearchConfig(
            out=str(tmp_path), seed=3, limit=200, epochs=3, batch_size=25, init_channels=4, cells=3, nodes=2, device="cpu",
            kernels="reference", learning_rate=0.2, momentum=0.8, weight_decay=0.01, gradient_clip=0.5,
            architecture_learning_rate=0.05, architecture_weight_decay=0.2, architecture_clip=0.002, architecture_from=1,
            weight_fraction=0.5, architecture_fraction=0.3,
        )
    )  # fmt: skip
    data = open_data("digits")
    weight_part, rest = data.train.limited(200).split(0.5, 3)
    held_part = rest.split(0.6, 3)[0]
    assert (len(weight_part), len(held_part)) == (100, 60)
    augment = augmentation("digits", "search")
    train, held_out = Loader(weight_part, data, 25, augment, 6), Loader(held_part, data, 25, augment, 7)
    torch.manual_seed(3)
    model = SuperNet(10, 4, 3, 2, kernels="reference")
    gates = GateSampler(*model.gate_shape, seed=3)
    weights = [p for name, p in model.named_parameters() if not name.startswith(("alpha", "beta"))]
    architecture = [p for name, p in model.named_parameters() if name.startswith(("alpha", "beta"))]
    sgd = torch.optim.SGD(weights, 0.2, 0.8, weight_decay=0.01)
    adam = torch.optim.Adam(architecture, 0.05, (0.5, 0.999), weight_decay=0.2)
    metrics = read_metrics(tmp_path)
    for epoch in range(3):
        sgd.param_groups[0]["lr"] = 0.2 * (1 + math.cos(math.pi * epoch / 3)) / 2
        model.train()
        others = (batch for number in itertools.count(2 * epoch) for batch in held_out.epoch(number))  # 4 of 3 a pass
        losses = []
        for images, labels in train.epoch(epoch):
            if epoch >= 1:
                others_images, others_labels = next(others)
                loss = F.cross_entropy(model(others_images, gates.sample()), others_labels)
                descend(architecture, torch.autograd.grad(loss, architecture), 0.002, adam)
            loss = F.cross_entropy(model(images, gates.sample()), labels)
            descend(weights, torch.autograd.grad(loss, weights, materialize_grads=True), 0.5, sgd)
            losses.append(loss.item())
        loss, accuracy = validated(model, Loader(held_part, data, 25, None, 0), gates.expected())
        assert metrics[epoch]["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-3)
        assert metrics[epoch]["valid_loss"] == pytest.approx(loss, rel=1e-3)
        assert metrics[epoch]["valid_accuracy"] == pytest.approx(accuracy)
    close(load_checkpoint(tmp_path)["model"], model.state_dict())


def test_a_retraining_is_the_plain_loop(tmp_path):
    folder, _, _ = write_cifar(tmp_path, "cifar10-python", count=11)
    out, genotype = tmp_path / "run", "DARTS_V2"
    result = retrain(
        RetrainConfig(
            data=str(folder), out=str(out), seed=3, limit=50, epochs=3, batch_size=9, init_channels=4, cells=3, device="cpu",
            kernels="reference", learning_rate=0.2, momentum=0.8, weight_decay=0.01, gradient_clip=0.5, genotype=genotype,
            auxiliary_weight=0.3, drop_path=0.4, label_smoothing=0.2, cutout=6, holdout=0.2,
        )
    )  # fmt: skip
    data = open_data(folder)
    held_part, part = data.train.limited(50).split(0.2, 3)
    train = Loader(part, data, 9, replace(augmentation("cifar", "retrain"), cutout=6), 3)
    torch.manual_seed(3)
    network = DerivedNetwork(PUBLISHED[genotype], 10, 4, 3, kernels="reference").to(memory_format=torch.channels_last)
    weights = [*network.parameters()]
    sgd = torch.optim.SGD(weights, 0.2, 0.8, weight_decay=0.01)
    metrics = read_metrics(out)
    for epoch in range(3):
        sgd.param_groups[0]["lr"] = 0.2 * (1 + math.cos(math.pi * epoch / 3)) / 2
        network.train()
        losses, sizes = [], []
        for images, labels in train.epoch(epoch):
            logits, auxiliary = network(images, 0.4 * epoch / 3)
            loss, other = (F.cross_entropy(x, labels, label_smoothing=0.2) for x in (logits, auxiliary))
            descend(weights, torch.autograd.grad(loss + 0.3 * other, weights, materialize_grads=True), 0.5, sgd)
            losses.append(loss.item() * len(labels))
            sizes.append(len(labels))
        assert sizes == [9] * 4 + [4]
        assert metrics[epoch]["train_loss"] == pytest.approx(sum(losses) / 40, rel=1e-3)
        loss, accuracy = validated(network, Loader(held_part, data, 9, None, 0))
        assert metrics[epoch]["valid_loss"] == pytest.approx(loss, rel=1e-3)
    close(load_checkpoint(out)["model"], network.state_dict())
    loss, accuracy = validated(network, Loader(data.test, data, 9, None, 0))
    assert (result["test_loss"], result["test_accuracy"]) == (pytest.approx(loss, rel=1e-3), pytest.approx(accuracy))


def test_a_search_takes_over_every_option():
    config = resolved(SearchConfig(unrolled=True, unrolled_step_size=0.5), "imagenet")
    model = build_supernet(config, 10)
    _, architect = optimizers(config, model, torch.device("cpu"))
    assert (architect.step_size, architect.clip) == (0.5, 5.0) and architect.weight_optimizer is not None
    assert model.stem[0][0].stride == (2, 2), "ImageNet's stem"


def test_a_meter_counts_images_and_ranks():
    meter = Meter(top5=True)
    third = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    meter.add(torch.tensor(1.0), third.expand(3, 6), torch.tensor([2, 2, 5]))
    meter.add(torch.tensor(5.0), third, torch.tensor([0]))
    assert meter.read("x") == {"x_loss": 2.0, "x_accuracy": 0.25, "x_top5_accuracy": 0.75}
    assert meter.first_non_finite() is None
    for bad in (math.inf, -math.inf, math.nan):
        meter = Meter()
        for loss in (1.0, bad):
            meter.add(torch.tensor(loss), third, torch.tensor([0]))
        assert meter.first_non_finite() == 1
