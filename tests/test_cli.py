"""The command, end to end on small parts of the digits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fpdarts import kernels
from fpdarts.cli import main
from fpdarts.run import load_checkpoint, read_metrics
from tests.command import run
from tests.same import assert_same

ROOT = Path(__file__).parent.parent
TINY = "--limit 120 --init-channels 4 --cells 3 --batch-size 30".split()
METRICS = "epoch train_loss train_accuracy learning_rate seconds images_per_second".split()


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "search"
    main(["search", "--out", str(out), "--epochs", "3", "--validate-every", "2", *TINY])
    return out


@pytest.fixture(scope="module")
def retrained(searched):
    out = searched.parent / "retrain"
    main(["retrain", "--genotype", str(searched), "--out", str(out), "--epochs", "2", "--holdout", "0.2", *TINY])
    return out


def test_help_waits_for_nothing_heavy():
    code = (
        "import sys\ntry:\n import fpdarts.cli as c; c.main(['--help'])\n"
        "finally: print(sorted({'torch', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[]"), done.stdout


def test_the_package_runs_from_an_uninstalled_checkout(tmp_path):
    # -I -S: neither site-packages' link to the checkout nor the current directory, only what is put on the path here
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import fpdarts.kernels.spec as s; print(s.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "kernels" / "spec.py"), done.stderr


def test_a_search_leaves_a_complete_run_directory(searched):
    names = {path.name for path in searched.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "genotype.json", "result.json", "checkpoints", "tensorboard"}
    config = json.loads((searched / "config.json").read_text())
    assert (
        config["command"] == "search"
        and config["protocol"] == "digits"
        and None not in (config["amp"], config["epochs"])
    )
    metrics = read_metrics(searched)
    assert [line["epoch"] for line in metrics] == [0, 1, 2]
    for line in metrics:
        assert all(line[name] is not None for name in METRICS)
        assert 0 <= line["train_accuracy"] <= 1
        assert len(line["alpha_normal"]) == len(line["beta_reduce"]) == 14
    assert [line["valid_loss"] is None for line in metrics] == [True, False, False]
    assert metrics[0]["alpha_normal"] != metrics[2]["alpha_normal"]
    assert list((searched / "tensorboard").iterdir())
    checkpoint = load_checkpoint(searched)
    assert checkpoint.keys() == {
        "epoch",
        "data",
        "random",
        "model",
        "weight_optimizer",
        "architecture_optimizer",
        "gates",
    }
    assert {"alpha_normal", "beta_reduce"} <= checkpoint["model"].keys()


def test_a_retraining_leaves_a_complete_run_directory(retrained, capsys):
    result = json.loads((retrained / "result.json").read_text())
    assert {"test_loss", "test_accuracy", "valid_accuracy", "parameters", "macs"} <= result.keys()
    assert result["kernels"] in kernels.BACKENDS
    assert all(line["valid_accuracy"] is not None for line in read_metrics(retrained))
    status, out, err = run(capsys, "evaluate", "--run", retrained, "--json")
    evaluated = json.loads(out)
    assert status == 0 and evaluated["images"] == 360 and "kernels: " in err
    assert evaluated["test_accuracy"] == result["test_accuracy"]
    status, out, _ = run(capsys, "evaluate", "--run", retrained, "--limit", "50", "--json")
    assert json.loads(out)["images"] == 50


def test_json_output_is_json_alone(tmp_path, capsys):
    status, out, err = run(capsys, "search", "--out", tmp_path / "r", "--epochs", "1", "--json", *TINY)
    result = json.loads(out)
    assert status == 0 and result["genotype"].keys() == {"normal", "normal_concat", "reduce", "reduce_concat"}
    assert "epoch 1/1" in err


@pytest.mark.parametrize(
    "options",
    [["--unrolled"], ["--gates", "fixed"], ["--gates", "both"], ["--partial", "4"],
     ["--weighting", "softmax"], ["--kernels", "reference"],
     ["--nodes", "2", "--subsets", "sep_conv_3x3,none,skip_connect"]],
    ids=" ".join,
)  # fmt: skip
def test_options_of_a_search_have_their_effect(searched, tmp_path, capsys, options):
    status, _, err = run(capsys, "search", "--out", tmp_path / "r", "--epochs", "3", *TINY, *options)
    assert status == 0, err
    loss = read_metrics(tmp_path / "r")[-1]["train_loss"]
    plain = read_metrics(searched)[-1]["train_loss"]
    if options[0] == "--kernels":
        assert json.loads((tmp_path / "r" / "result.json").read_text())["kernels"] == options[1]
    else:
        assert loss != plain
    if options == ["--gates", "fixed"]:
        assert "alphas stay untrained" in err


@pytest.mark.parametrize(
    "options",
    [["--drop-path", "0.3"], ["--label-smoothing", "0.1"], ["--weight-decay", "0.1"], ["--kernels", "reference"]],
    ids=" ".join,
)
def test_options_of_a_retraining_have_their_effect(retrained, searched, tmp_path, capsys, options):
    out = tmp_path / "r"
    assert (
        run(
            capsys,
            "retrain",
            "--genotype",
            searched,
            "--out",
            out,
            "--epochs",
            "2",
            "--holdout",
            "0.2",
            *TINY,
            *options,
        )[0]
        == 0
    )
    if options[0] == "--kernels":
        assert json.loads((out / "result.json").read_text())["kernels"] == options[1]
    else:
        assert read_metrics(out)[-1]["train_loss"] != read_metrics(retrained)[-1]["train_loss"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("search --data nowhere", "nowhere"),
        ("search --device cpu --kernels triton", "kernels 'triton' cannot run here: "),
        ("check-kernels --device cpu --kernels native --amp bf16", "kernels 'native' cannot run here: "),
        ("search --device cpu --amp bf16", "--amp bf16 trains on CUDA only"),
        ("search --device gpu", "--device gpu cannot be used here"),
        ("search --device meta", "--device meta cannot be used here"),
        ("search --epochs 0", "--epochs must be at least 1"),
        ("search --subsets sep_conv_9x9", "unknown operation 'sep_conv_9x9'; the operations are"),
        ("search --init-channels 5", "5 channels cannot be cut into 2"),
        ("search --limit 3", "limit of 3"),
        ("search --protocol imagenet", "digits"),
        ("search --resume", "--resume needs --out"),
        ("search --resume --out nowhere", "nowhere holds no run"),
        ("retrain --genotype DARTS_V9", "DARTS_V1"),
        ("retrain --device cpu --kernels triton --data nowhere", "kernels 'triton' cannot run here: "),
        ("retrain --auxiliary-weight 0.4", "auxiliary head meets a 2x2 map"),
        ("search --cells 2", "--cells must be at least 3"),
        ("retrain --cells 2", "at least 3 cells"),
        ("evaluate --run nowhere", "nowhere holds no run"),
        ("evaluate --run nowhere --batch-size 0", "--batch-size must be at least 1"),
        ("genotype show nowhere.json", "nowhere.json"),
        ("genotype draw DARTS_V1 --out cell.jpg", "svg"),
    ],
)
def test_errors_are_one_line_and_leave_no_run_behind(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments.split())
    assert status == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert not any(tmp_path.iterdir())


def test_a_run_into_anothers_directory_is_refused(searched, capsys):
    before = sorted(path.name for path in searched.iterdir())
    status, _, err = run(capsys, "search", "--out", searched, "--epochs", "1", *TINY)
    assert status == 1 and "never overwrites another" in err
    assert sorted(path.name for path in searched.iterdir()) == before


def test_a_diverging_search_stops_with_step_rate_and_checkpoint(tmp_path, capsys):
    status, _, err = run(capsys, "search", "--out", tmp_path / "r", "--epochs", "4", "--learning-rate", "1e30", *TINY)
    assert status == 1
    assert "not a number at step" in err and "learning rate 1e+30" in err and "there is no checkpoint yet" in err


@pytest.mark.parametrize("command", ["search", "retrain"])
def test_an_epoch_whose_last_step_diverges_leaves_no_checkpoint(tmp_path, capsys, command):
    options = "--limit 100 --init-channels 4 --cells 3 --batch-size 100 --epochs 1 --learning-rate 1e30".split()
    status, _, err = run(capsys, command, "--out", tmp_path / "r", *options)
    assert status == 1 and "is infinite or not a number after the epoch, learning rate 1e+30" in err
    if command == "search":  # a retraining without --holdout looks at its weights in the end only
        assert "there is no checkpoint yet" in err and not any((tmp_path / "r" / "checkpoints").iterdir())


def test_a_retraining_killed_before_it_saved_its_genotype_goes_on(retrained, tmp_path, capsys):
    (tmp_path / "config.json").write_text((retrained / "config.json").read_text())
    status, _, err = run(capsys, "retrain", "--resume", "--out", tmp_path)
    assert status == 0, err
    for name in ("genotype.json", "result.json"):
        ours, theirs = (json.loads((path / name).read_text()) for path in (tmp_path, retrained))
        assert {k: v for k, v in ours.items() if k not in ("run", "seconds")} == {
            k: v for k, v in theirs.items() if k not in ("run", "seconds")
        }


def test_a_finished_run_that_was_moved_is_read_only(retrained, tmp_path, capsys):
    for name in ("config.json", "metrics.jsonl", "result.json", "genotype.json"):
        (tmp_path / name).write_bytes((retrained / name).read_bytes())
    (tmp_path / "checkpoints").symlink_to(retrained / "checkpoints")
    status, out, err = run(capsys, "retrain", "--out", tmp_path, "--resume", "--json")
    assert status == 0 and json.loads(out)["run"] == str(tmp_path), err
    assert not (tmp_path / "tensorboard").exists()


def test_too_little_memory_is_one_line_and_other_failures_are_not_hidden(monkeypatch, capsys):
    def fails(error):
        def run_it(*_):
            raise error

        monkeypatch.setattr("fpdarts.cli._run", run_it)
        return run(capsys, "search")

    for error in (MemoryError("none left"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        status, _, err = fails(error)
        assert status == 1 and err.startswith("error: ") and "a smaller --batch-size" in err
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fails(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_reader_may_have_enough_of_the_output():
    command = f"{sys.executable} -m fpdarts genotype show DARTS_V1 --json | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


def test_resuming_a_finished_run_trains_and_tests_nothing(retrained, capsys):
    before = {path: path.stat().st_mtime_ns for path in retrained.glob("*.json*")}
    status, out, err = run(capsys, "retrain", "--out", retrained, "--resume", "--json")
    assert status == 0 and json.loads(out) == json.loads((retrained / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_resume_refuses_what_would_change_the_run(searched, capsys):
    status, _, err = run(capsys, "search", "--out", searched, "--resume", "--epochs", "9")
    assert status == 1 and "--epochs 9 would change the run" in err and "which has 3" in err


@pytest.mark.parametrize("command", ["search", "retrain"])
def test_killed_and_resumed_ends_bit_for_bit_the_same(command, tmp_path):
    epochs = 4
    arguments = [command, "--epochs", str(epochs), *TINY]
    if command == "retrain":
        arguments += ["--drop-path", "0.3", "--holdout", "0.2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    victim = subprocess.Popen(
        [sys.executable, "-m", "fpdarts", *arguments, "--out", killed], cwd=ROOT, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},  # sums in one order
    )  # fmt: skip
    while len(read_metrics(killed)) < 2 and victim.poll() is None:
        time.sleep(0.02)
    assert victim.poll() is None, "the run ended before it could be killed"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert len(read_metrics(killed)) < epochs
    main([*arguments, "--out", str(whole)])
    main([*arguments, "--out", str(killed), "--resume"])

    ours, theirs = load_checkpoint(killed), load_checkpoint(whole)
    assert ours["epoch"] == theirs["epoch"] == epochs - 1

    assert_same(
        "checkpoint",
        {k: v for k, v in ours.items() if k != "random"},
        {k: v for k, v in theirs.items() if k != "random"},
    )
    assert torch.equal(ours["random"]["torch"], theirs["random"]["torch"])
    assert (killed / "genotype.json").read_text() == (whole / "genotype.json").read_text()
    timing = {"seconds", "images_per_second"}
    for a, b in zip(read_metrics(killed), read_metrics(whole), strict=True):
        assert_same(
            "metrics", {k: v for k, v in a.items() if k not in timing}, {k: v for k, v in b.items() if k not in timing}
        )


def write_images(folder, size, per_class):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(per_class):
                pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / part / label / f"{i}.jpg")
    return folder


@pytest.mark.parametrize(
    "size, protocol, options",
    [((32, 32), "cifar", []), ((80, 70), "imagenet", ["--image-size", "64", "--workers", "0"])],
    ids=["cifar", "imagenet"],
)
def test_image_folders_are_searched_and_retrained(tmp_path, capsys, size, protocol, options):
    data = write_images(tmp_path / "data", size, 8)
    small = "--init-channels 4 --cells 3 --batch-size 8 --epochs 2".split() + options
    halves = ["--weight-fraction", "0.5", "--architecture-fraction", "0.5"]
    status, _, err = run(capsys, "search", "--data", data, "--out", tmp_path / "s", *small, *halves)
    assert status == 0, err
    metrics = read_metrics(tmp_path / "s")[-1]
    assert ("valid_top5_accuracy" in metrics) == (protocol == "imagenet")
    auxiliary = [] if protocol == "cifar" else ["--auxiliary-weight", "0"]  # its head needs 224 pixels
    status, _, err = run(
        capsys, "retrain", "--data", data, "--genotype", tmp_path / "s", "--out", tmp_path / "t", *small, *auxiliary
    )
    assert status == 0, err
    result = json.loads((tmp_path / "t" / "result.json").read_text())
    assert ("test_top5_accuracy" in result) == (protocol == "imagenet")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["protocol"] == protocol

    (data / "train" / "cat" / "0.jpg").unlink()
    status, _, err = run(capsys, "search", "--data", data, "--out", tmp_path / "s", "--resume")
    assert status == 1 and "is not the data that the run" in err
    for part in ("train", "val"):
        (data / part / "dog").rename(data / part / "wolf")
    status, _, err = run(capsys, "evaluate", "--run", tmp_path / "t")
    assert status == 1 and "has other classes" in err and "cat, dog" in err


def test_ci_runs_the_readmes_second_command():
    readme = (ROOT / "README.md").read_text()
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert f"    {command}\n" in readme


def test_genotype_commands(tmp_path, capsys):
    counted = run(
        capsys,
        "genotype",
        "count",
        "PC_DARTS_image",
        "--stem",
        "imagenet",
        "--init-channels",
        "48",
        "--cells",
        "14",
        "--json",
    )
    assert json.loads(counted[1]) == {"parameters": 5342464, "macs": 581627328}
    shown = json.loads(run(capsys, "genotype", "show", "DARTS_V2", "--json")[1])
    assert shown["normal_concat"] == [2, 3, 4, 5]
    text = tmp_path / "paper.txt"
    text.write_text(f"DARTS_V2 = Genotype(normal={[tuple(e) for e in shown['normal']]}, normal_concat=range(2, 6), "
                    f"reduce={[tuple(e) for e in shown['reduce']]}, reduce_concat=[2, 3, 4, 5])")  # fmt: skip
    assert run(capsys, "genotype", "import", text, "--out", tmp_path / "g.json")[0] == 0
    assert json.loads((tmp_path / "g.json").read_text()) == shown
    for suffix in ("svg", "png"):
        assert run(capsys, "genotype", "draw", tmp_path / "g.json", "--out", tmp_path / f"cell.{suffix}")[0] == 0
        assert (tmp_path / f"cell.{suffix}").stat().st_size > 5000


@pytest.mark.parametrize("finished", [False, True])
def test_another_genotype_than_was_trained_is_refused(retrained, tmp_path, capsys, finished):
    shutil.copytree(retrained, tmp_path / "r")
    genotype = json.loads((tmp_path / "r" / "genotype.json").read_text())
    first, second = genotype["normal"][:2]
    genotype["normal"][:2] = [[first[0], second[1]], [second[0], first[1]]]  # of the same weights
    (tmp_path / "r" / "genotype.json").write_text(json.dumps(genotype))
    command = ["evaluate", "--run", tmp_path / "r"] if finished else ["retrain", "--out", tmp_path / "r", "--resume"]
    if not finished:
        (tmp_path / "r" / "result.json").unlink()
    status, _, err = run(capsys, *command)
    assert status == 1 and "is of another genotype than its genotype.json; restore that file" in err


def test_paths_begin_at_home_and_are_not_empty(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(capsys, "genotype", "draw", "DARTS_V1", "--out=~/cell.svg")[0] == 0
    assert (tmp_path / "cell.svg").is_file()
    status, _, err = run(capsys, "search", "--data", "~no such user/images", "--out", tmp_path / "r")
    assert status == 1 and "~no such user/images: does not exist" in err
    status, _, err = run(capsys, "search", "--out", "")
    assert status == 1 and "--out is empty; give a path, or leave it out" in err


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-"])
def test_streams_may_be_closed(closed):
    command = f"{sys.executable} -m fpdarts genotype show DARTS_V1 --json {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.fixture
def interrupts_arrive():
    """Shells have what they start in the background ignore Ctrl-C, and Python then does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_in_a_callback_comes_again(monkeypatch, capsys, interrupts_arrive):
    class Interrupting:
        def __del__(self):
            raise KeyboardInterrupt

    def interrupted(*_):
        Interrupting()
        for _ in range(500):
            time.sleep(0.01)
        raise AssertionError("the interrupt was lost")

    monkeypatch.setattr("fpdarts.cli._run", interrupted)
    status, _, err = run(capsys, "genotype", "show", "DARTS_V1")
    assert status == 130 and "interrupted" in err


@pytest.mark.parametrize(
    "arguments", ["search --unrolled-step-size 0.5", "retrain --validate-every 3"], ids=["search", "retrain"]
)
def test_an_option_that_does_nothing_is_refused(capsys, arguments):
    status, _, err = run(capsys, *arguments.split())
    assert status == 1 and "does nothing without --" in err
