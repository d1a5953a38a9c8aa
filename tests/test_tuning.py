"""Block shapes: rules, what was timed in their place, and compiled kernels that travel."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fpdarts.kernels.triton import timed, tuning

from benchmarks import aot, gpu, precompile, tune

RULE = "rows_forward", 8, 32, 32, "ieee", 2


def test_every_launch_of_a_search_has_the_options_of_its_rule():
    launches = list(aot.searched("cifar", torch.bfloat16, aot.Options(partial=(2,))))
    kernels = set()
    for launch, _ in tune.distinct(launches).values():
        rule, *arguments = tune.rule_of(launch)
        options = getattr(tuning, rule)(*arguments)
        assert options and options.items() <= launch.arguments.items(), (launch.kernel.fn.__name__, rule, arguments)
        known = {parameter.name for parameter in launch.kernel.params} | {"num_warps", "num_stages", "maxnreg"}
        kernels.add(launch.kernel.fn.__name__)
        for variant in (launch, *tune.variants(launch)):
            assert variant.arguments.keys() <= known, "the interpreter ignores what a GPU refuses"
            assert tune.choice(variant), "all that is tried is told of each"
    assert kernels == set(tune.CANDIDATES)


@pytest.mark.parametrize("step", aot.STEPS)
def test_kernels_use_only_what_triton_compiles(step):
    """The interpreter takes any function of Python; the compiler refuses it where it makes a kernel's key."""
    for launch in aot.STEPS[step]("cifar", torch.float32, aot.Options(partial=(2,))):
        assert launch.kernel.cache_key


def test_what_was_timed_comes_before_the_rule(monkeypatch):
    ruled = tuning.rows_forward(*RULE[1:])
    monkeypatch.setitem(timed.TIMED, RULE, {"TALL": 2, "maxnreg": None})
    assert tuning.rows_forward(*RULE[1:]) == {name: v for name, v in ruled.items() if name != "maxnreg"} | {"TALL": 2}
    assert tuning.rows_forward(8, 8, 32, "ieee", 2)["TALL"] != 2
    with aot.compiling_for(80, -80):
        assert tuning.rows_forward(*RULE[1:]) == ruled, "it was timed on another chip"


def test_sums_of_many_rows_stay_out_of_tensor_memory():
    """Of 64 rows by 4 or 8 warps the compiler would put them there, where most have no room."""
    for chip in (90, 100):
        with aot.compiling_for(chip, -chip):
            launches = list(aot.searched("cifar", torch.bfloat16, aot.Options(partial=(2,))))
        found = [launch.arguments for launch in launches if launch.kernel.fn.__name__.startswith("rows_")]
        large = [given for given in found if given["num_warps"] >= 4 and _rows_of_product(given) >= 64]
        assert bool(large) == (chip == 90)


def _rows_of_product(given) -> int:
    return given["WIDE"] if "DISTANCE" in given else given["BLOCK"]  # of gradients of weights, or else


def test_the_fastest_is_chosen_for_all_launches_of_a_rule():
    two, four = {"num_warps": 2}, {"num_warps": 4}
    found = {
        RULE: [(3.0, 4.0, {"TALL": 4}), (2.0, 4.0, {"TALL": 8}), (1.0, 4.0, {"TALL": 4})],  # 8 is for one of them only
        ("pooling", 8, 2): [(1.0, 2.0, two), (3.0, 2.0, four), (5.0, 2.0, two), (0.5, 2.0, four)],
        ("normalize_backward", 8, 2): [(1.99, 2.0, two)],  # not worth it
    }
    chosen, gained = tune.fastest(found)
    assert chosen == {RULE: {"TALL": 4, "maxnreg": None}, ("pooling", 8, 2): four}
    assert gained == pytest.approx(4 + 0.5)


def test_a_fault_ends_the_tuning_with_what_was_timed_and_changes_nothing(monkeypatch):
    def seconds(launch, device, rounds):
        if launch == "faulty":
            raise RuntimeError("an illegal memory access was encountered")
        return 1.0 if launch == "as it is" else 0.5

    case = SimpleNamespace(step=lambda i: None)
    monkeypatch.setattr("benchmarks.cases.build", lambda *given: case)
    monkeypatch.setattr(tune, "distinct", lambda launches: {"a launch": ["as it is", 1], "another": ["as it is", 1]})
    monkeypatch.setattr(tune, "variants", lambda launch: ["fast", "faulty", "fast"])
    monkeypatch.setattr(tune, "choice", lambda launch: {"num_warps": launch})
    monkeypatch.setattr(tune, "rule_of", lambda launch: RULE)
    monkeypatch.setattr(tune, "_seconds", seconds)
    for goes_on, launches in ((True, 2), (False, 0)):
        monkeypatch.setattr(tune, "_goes_on", lambda device, goes_on=goes_on: goes_on)
        result, table = tune.tune("cpu"), {}
        exec(result["timed"], table)
        assert len(result["rows"]) == launches and ("stopped" in result) != goes_on
        assert (RULE in table["TIMED"]) == goes_on
    assert result["stopped"].startswith("a launch: num_warps=faulty: an illegal memory access")


@pytest.mark.parametrize(
    "code, passed, kept", [(0, True, True), (0, False, False), (1, None, False), ("timed out", None, True)]
)
def test_what_was_tuned_is_taken_back_unless_the_check_passes_with_it(tmp_path, monkeypatch, code, passed, kept):
    monkeypatch.setattr(gpu, "TIMED", tmp_path / "kernels.py")
    gpu.TIMED.write_text("tuned")
    (tmp_path / gpu.BEFORE).write_text("before")
    if passed is not None:
        (tmp_path / "check-tuned.json").write_text(json.dumps({"passed": passed}))
    gpu._take_back(tmp_path, code)
    assert gpu.TIMED.read_text() == ("tuned" if kept else "before")


def test_the_table_is_written_as_it_is_read():
    table = {RULE: {"BLOCK": 32, "maxnreg": None}, ("node", 8, 2, 2): {"BLOCK": 16}}
    found = {}
    exec(tune.written(table, 100), found)
    assert found["TIMED"] == table and found["CHIP"] == 100
    assert tune.written(timed.TIMED, timed.CHIP).partition("TIMED")[0] == tune.written(table, 90).partition("TIMED")[0]


def test_compiled_kernels_travel(tmp_path):
    there, file, here = tmp_path / "there", tmp_path / "compiled.tar.xz", tmp_path / "here"
    (there / "KEY").mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.source"):
        (there / "KEY" / name).write_text(name)
    paths = {name: str(there / "KEY" / name) for name in ("k.cubin", "k.json", "k.source")}
    (there / "KEY" / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    (there / "OLD").mkdir()
    (there / "OLD" / "k.cubin").write_text("of another checkout")
    precompile.pack(there, {there / "KEY"}, file)
    precompile.unpack(file, here)
    assert not (here / "OLD").exists()
    found = json.loads((here / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert found["k.cubin"] == str(here / "KEY" / "k.cubin")
    assert sorted(path.name for path in (here / "KEY").iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    (here / "KEY" / "k.cubin").write_text("compiled since")
    precompile.unpack(file, here)
    assert (here / "KEY" / "k.cubin").read_text() == "compiled since"
