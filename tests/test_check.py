"""check-kernels and search --verify-every: that the reference passes, and that what is wrong is found and named."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fpdarts.kernels import reference

from fpdarts import GateSampler, SuperNet, check, check_cases, verify
from fpdarts.check import check_kernels
from fpdarts.check_cases import Case, Shape, Side
from fpdarts.config import SearchConfig, resolved
from fpdarts.errors import KernelMismatch, NonFiniteLoss
from fpdarts.run import load_checkpoint
from fpdarts.search import search
from fpdarts.verify import Tolerance, relative_errors, verify_step
from tests.command import run
from tests.same import assert_same

ROOT = Path(__file__).parent.parent
TINY = dict(limit=120, init_channels=4, cells=3, batch_size=30, epochs=2)  # two steps an epoch


@pytest.fixture
def small(monkeypatch):
    """Shapes with which a whole check takes a second or two."""
    monkeypatch.setattr(check_cases, "SHAPES", (Shape(8, 2, 8), Shape(8, 4, 7)))
    monkeypatch.setattr(check_cases, "DERIVED_SHAPES", ((4, 8), (6, 7)))
    monkeypatch.setattr(check_cases, "STEP_CHANNELS", 4)
    monkeypatch.setattr(check_cases, "STEP_CELLS", 3)
    monkeypatch.setattr(check_cases, "STEP_SIZE", 16)


def scaled_gradient(name, factor):
    """A cell whose gradient of one weight is wrong by a factor."""

    def cell(spec, inputs, weights, *others):
        weight = weights[name]
        return reference.cell(
            spec, inputs, {**weights, name: factor * weight + (1 - factor) * weight.detach()}, *others
        )

    return cell


def cell_times(factor):
    def cell(*arguments):
        out, statistics = reference.cell(*arguments)
        return out * factor, statistics

    return cell


def only(monkeypatch, *names):
    """Operations whose names begin so, alone: what is wrong is computed with seven seeds."""
    chosen = {name: cases for name, cases in check_cases.operations().items() if name.startswith(names)}
    monkeypatch.setattr(check, "operations", lambda: chosen)


def failed(report):
    return {row["operation"]: row for row in report["rows"] if not row["passed"]}


def quiet(line):
    pass


# --- errors


def test_errors_are_relative():
    one = {"out": torch.ones(4), "d_x": torch.ones(4)}
    assert relative_errors(one, one) == {"out": 0, "d_x": 0}
    assert relative_errors({"out": torch.full((4,), 1.5), "d_x": torch.zeros(4)}, one) == {"out": 0.5, "d_x": 1}


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, math.nan]), torch.ones(2, 2), torch.ones(1), None], ids=str)
def test_what_is_no_number_or_missing_or_in_another_shape_is_infinitely_wrong(wrong):
    assert relative_errors({"out": wrong}, {"out": torch.ones(2)}) == {"out": math.inf}


def test_a_gradient_that_vanishes_is_judged_by_the_largest():
    expected = {"d_large": torch.tensor(1000.0), "d_nothing": torch.tensor(0.0), "out": torch.tensor(1e-3)}
    errors = relative_errors({**expected, "d_nothing": torch.tensor(1e-3), "out": torch.tensor(2e-3)}, expected)
    assert errors == pytest.approx({"d_large": 0, "d_nothing": 1e-3, "out": 1}, rel=1e-5)


# --- check_kernels


def test_the_reference_passes_and_every_operation_is_there(small):
    lines = []
    report = check_kernels("reference", "cpu", say=lines.append)
    assert report["passed"] and (report["kernels"], report["device"], report["amp"]) == ("reference", "cpu", "off")
    found = [row["operation"] for row in report["rows"]]
    for name in ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"):
        assert {f"stage {name}, stride 1", f"stage {name}, stride 2"} <= set(found)
    for name in ("max_pool_3x3", "avg_pool_3x3"):
        assert {f"pooling {name}, stride 1", f"pooling {name}, stride 2"} <= set(found)
    assert {"factorized_reduction", "normalize", "node", "stem", "step of weights", "step of architecture"} <= set(
        found
    )
    assert {"cell, normal", "cell, reduction", "cell, factorized input"} <= set(found)
    assert {f"cell, gates {gates}" for gates in check_cases.GATES} <= set(found)
    assert {f"derived cell, {kind}" for kind in (*check_cases.DERIVED, "drop-path", "evaluation")} <= set(found)
    for row in report["rows"]:
        assert 0 <= row["output_error"] <= row["output_tolerance"]
        not_asked = "normalize, statistics given", "cell, evaluation", "derived cell, evaluation"
        assert (row["gradient_error"] is None) == (row["operation"] in not_asked)
    assert "kernels reference on cpu" in lines[0] and [line.split("  ")[0] for line in lines[2:]] == found


def test_the_settings_are_those_of_a_search_on_cifar():
    settings = {case.setting for cases in check_cases.operations().values() for case in cases}
    for c, size in ((8, 32), (16, 16), (32, 8)):
        assert {f"C/K={c}, K=2, {size}x{size}", f"reduction, C/K={c}, K=2, {size}x{size}"} <= settings
    assert {"normal, C=36, 32x32", "reduction, C=144, 8x8", "factorized input, C=48, 7x7"} <= settings
    assert {"C/K=4, K=4, 7x7", "normal, C/K=4, K=4, 7x7", "reduction, C/K=4, K=4, 8x8"} <= settings


def test_a_wrong_output_is_found_in_its_operations_alone(plant, small):
    plant("wrong", stage=lambda *args, **options: reference.stage(*args, **options) * 1.001)
    found = failed(check_kernels("wrong", "cpu", say=quiet))
    assert set(found) == {operation for operation in check_cases.operations() if operation.startswith("stage")}
    row = found["stage dil_conv_5x5, stride 2"]
    assert row["worst"].startswith("out, C/K=") and row["output_error"] == pytest.approx(1e-3, rel=1e-2)


def test_twice_what_rounding_explains_is_found(plant, small, monkeypatch):
    only(monkeypatch, "stage sep_conv_3x3, stride 1", "cell, normal")
    plant(
        "wrong",
        cell=cell_times(1 + 2e-5),
        stage=lambda *args, **options: reference.stage(*args, **options) * (1 + 2e-5),
    )
    assert len(failed(check_kernels("wrong", "cpu", say=quiet))) == 2
    plant("wrong", cell=scaled_gradient("sep_conv_5x5_pointwise_0", 1 + 2e-4))
    assert set(failed(check_kernels("wrong", "cpu", say=quiet))) == {"cell, normal"}


def test_a_row_checks_what_it_says(plant, small, monkeypatch):
    only(monkeypatch, "cell, gates", "cell, evaluation", "derived cell, drop-path", "derived cell, evaluation")
    seen = []

    def cell(spec, inputs, weights, alpha, beta, gates, statistics=None):
        seen.append((gates.tolist(), statistics is not None))
        return reference.cell(spec, inputs, weights, alpha, beta, gates, statistics)

    def derived_cell(spec, inputs, weights, path_scales=None, statistics=None):
        seen.append((None if path_scales is None else path_scales.unique().numel(), statistics is not None))
        return reference.derived_cell(spec, inputs, weights, path_scales, statistics)

    plant("watched", cell=cell, derived_cell=derived_cell)
    found = {}
    for name, cases in check.operations().items():
        seen.clear()
        cases[0].compute(Side("watched", torch.device("cpu"), torch.float32, "off"), 0)
        (found[name],) = seen
    for name, gates in check_cases.GATES.items():
        assert found[f"cell, gates {name}"] == (gates(0).tolist(), False)
    assert found["cell, evaluation"][1] and found["derived cell, evaluation"][1]
    assert found["derived cell, drop-path"] == (2, False), "some paths are dropped, some are not"


@pytest.mark.parametrize("factor", [1.01, 0], ids=["scaled", "missing"])
def test_a_wrong_gradient_is_found_whatever_the_seed(plant, small, monkeypatch, factor):
    kinds = "normal", "reduction", "factorized", "gradients", "evaluation", "gates path 0"
    only(monkeypatch, *(f"cell, {kind}" for kind in kinds))
    cell = scaled_gradient("sep_conv_5x5_pointwise_0", factor)
    if factor == 0:

        def cell(spec, inputs, weights, *others):
            weights = {name: w.detach() if name == "sep_conv_5x5_pointwise_0" else w for name, w in weights.items()}
            return reference.cell(spec, inputs, weights, *others)

    plant("wrong", cell=cell)
    found = failed(check_kernels("wrong", "cpu", say=quiet))
    assert {"cell, normal", "cell, reduction", "cell, factorized input", "cell, gradients of weights"} <= set(found)
    assert not {"cell, gradients of architecture", "cell, evaluation"} & set(found)
    assert ("cell, gates path 0 only" in found) == (factor == 0)  # of a closed path it is zero, not missing
    assert found["cell, normal"]["worst"].startswith("d_sep_conv_5x5_pointwise_0, normal, ")
    assert found["cell, normal"]["gradient_error"] == pytest.approx(0.01 if factor else math.inf, rel=1e-2)


def test_a_wrong_derived_cell_is_found(plant, small):
    def derived_cell(*arguments):
        out, statistics = reference.derived_cell(*arguments)
        return out, statistics and statistics._replace(variance=statistics.variance * 1.001)

    plant("wrong", derived_cell=derived_cell)
    found = failed(check_kernels("wrong", "cpu", say=quiet))
    assert set(found) == {f"derived cell, {kind}" for kind in (*check_cases.DERIVED, "drop-path")}
    assert found["derived cell, normal"]["worst"].startswith("variance, normal, C=")


def test_derived_cells_that_a_back_end_does_not_have_are_told_and_not_checked(plant, small):
    plant("other", derived_cell=None)
    lines = []
    report = check_kernels("other", "cpu", say=lines.append)
    assert report["passed"] and not any(row["operation"].startswith("derived") for row in report["rows"])
    assert "derived cell, normal: this version of fpdarts has no other kernels for derived_cell" in "\n".join(lines)


def test_a_wrong_step_is_found(plant, small, monkeypatch):
    only(monkeypatch, "step")
    plant("wrong", cell=cell_times(1.01))
    assert {"step of weights", "step of architecture"} <= set(failed(check_kernels("wrong", "cpu", say=quiet)))


def test_one_nan_is_found(plant, small):
    def node(slices):
        out = reference.node(slices)
        return out.index_fill(3, torch.tensor(out.shape[3] - 1), math.nan)

    plant("wrong", node=node)
    found = failed(check_kernels("wrong", "cpu", say=quiet))
    assert set(found) == {"node"} and found["node"]["output_error"] == math.inf


def test_what_a_back_end_raises_is_told_and_the_rest_is_checked(plant, small):
    def pooling(x, operation, *, stride=1):
        raise RuntimeError("out of shared memory\nmore of it")

    plant("wrong", pooling=pooling)
    report = check_kernels("wrong", "cpu", say=quiet)
    assert [operation.split()[0] for operation in failed(report)] == ["pooling"] * 4
    assert failed(report)["pooling avg_pool_3x3, stride 1"]["worst"].startswith(
        "RuntimeError (out of shared memory), C/"
    )
    assert report["rows"][-1]["operation"] == "step of architecture"


@pytest.mark.parametrize(
    "errors, passed",
    [([0, 9, 9, 9, 9, 9, 9], True), ([9, 0, 0, 9, 9, 0, 0], True), ([9, 0, 0, 9, 9, 9, 0], False),
     ([9, 0, 0, math.nan, 0, 0, 0], False)],
    ids=["not repeated", "ties", "an error", "not a number"],
)  # fmt: skip
def test_a_tie_is_told_from_an_error_by_other_seeds(errors, passed):
    def compute(side, seed):
        error = 0 if side.dtype == torch.float64 else errors[seed]
        return {"out": torch.ones(1), "d_x": torch.tensor(1.0 + error)}

    side = Side("reference", torch.device("cpu"), torch.float32, "off")
    output, gradient = check._worst(Case("", compute), side, Tolerance(0.1, 0.1))
    assert output == (0, "out") and (gradient[0] <= 0.1) == passed


def test_a_fault_that_shows_when_a_result_is_waited_for_is_told_as_one_that_is_raised():
    class Faulty(torch.Tensor):
        def cpu(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    def compute(side, seed):
        out = torch.ones(1)
        return {"out": out if side.dtype == torch.float64 else out.as_subclass(Faulty)}

    side = Side("reference", torch.device("cpu"), torch.float32, "off")
    errors = check._outcome(Case("", compute), side, 0)
    assert errors == {"RuntimeError (CUDA error: an illegal memory access was encountered)": math.inf}


def test_bf16_hands_on_states_in_bf16_and_is_allowed_more(plant, small):
    seen = []

    def node(slices):
        seen.append((slices[0][0][0].dtype, slices[0][1][1].dtype))
        return reference.node(slices)

    plant("watched", node=node)
    report = check_kernels("watched", "cpu", "bf16", say=quiet)
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    rows = {row["operation"]: row for row in report["rows"]}
    # not all of them: this library's gradients of dilated depthwise convolutions are wrong in bf16
    assert rows["node"]["passed"] and rows["cell, gates path 0 only"]["gradient_tolerance"] == 0.25
    assert rows["node"]["output_error"] > 1e-5


def test_the_check_needs_no_command_line():
    code = "import sys; sys.modules['tyro'] = None; import fpdarts.check"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_command(small, capsys):
    status, out, err = run(capsys, "check-kernels", "--kernels", "reference", "--device", "cpu")
    assert status == 0 and "step of weights" in out and "WRONG" not in out and not err
    status, out, err = run(capsys, "check-kernels", "--kernels", "reference", "--device", "cpu", "--json")
    report = json.loads(out)
    assert status == 0 and report["passed"] and "step of weights" in err
    assert report["rows"][0].keys() == {
        "operation",
        "output_error",
        "gradient_error",
        "output_tolerance",
        "gradient_tolerance",
        "worst",
        "passed",
    }


def test_command_fails_where_an_operation_is_wrong(plant, small, capsys):
    plant("native", node=lambda slices: reference.node(slices) * math.nan)
    arguments = "check-kernels --kernels native --device cpu".split()
    status, out, err = run(capsys, *arguments)
    assert status == 1 and out.count("WRONG: out, C/K=") == 1
    assert err.startswith("error: kernels native are out of tolerance in 1 of ") and err.count("\n") == 1
    status, out, err = run(capsys, *arguments, "--json")
    row = next(row for row in json.loads(out)["rows"] if not row["passed"])
    assert status == 1 and row["operation"] == "node" and row["output_error"] is None


# --- verify_step


def step_arguments(name, **options):
    torch.manual_seed(0)
    model = SuperNet(10, 4, 3, kernels=name, **options)
    return model, torch.randn(4, 3, 16, 16), GateSampler(*model.gate_shape, seed=0).sample()


def test_a_right_step_passes_and_leaves_no_trace():
    model, images, gates = step_arguments("reference")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    verify_step(model, images, gates, "off", 0)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(cell._forward_pre_hooks for cell in model.cells)


@pytest.mark.parametrize(
    "cell, message",
    [
        (cell_times(1.01), r"step 40: cells.0 out is off by 1.0e-02, relative; allowed 0.001"),
        (cell_times(math.nan), r"step 40: cells.0 out is off by inf"),
        (scaled_gradient("sep_conv_3x3_pointwise_1", 1.1), r"cells.0 d_sep_conv_3x3_pointwise_1 is off by 1.0e-01"),
        (scaled_gradient("preprocess0_even", 1.1), r"cells.2 d_preprocess0_even is off by 1.0e-01, .* allowed 0.01"),
    ],
    ids=["out", "nan", "gradient", "third cell"],
)
def test_a_wrong_step_is_named_by_cell_and_tensor(plant, cell, message):
    def where_it_is_read(spec, inputs, weights, *others):
        wrong = "even" not in message or "preprocess0_even" in weights
        return (cell if wrong else reference.cell)(spec, inputs, weights, *others)

    plant("wrong", cell=where_it_is_read)
    with pytest.raises(KernelMismatch, match=message + r".*\(kernels wrong against reference\)"):
        verify_step(*step_arguments("wrong"), "off", 40)


@pytest.mark.parametrize(
    "factor, message", [(1.01, "out is off by 1.0e-02"), (None, "d_weight is off by 1.0e-01")], ids=["out", "gradient"]
)
def test_a_wrong_stem_is_named(plant, factor, message):
    def stem(images, weight, *others):
        if factor is None:
            weight = weight + 0.1 * (weight - weight.detach())  # the same, with another gradient
        out, *statistics = reference.stem(images, weight, *others)
        return out * (factor or 1), *statistics

    plant("wrong", stem=stem)
    with pytest.raises(KernelMismatch, match=f"step 40: stem {message}.*wrong against reference"):
        verify_step(*step_arguments("wrong"), "off", 40)


def test_a_step_is_verified_with_its_own_gates(plant):
    def cell(spec, inputs, weights, alpha, beta, gates, *others):
        return (reference.cell if gates.min() > 0 else cell_times(1.01))(
            spec, inputs, weights, alpha, beta, gates, *others
        )

    plant("wrong", cell=cell)
    model, images, gates = step_arguments("wrong")
    verify_step(model, images, torch.ones_like(gates), "off", 0)
    with pytest.raises(KernelMismatch, match="cells.0 out is off by 1.0e-02"):
        verify_step(model, images, gates, "off", 0)


def test_a_gradient_that_is_off_on_one_input_only_is_a_tie(plant, monkeypatch):
    calls = []

    def errors(*arguments):
        calls.append(arguments)
        return {"out": 0.0, "d_input_1": 0.5 if len(calls) == 1 else 1e-6}

    monkeypatch.setattr(verify, "_errors", errors)
    plant("without_a_stem")
    verify_step(*step_arguments("without_a_stem"), "off", 0)
    assert len(calls) == 4  # three cells, the first of them twice
    assert not torch.equal(calls[0][1]["input_1"], calls[1][1]["input_1"])


def test_backward_passes_are_verified_outside_of_autocast_as_they_are_taken(plant):
    seen = []

    def cell(spec, inputs, *others):
        out, statistics = reference.cell(spec, inputs, *others)
        if out.requires_grad:
            out.register_hook(lambda gradient: seen.append((torch.is_autocast_enabled("cpu"), gradient.dtype)))
        return out, statistics

    plant("watched", cell=cell)
    without_dilated = ["sep_conv_3x3,max_pool_3x3", "skip_connect"]  # whose gradients this library gets wrong in bf16
    model, images, gates = step_arguments("watched", subsets=[path.split(",") for path in without_dilated])
    verify_step(model, images, gates, "bf16", 0)
    assert set(seen) == {(False, torch.bfloat16)}


# --- search --verify-every


def test_a_verified_search_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    steps = []

    def counted(model, images, gates, amp, step):
        steps.append(step)
        verify_step(model, images, gates, amp, step)

    monkeypatch.setattr("fpdarts.search.verify_step", counted)
    search(SearchConfig(out=str(tmp_path / "plain"), **TINY))
    assert not steps
    search(SearchConfig(out=str(tmp_path / "verified"), verify_every=2, **TINY))
    assert steps == [0, 2]

    assert_same("checkpoint", load_checkpoint(tmp_path / "plain"), load_checkpoint(tmp_path / "verified"))


def test_a_search_stops_at_the_first_verified_step_that_is_wrong(plant, tmp_path, capsys):
    calls = []

    def cell(*arguments):
        calls.append(arguments)
        out, statistics = reference.cell(*arguments)
        return out * (1.01 if len(calls) > 20 else 1), statistics  # a few steps are right

    plant("native", cell=cell)
    tiny = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", value)]
    arguments = ["search", "--out", tmp_path / "r", *tiny, "--device", "cpu"]
    status, _, err = run(capsys, *arguments, "--kernels", "native", "--verify-every", "1")
    last = err.splitlines()[-1]
    assert status == 1 and last.startswith("error: step ") and "out is off by 1.0e-02" in last
    assert "(kernels native against reference)" in last and "--kernels reference, --resume" in last
    assert not last.startswith("error: step 0:")
    # and so it goes on
    resumed = ["search", "--out", tmp_path / "r", "--resume", "--kernels", "reference", "--verify-every", "0"]
    assert run(capsys, *resumed)[0] == 0


def test_a_search_that_diverges_is_not_blamed_on_the_kernels(tmp_path):
    with pytest.raises(NonFiniteLoss):
        search(SearchConfig(out=str(tmp_path / "r"), verify_every=1, learning_rate=1e30, **TINY))


def test_verify_every_is_not_negative():
    with pytest.raises(ValueError, match="--verify-every must be at least 0, not -1"):
        resolved(SearchConfig(verify_every=-1), "digits")
