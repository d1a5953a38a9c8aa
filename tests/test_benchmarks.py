"""The benchmarks themselves: what they count, that a wrong back end is caught, and that a slow one is told as slow."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fpdarts.kernels import reference

from benchmarks import compare, loading, profile, sweep, table, work
from benchmarks.cases import DEFAULTS, PARTS, STEPS, Setting, build, check, reference_results
from benchmarks.counting import Count
from benchmarks.limits import Limits
from benchmarks.sides import Side
from fpdarts import DerivedNetwork, GateSampler, Genotype, SuperNet, kernels
from fpdarts.genotype import PUBLISHED

# Of a reduction cell, with a factorized reduction, which no published one has.
STRIDED = (
    ("skip_connect", 0), ("max_pool_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_5x5", 1), ("sep_conv_3x3", 0),
    ("skip_connect", 2), ("sep_conv_5x5", 3), ("skip_connect", 1),
)  # fmt: skip
LIMITS = Limits("cpu", 1, 1e11, 1e10, None)
SMALL = Setting(batch_size=2, init_channels=4, cells=3, image_size=16)


@pytest.mark.parametrize("side", ["eager", "channels_last", "reference"])
@pytest.mark.parametrize("what", [*STEPS, *PARTS])
def test_every_side_passes_the_check(what, side):
    operation = "max_pool_3x3" if what == "pooling" else "dil_conv_3x3"
    setting = Setting(2, 4, 3, 16, gates="step", operation=operation, reduction=True)
    side = Side.parse(side)
    check(what, side, setting, build(what, side, setting), reference_results(what, setting))


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_direction_has_its_results_and_its_work(direction):
    setting = Setting(2, 4, image_size=8, direction=direction)
    case = build("stage", Side("reference"), setting)
    case.step(0)
    expected = {"forward": {"out"}, "backward": {"d_state", "d_depthwise", "d_pointwise"}}
    expected["both"] = expected["forward"] | expected["backward"]
    assert set(case.results()) == expected[direction]
    assert case.work.flops == 2 * 4 * 2 * 2 * 64 * (25 + 2) * {"forward": 1, "backward": 2, "both": 3}[direction]


def test_a_wrong_back_end_is_caught_by_its_tensor(plant):
    plant("wrong", stage=lambda *args, **options: reference.stage(*args, **options) * 1.001)
    with pytest.raises(AssertionError, match="stage on wrong: out is off by 1.0e-03"):
        compare.compare("stage", ["wrong"], SMALL, rounds=1, memory=False, limits=LIMITS)


def test_a_wrong_gradient_is_caught(plant):
    def cell(spec, inputs, weights, *others):
        weights = {name: w.detach() if name == "sep_conv_5x5_pointwise_0" else w for name, w in weights.items()}
        return reference.cell(spec, inputs, weights, *others)

    plant("wrong", cell=cell)
    with pytest.raises(AssertionError, match="cell on wrong: d_sep_conv_5x5_pointwise_0 is off by 1.0e"):
        compare.compare("cell", ["wrong"], SMALL, rounds=1, memory=False, limits=LIMITS)


def test_a_wrong_step_is_caught(plant):
    def cell(*args):
        out, statistics = reference.cell(*args)
        return out * 1.01, statistics

    plant("wrong", cell=cell)
    with pytest.raises(AssertionError, match="search-step on wrong"):
        compare.compare("search-step", ["wrong"], SMALL, rounds=1, memory=False, limits=LIMITS)


def test_nan_is_caught(plant):
    plant("wrong", node=lambda slices: reference.node(slices) * float("nan"))
    with pytest.raises(AssertionError, match="node on wrong: out is off by nan"):
        compare.compare("node", ["wrong"], SMALL, rounds=1, memory=False, limits=LIMITS)


def test_a_slow_back_end_is_told_as_slow(plant):
    def stage(*args, **options):
        time.sleep(0.3)
        return reference.stage(*args, **options)

    plant("slow", stage=stage)
    result = compare.compare("stage", ["slow", "reference", "eager"], SMALL, rounds=3, memory=False, limits=LIMITS)
    assert result["seconds"]["slow"]["low"] >= 0.3
    for baseline in ("reference", "eager"):  # seconds of the baseline over those of the slow one
        assert result["ratio"][baseline]["median"] < 1
    assert result["seconds"]["slow"]["share_of_limit"] < result["seconds"]["reference"]["share_of_limit"]
    assert "slow" in compare.show(result)


def test_a_result_has_what_is_documented(capsys):
    result = compare.compare("node", ["reference", "eager"], SMALL, rounds=2, limits=LIMITS)
    assert result["ratio"]["eager"].keys() == {"median", "low", "high"}
    assert result["peak_memory"].keys() == result["seconds"].keys() == {"reference", "eager"}
    assert all(memory is None or memory >= 0 for memory in result["peak_memory"].values())
    assert result["limit"]["flops_per_second"] == 1e11
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("name", ["tvm", "eager+fp8", "reference+graph", "triton+graph"])
def test_a_side_that_cannot_be_is_refused(name):
    with pytest.raises((ValueError, kernels.BackendUnavailable), match=name.split("+")[0]):
        Side.parse(name)


def test_defaults_are_overridden_by_what_is_given():
    options = compare.Options("retrain-step", batch_size=4)
    setting = compare.setting_of(options)
    assert (setting.batch_size, setting.init_channels, setting.cells) == (4, 36, 20)


@pytest.mark.parametrize("gates", ["both", "step"])
@pytest.mark.parametrize("partial", [2, 4])
@pytest.mark.parametrize("stem, size", [("cifar", 32), ("imagenet", 64)])
@pytest.mark.parametrize("d_weight", [True, False], ids=["weight step", "architecture step"])
def test_flops_by_formula_equal_those_dispatched(gates, partial, stem, size, d_weight):
    with torch.device("meta"):
        model = SuperNet(10, 8, 5, nodes=2, partial=partial, stem=stem, kernels="reference")
        images, labels = torch.empty(4, 3, size, size), torch.empty(4, dtype=torch.long)
    gates = GateSampler(*model.gate_shape, mode=gates).sample()
    trained = model.weight_parameters() if d_weight else model.architecture_parameters()
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    with Count() as forward:
        loss = F.cross_entropy(model(images, gates), labels)
    with Count() as backward:
        torch.autograd.grad(loss, trained, materialize_grads=True)
    passes = work.supernet(model, 4, (size, size), gates, d_weight)
    # not "mm": small matrix products that make coefficients of gates
    assert passes.forward.flops == forward.flops["convolution"] + forward.flops["addmm"]
    assert passes.backward.flops == backward.total()["flops"]
    assert passes.of("both").bytes() < forward.total()["bytes"] + backward.total()["bytes"]


@pytest.mark.parametrize("stem, size, cells", [("cifar", 32, 6), ("imagenet", 224, 5)])
def test_flops_of_retraining_by_formula_equal_those_dispatched(stem, size, cells):
    genotype = Genotype(PUBLISHED["PC_DARTS_cifar"].normal, (2, 3, 5), STRIDED, (2, 3, 4, 5))
    with torch.device("meta"):
        network = DerivedNetwork(genotype, 10, 8, cells, stem, kernels="reference")
        images = torch.empty(4, 3, size, size)
    with Count() as forward:
        logits, auxiliary = network(images)
    with Count() as backward:
        (logits.sum() + auxiliary.sum()).backward()
    passes = work.network(network, 4, (size, size))
    assert passes.forward.flops == forward.total()["flops"]
    # the formula takes all of a node's work as needed, also where no later state reads it
    assert passes.backward.flops >= backward.total()["flops"]
    assert passes.of("both").bytes() < forward.total()["bytes"] + backward.total()["bytes"]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_profile_of_retraining(stem):
    result = profile.main(profile.Options("channels_last", what="retrain", stem=stem, cells=5, init_channels=8))
    step = result["retrain_step"]
    assert step["total"]["flops"] == pytest.approx(step["fewest"]["flops"], rel=1e-6)
    assert step["total"]["bytes"] > step["fewest"]["bytes"]
    assert "operators of the retrain step" in profile.show(result, 5)


def test_counts_of_single_operators():
    x = torch.empty(2, 4, 8, 8, device="meta", requires_grad=True)
    weight = torch.empty(6, 4, 3, 3, device="meta", requires_grad=True)
    with Count() as count:
        out = F.conv2d(x, weight, padding=1)
        out.view(2, -1)[:, 1:].relu()
        torch.ones(3) + 1  # on the CPU: bookkeeping
    assert count.total()["launches"] == 2  # views are free
    assert count.flops["convolution"] == 2 * 2 * 6 * 64 * 36
    assert count.bytes["convolution"] == 4 * (x.numel() + weight.numel() + out.numel())
    with Count() as count:
        out.sum().backward()
    assert count.launches["convolution_backward"] == 2
    assert count.flops["convolution_backward"] == 2 * 2 * 2 * 6 * 64 * 36


def test_profile_of_eager_agrees_with_an_independent_count():
    """19,514 launches and 205 GB were once counted with gradients of weights and architecture together."""
    result = profile.main(profile.Options("eager"))
    weight, architecture = result["weight_step"], result["architecture_step"]
    assert weight["forward"] == architecture["forward"]
    assert 7000 < weight["forward"]["launches"] < 7200
    assert 170e9 < weight["total"]["bytes"] < 205e9
    assert weight["total"]["flops"] == pytest.approx(weight["fewest"]["flops"], rel=1e-6)
    assert architecture["backward"]["flops"] < weight["backward"]["flops"] / 2
    assert "operators of the weight step" in profile.show(result, 5)


def test_profile_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="compile cannot be counted"):
        profile.main(profile.Options("compile"))


def test_the_gpu_script_s_dry_check_is_small(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks import gpu
    from fpdarts import check as checking

    asked = []
    monkeypatch.setattr(checking, "check_kernels", lambda *given, checked: asked.append((given, checked)))
    gpu.check(SimpleNamespace(dry_run=True, device="cpu"), "off")
    ((given, operations),) = asked
    assert given == ("triton", "cpu", "off") and len(operations) == 4
    assert {case.setting for case in operations["node"]} == {"C/K=2, K=2, 4x4"}


@pytest.mark.parametrize("what", STEPS)
def test_the_gpu_script_s_dry_steps_can_be_taken(what):
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks import gpu

    setting = gpu._setting(SimpleNamespace(dry_run=True, device="cpu"), what)
    build(what, Side("reference"), setting).step(0)


def test_sweep_writes_and_draws(tmp_path):
    out = tmp_path / "sweep.json"
    sweep.main(
        sweep.Options(
            str(out), against=("eager",), batch_sizes=(2, 4), channels=(4,), depths=(3,), batch_size=2, init_channels=4,
            cells=3, rounds=1,
        )
    )  # fmt: skip
    points = json.loads(out.read_text())["points"]
    assert [point["value"] for point in points["batch_size"]] == [2, 4]
    assert set(points["cells"][0]["seconds"]) == {"reference", "eager"}
    assert out.with_suffix(".svg").read_text().count("<path") > 10


def test_loading_compares_the_readers(tmp_path):
    folder = loading.made_up(tmp_path / "images", "cifar", 40, 32)
    options = loading.Options(
        str(folder), readers=("resident", "torchvision", "usual"), batch_size=8, workers=0, rounds=2, steps=1,
        init_channels=4, cells=3,
    )  # fmt: skip
    result = loading.main(options)
    assert set(result["images_per_second"]) == set(result["search_step"]) == {"resident", "torchvision", "usual"}
    assert set(result["over_usual"]) == {"resident", "torchvision"}
    assert "resident, from the cache" in loading.show(result, options)
    assert loading.agreement(options, "resident") == {"evaluation": 0, "training": 0}


def test_the_readme_has_the_table_of_the_results():
    readme = Path(table.README).read_text()
    assert table.filled(readme) == readme, "run: python -m benchmarks.table"


def test_every_result_says_where_it_comes_from():
    for path in table.RESULTS.glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert environment.keys() >= {"machine", "versions", "commit", "command", "date"}, path.name


def test_defaults_cover_every_case():
    assert set(DEFAULTS) == {*STEPS, *PARTS}
