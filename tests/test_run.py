import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpdarts import files
from fpdarts import run as runs
from fpdarts.config import SearchConfig
from fpdarts.errors import RunError
from fpdarts.run import Run


def test_a_directory_that_holds_anything_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="never overwrites another.*--out.*--resume"):
        Run.create(tmp_path, "search", {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", "search", {})
    run.write_json("result.json", {"a": 1})
    with pytest.raises(TypeError):
        run.write_json("result.json", {"a": object()})

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        run.write_json("result.json", {"a": 2})
    assert json.loads((run.path / "result.json").read_text()) == {"a": 1}
    assert not list(run.path.glob(".*.partial")), "a temporary file was left behind"


def test_links_and_what_is_no_file_stay(tmp_path):
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        with files.replacing(tmp_path / name) as file:
            file.write(b"text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 9) == b"text"
    os.close(reader)


def written(path, epochs):
    run = Run.create(path, "search", {"x": 1})
    for epoch in range(epochs):
        run.write_epoch({"epoch": epoch, "train_loss": 1.0, "valid_loss": None})
    return run


def test_the_newest_checkpoint_and_the_one_before_are_kept(tmp_path):
    run = written(tmp_path / "run", 4)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["epoch-0002.pt", "epoch-0003.pt"]
    assert runs.load_checkpoint(run.path)["epoch"] == 3


def test_an_unreadable_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    run = written(tmp_path / "run", 3)
    newest = runs.newest_checkpoint(run.path)
    newest.write_bytes(newest.read_bytes()[:100])
    resumed, checkpoint = Run.resume(run.path)
    assert checkpoint["epoch"] == 1
    assert [line["epoch"] for line in resumed.metrics] == [0, 1]
    assert f"{newest} cannot be read" in capsys.readouterr().err
    resumed.write_epoch({"epoch": 2})
    assert [line["epoch"] for line in runs.read_metrics(run.path)] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["text", "a bit", "another file"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    run = written(tmp_path / "run", 2)
    newest = runs.newest_checkpoint(run.path)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # in the random numbers' state, which PyTorch would read without a word
    if damage == "another file":
        torch.save([1, 2], newest)
    else:
        newest.write_bytes(b"hello world" if damage == "text" else content)
    assert runs.load_checkpoint(run.path)["epoch"] == 0
    assert f"{newest} cannot be read" in capsys.readouterr().err
    for file in (run.path / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(RunError, match="none of the checkpoints in .* can be read; restore one"):
        runs.load_checkpoint(run.path)


def test_a_checkpoint_of_something_else_is_refused():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(RunError, match="the checkpoint of out has another model than its config.json"):
        runs.restore(model, {"model": torch.nn.Linear(3, 3).state_dict()}, "model", "out")
    with pytest.raises(RunError, match="another model"):
        runs.restore(model, {}, "model", "out")


@pytest.mark.parametrize("line", ["null", "{", "{}", "3", '{"epoch": 7}', '{"epoch": 1, "seconds": "3"}'])
def test_a_line_without_metrics_is_named(tmp_path, line):
    run = written(tmp_path / "run", 1)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match="metrics.jsonl: line 2 is not of epoch 1"):
        runs.read_metrics(run.path)


def test_a_start_that_was_killed_leaves_no_dead_end(tmp_path):
    (tmp_path / ".config.json.partial").write_text("{")
    Run.create(tmp_path, "search", {})


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    run = written(tmp_path / "run", 1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*result.json"):
        run.write_json("result.json", {})


def test_lost_metrics_are_an_error(tmp_path):
    run = written(tmp_path / "run", 3)
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="metrics.jsonl has 0 epochs, the checkpoint 3"):
        Run.resume(run.path)


def test_lost_checkpoints_are_an_error(tmp_path):
    run = written(tmp_path / "run", 3)
    for file in (run.path / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(RunError, match="has metrics of 3 epochs, but no checkpoint"):
        Run.resume(run.path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json is missing"),
        ("{", "config.json is not JSON"),
        ("[1]", "config.json holds no JSON object"),
        ('{"command": "retrain"}', "the directory of another command.s run; give one of search"),
        ('{"command": "search", "version": "9", "warp": 1}', "fpdarts 9 wrote: warp is no option of this version"),
        ('{"command": "search", "epochs": "two"}', "'two' is no value of epochs"),
        ('{"command": "search", "gates": "ajar"}', "'ajar' is no value of gates"),
    ],
)
def test_wrong_run_directories_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=message):
        runs.read_config(tmp_path, SearchConfig)


def test_random_states_come_back(tmp_path):
    import random

    run = written(tmp_path / "run", 1)
    expected = torch.rand(3), random.random()
    torch.rand(5), random.random()
    runs.restore_random_state(runs.load_checkpoint(run.path)["random"])
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_metrics_are_json_even_where_a_loss_is_none(tmp_path):
    run = written(tmp_path / "run", 1)
    run.write_epoch({"epoch": 1, "train_loss": 1.0, "valid_loss": float("inf")})
    assert runs.read_metrics(run.path)[1]["valid_loss"] is None


def test_two_processes_do_not_share_a_run(tmp_path):
    run = written(tmp_path / "run", 1)
    code = "import sys, pathlib; from fpdarts.run import Run; Run(pathlib.Path(sys.argv[1]), [])._prepare_writing()"
    again = [sys.executable, "-c", code, str(run.path)]
    done = subprocess.run(again, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert f"another process is running in {tmp_path / 'run'}; wait for its end" in done.stderr


def test_where_a_file_can_be_written_is_known_before(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "new", "/dev/null"):
        files.require_writable(path)
    assert not (tmp_path / "new").exists()
    for path in (tmp_path / "folder", tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError, match=str(path)):
            files.require_writable(path)
