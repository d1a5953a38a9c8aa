"""A planted task: only one operation sees its own image, the others see another sample's. Its alpha must win."""

import pytest
import torch
import torch.nn.functional as F
from fpdarts.kernels import reference

from fpdarts import Architect, GateSampler, SuperNet
from fpdarts.architect import frozen
from fpdarts.data import Loader, augmentation, open_data

# without skip_connect, which is no kernel of its own at stride 1 and so cannot be spoiled
SUBSETS = (("none", "max_pool_3x3", "sep_conv_3x3", "dil_conv_3x3"), ("avg_pool_3x3", "sep_conv_5x5", "dil_conv_5x5"))
STEPS, ARCHITECTURE_FROM = 60, 25


@pytest.mark.parametrize("planted", [name for subset in SUBSETS for name in subset if name != "none"])
def test_the_only_operation_that_sees_wins(monkeypatch, planted):
    seed = 0
    generator = torch.Generator().manual_seed(seed)
    operation = reference._operation

    def spoiled(spec, name, x, *rest):
        return operation(spec, name, x if name == planted else x[torch.randperm(len(x), generator=generator)], *rest)

    monkeypatch.setattr(reference, "_operation", spoiled)
    torch.manual_seed(seed)
    model = SuperNet(10, 8, cells=3, nodes=1, subsets=SUBSETS, kernels="reference")
    gates = GateSampler(*model.gate_shape, seed=seed)
    data = open_data("digits")
    loaders = [
        Loader(part, data, 64, augmentation("digits", "search"), seed + i)
        for i, part in enumerate(data.train.split(0.5, seed))
    ]
    weights = torch.optim.SGD(model.weight_parameters(), 0.1, 0.9, weight_decay=3e-4)
    adam = torch.optim.Adam(model.architecture_parameters(), 2e-2, (0.5, 0.999), weight_decay=1e-3)
    architect = Architect(model, adam, F.cross_entropy)

    batches = (pair for epoch in range(STEPS) for pair in zip(*(loader.epoch(epoch) for loader in loaders)))
    for step, (train, validation) in zip(range(STEPS), batches):
        if step >= ARCHITECTURE_FROM:
            architect.step(validation, gates.sample())
        with frozen(model.architecture_parameters()):
            weights.zero_grad()
            F.cross_entropy(model(train[0], gates.sample()), train[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.weight_parameters(), 5)
        weights.step()

    alpha = dict(zip(model.cells[0].spec.operations, model.alpha_normal.detach().mean(0).tolist()))
    assert max(alpha, key=alpha.get) == planted, alpha
