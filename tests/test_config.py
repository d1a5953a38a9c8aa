import math
from dataclasses import replace

import pytest

from fpdarts.config import RetrainConfig, SearchConfig, learning_rate, resolved


def rates(config, protocol):
    config = resolved(config, protocol)
    return [learning_rate(config, epoch) for epoch in range(config.epochs)]


def test_cifar_search_is_the_protocols():
    config = resolved(SearchConfig(), "cifar")
    assert (config.init_channels, config.cells, config.batch_size, config.epochs) == (16, 8, 256, 50)
    assert (config.architecture_learning_rate, config.architecture_weight_decay) == (6e-4, 1e-3)
    assert (config.weight_decay, config.momentum, config.gradient_clip) == (3e-4, 0.9, 5)
    assert config.architecture_from == 15 and not config.architecture_clip
    expected = [0.1 * (1 + math.cos(math.pi * e / 50)) / 2 for e in range(50)]
    assert rates(SearchConfig(), "cifar") == pytest.approx(expected)


def test_imagenet_search_is_the_protocols():
    config = resolved(SearchConfig(), "imagenet")
    assert (config.batch_size, config.architecture_learning_rate, config.architecture_clip) == (1024, 6e-3, 5)
    assert (config.architecture_from, config.weight_fraction, config.architecture_fraction) == (35, 0.10, 0.025)
    expected = [0.5 * (e + 1) / 5 if e < 5 else 0.5 * (1 + math.cos(math.pi * e / 50)) / 2 for e in range(50)]
    assert rates(SearchConfig(), "imagenet") == pytest.approx(expected)


def test_retraining_is_the_protocols():
    config = resolved(RetrainConfig(), "cifar")
    assert (config.init_channels, config.cells, config.batch_size, config.epochs) == (36, 20, 96, 600)
    assert (config.cutout, config.auxiliary_weight, config.drop_path, config.label_smoothing) == (16, 0.4, 0.3, 0)
    expected = [0.025 * (1 + math.cos(math.pi * e / 600)) / 2 for e in range(600)]
    assert rates(RetrainConfig(), "cifar") == pytest.approx(expected)

    config = resolved(RetrainConfig(), "imagenet")
    assert (config.init_channels, config.cells, config.batch_size, config.epochs) == (48, 14, 1024, 250)
    assert (config.auxiliary_weight, config.drop_path, config.label_smoothing) == (0.4, 0, 0.1)
    assert config.weight_decay == 3e-5
    expected = [0.5 * (e + 1) / 5 for e in range(5)]
    expected += [0.5 * (245 - e) / 245 for e in range(5, 245)]
    expected += [0.5 * (250 - e) / (245 * 5) for e in range(245, 250)]
    assert rates(RetrainConfig(), "imagenet") == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [1, 2, 9, 10, 31])
@pytest.mark.parametrize("config", [SearchConfig(), RetrainConfig()], ids=["search", "retrain"])
@pytest.mark.parametrize("protocol", ["digits", "cifar", "imagenet"])
def test_no_epoch_has_a_learning_rate_of_zero(protocol, config, epochs):
    found = rates(replace(config, epochs=epochs), protocol)
    assert all(0 < rate <= resolved(config, protocol).learning_rate for rate in found)


def test_the_warm_up_scales_with_the_epochs():
    assert resolved(SearchConfig(epochs=3), "cifar").architecture_from == 1
    assert resolved(SearchConfig(epochs=100), "cifar").architecture_from == 30
    assert resolved(SearchConfig(epochs=100, architecture_from=0), "cifar").architecture_from == 0


@pytest.mark.parametrize(
    "config, message",
    [
        (SearchConfig(epochs=0), "--epochs must be at least 1, not 0"),
        (SearchConfig(batch_size=-1), "--batch-size must be at least 1"),
        (SearchConfig(learning_rate=0.0), "--learning-rate must be positive"),
        (SearchConfig(seed=-1), "--seed must be at least 0"),
        (SearchConfig(validate_every=0), "--validate-every must be at least 1"),
        (SearchConfig(seed=2**63), "--seed must be at least 0 and below"),
        (SearchConfig(partial=0), "--partial must be at least 1"),
        (SearchConfig(limit=0), "--limit must be at least 1"),
        (SearchConfig(architecture_clip=-5.0), "--architecture-clip must be at least 0"),
        (SearchConfig(architecture_learning_rate=-1.0), "--architecture-learning-rate must be positive"),
        (SearchConfig(learning_rate=float("inf")), "--learning-rate must be positive"),
        (RetrainConfig(auxiliary_weight=float("nan")), "--auxiliary-weight must be at least 0"),
        (RetrainConfig(cutout=-3), "--cutout must be at least 0"),
        (SearchConfig(weight_fraction=0.7), "--architecture-fraction must be at most"),
        (RetrainConfig(drop_path=1.0), "--drop-path must be at least 0 and below 1"),
        (RetrainConfig(holdout=1.5), "--holdout must be at least 0 and below 1"),
    ],
)
def test_values_out_of_range_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        resolved(config, "cifar")
