import copy

import pytest
import torch
import torch.nn.functional as F

from fpdarts import Architect, GateSampler, SuperNet

LR, MOMENTUM, DECAY = 0.1, 0.9, 3e-4


@pytest.fixture
def setting():
    """A small float64 supernet after two weight steps, with momentum in its optimizer, and two batches."""
    torch.manual_seed(0)
    model = SuperNet(4, 4, cells=3, nodes=2).double()
    with torch.no_grad():
        for parameter in model.architecture_parameters():
            parameter.normal_()
    batches = [(torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(4, (6,))) for _ in range(2)]
    gates = GateSampler(*model.gate_shape, seed=5).sample()
    sgd = torch.optim.SGD(model.weight_parameters(), LR, MOMENTUM, weight_decay=DECAY)
    for _ in range(2):
        sgd.zero_grad()
        F.cross_entropy(model(batches[0][0], gates), batches[0][1]).backward()
        sgd.step()
    return model, sgd, batches, gates


def adam(model):
    return torch.optim.Adam(model.architecture_parameters(), 6e-4, (0.5, 0.999), weight_decay=1e-3)


def unrolled_loss(model, sgd, train, validation, gates, index, shift):
    """L_val after a real optimizer step, with one architecture parameter shifted: what second order differentiates."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.architecture_parameters()[index].add_(shift)
    optimizer = torch.optim.SGD(model.weight_parameters(), LR, MOMENTUM, weight_decay=DECAY)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    optimizer.zero_grad()
    F.cross_entropy(model(train[0], gates), train[1]).backward()
    optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(validation[0], gates), validation[1])


@pytest.mark.parametrize("index, name", list(enumerate(("alpha_normal", "alpha_reduce", "beta_normal", "beta_reduce"))))
def test_second_order_gradient_equals_finite_differences(setting, index, name):
    model, sgd, (train, validation), gates = setting
    architect = Architect(model, adam(model), F.cross_entropy, weight_optimizer=sgd, step_size=1e-6)
    gradient = architect.gradient(validation, gates, train)[index]
    direction = torch.randn_like(gradient)
    h = 1e-6
    losses = [unrolled_loss(model, sgd, train, validation, gates, index, s * h * direction) for s in (1, -1)]
    expected, actual = (losses[0] - losses[1]) / (2 * h), (gradient * direction).sum()
    # float64 rounding of the loss over the step is 1e-10; measured agreement is about 1e-8
    assert abs(actual - expected) <= 1e-6 * abs(expected), f"d_{name}: {actual} against {expected}"
    first_order = Architect(model, adam(model), F.cross_entropy).gradient(validation, gates)[index]
    first_order = (first_order * direction).sum()
    assert abs(first_order - expected) > 1e-2 * abs(expected), "the case must tell second order from first"


def test_first_order_gradient_equals_autograd(setting):
    model, _, (_, validation), gates = setting
    gradients = Architect(model, adam(model), F.cross_entropy).gradient(validation, gates)
    loss = F.cross_entropy(model(validation[0], gates), validation[1])
    expected = torch.autograd.grad(loss, model.architecture_parameters())
    for name, ours, theirs in zip(("alpha_normal", "alpha_reduce", "beta_normal", "beta_reduce"), gradients, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14, msg=lambda m: f"d_{name}: {m}")
    assert all(p.requires_grad for p in model.parameters())


def test_what_was_frozen_stays_so(setting):
    model, _, (_, validation), gates = setting
    model.stem.requires_grad_(False)
    Architect(model, adam(model), F.cross_entropy).step(validation, gates)
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.cells.parameters())


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_step_moves_architecture_only_and_statistics_once(setting, unrolled):
    model, sgd, (train, validation), gates = setting
    architect = Architect(model, adam(model), F.cross_entropy, weight_optimizer=sgd if unrolled else None)
    weights = [p.detach().clone() for p in model.weight_parameters()]
    momentum = [sgd.state[p]["momentum_buffer"].clone() for p in model.weight_parameters()]
    alpha = model.alpha_normal.detach().clone()
    counted = model.stem[0][1].num_batches_tracked.item()
    other, other_sgd = copy.deepcopy((model, sgd))
    for cell in other.cells:
        cell.running_mean += 1
    Architect(other, adam(other), F.cross_entropy, weight_optimizer=other_sgd if unrolled else None).step(
        validation, gates, train
    )
    architect.step(validation, gates, train)
    for ours, theirs in zip(model.cells, other.cells):  # of what was before, one average leaves 0.9
        left = theirs.running_mean - ours.running_mean
        assert (left - 0.9).abs().min() < 1e-9 and torch.minimum((left - 0.9).abs(), (left - 1).abs()).max() < 1e-9
    for parameter, before in zip(model.weight_parameters(), weights):
        assert torch.equal(parameter, before)
    for parameter, before in zip(model.weight_parameters(), momentum):
        assert torch.equal(sgd.state[parameter]["momentum_buffer"], before)
    assert not torch.equal(model.alpha_normal, alpha)
    assert model.stem[0][1].num_batches_tracked.item() == counted + 1


def test_none_gets_no_gradient(setting):
    model, _, (_, validation), gates = setting
    column = model.cells[0].spec.operations.index("none")
    gradients = Architect(model, adam(model), F.cross_entropy).gradient(validation, gates)
    assert not gradients[0][:, column].any() and not gradients[1][:, column].any()


def test_clip_bounds_the_norm(setting):
    model, _, (_, validation), gates = setting
    Architect(model, adam(model), F.cross_entropy, clip=1e-3).step(validation, gates)
    norm = torch.stack([p.grad.norm() for p in model.architecture_parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_unrolled_without_a_training_batch_is_an_error(setting):
    model, sgd, (_, validation), gates = setting
    architect = Architect(model, adam(model), F.cross_entropy, weight_optimizer=sgd)
    with pytest.raises(ValueError, match="weight half"):
        architect.step(validation, gates)
    with pytest.raises(ValueError, match="weight half"):
        architect.gradient(validation, gates)


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (lambda p: torch.optim.Adam(p), "must be torch.optim.SGD with one group"),
        (
            lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}], 0.1),
            "must be torch.optim.SGD with one group",
        ),
        (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), "has nesterov"),
        (lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.5), "has dampening"),
        (lambda p: torch.optim.SGD(p, 0.1, maximize=True), "has maximize"),
    ],
    ids=["adam", "groups", "nesterov", "dampening", "maximize"],
)
def test_another_optimizer_than_plain_sgd_has_no_virtual_step(setting, optimizer, message):
    model = setting[0]
    with pytest.raises(ValueError, match=message):
        Architect(model, adam(model), F.cross_entropy, weight_optimizer=optimizer(list(model.weight_parameters())))


def test_what_is_frozen_needs_no_gradient_in_either_order(setting):
    model, sgd, (train, validation), gates = setting
    model.stem.requires_grad_(False)
    model.alpha_reduce.requires_grad_(False)
    model.alpha_reduce.grad = None
    before = model.alpha_reduce.detach().clone()
    for optimizer in (None, sgd):
        architect = Architect(model, adam(model), F.cross_entropy, weight_optimizer=optimizer)
        assert len(architect.gradient(validation, gates, train)) == 3
        architect.step(validation, gates, train)
    assert torch.equal(model.alpha_reduce, before)


def test_weights_outside_the_optimizer_leave_its_state_alone(setting):
    model, _, (train, validation), gates = setting
    sgd = torch.optim.SGD(model.cells.parameters(), 0.1, 0.9)
    Architect(model, adam(model), F.cross_entropy, weight_optimizer=sgd).step(validation, gates, train)
    assert not sgd.state_dict()["state"]


def test_the_second_order_of_a_compiled_supernet_is_that_of_the_plain_one(setting):
    model, sgd, (train, validation), gates = setting
    found = [
        Architect(each, adam(model), F.cross_entropy, weight_optimizer=sgd).gradient(validation, gates, train)
        for each in (model, torch.compile(model, backend="eager"))
    ]
    torch.testing.assert_close(*found)
