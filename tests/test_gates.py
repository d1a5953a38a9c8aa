import pytest
import torch

from fpdarts import GateSampler


@pytest.mark.parametrize("paths, sets", [(1, 1), (2, 3), (3, 7)])
def test_every_non_empty_set_of_paths_is_equally_likely(paths, sets):
    gates = GateSampler(50, 200, paths, seed=1).sample()
    assert gates.shape == (50, 200, paths)
    subset = (gates * 2 ** torch.arange(paths)).sum(-1).long()
    counts = subset.flatten().bincount(minlength=2**paths)
    assert counts[0] == 0, "an edge has no open path"
    expected = 10_000 / sets
    assert ((counts[1:] - expected).abs() < 5 * expected**0.5).all()  # five standard deviations


def test_expected_gates_are_the_chance_of_being_open():
    sampler = GateSampler(8, 14)
    torch.testing.assert_close(sampler.expected(), torch.full((8, 14, 2), 2 / 3))
    assert (GateSampler(8, 14, 1).expected() == 1).all()


def test_modes():
    assert (GateSampler(2, 5, mode="both").sample() == 1).all()
    fixed = GateSampler(2, 5, mode="fixed", seed=3)
    assert torch.equal(fixed.sample(), fixed.sample()) and torch.equal(fixed.sample(), fixed.expected())
    step = GateSampler(2, 50, mode="step", seed=3)
    assert not torch.equal(step.sample(), step.sample())
    with pytest.raises(ValueError, match="unknown gate mode 'often'; choose one of: step, fixed, both"):
        GateSampler(2, 5, mode="often")


def test_seeded_restored_and_apart_from_the_global_state():
    state = torch.get_rng_state()
    sampler = GateSampler(2, 5, seed=7)
    sampler.sample()
    saved = sampler.state_dict()
    following = [sampler.sample() for _ in range(3)]
    restored = GateSampler(2, 5, seed=0)
    restored.load_state_dict(saved)
    for expected in following:
        assert torch.equal(restored.sample(), expected)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="mode 'step'"):
        GateSampler(2, 5, mode="both").load_state_dict(saved)


def test_gates_are_on_the_cpu_whatever_the_default_is():
    torch.set_default_device("meta")
    try:
        sampler = GateSampler(3, 5)
        drawn = [sampler.sample(), sampler.expected(), GateSampler(3, 5, mode="both").sample()]
    finally:
        torch.set_default_device(None)
    assert all(gates.device.type == "cpu" and gates.dtype == torch.float32 for gates in drawn)


def test_a_saved_state_is_a_copy_of_the_same_shape():
    sampler = GateSampler(3, 5, mode="fixed")
    before, state = sampler.sample(), sampler.state_dict()
    state["fixed"].zero_()
    assert torch.equal(sampler.sample(), before)
    with pytest.raises(ValueError, match=r"were saved for \(3, 5, 2\), this sampler is for \(8, 14, 2\)"):
        GateSampler(8, 14, mode="fixed").load_state_dict(state)
