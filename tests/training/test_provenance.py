"""run.json."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from training.options import RunOptions
from training.provenance import describe, git_commit, write_run_file
from training.recipes import Recipe


def test_what_is_described(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir", "a b"])
    start = json.loads(json.dumps(describe(Recipe(batch_size=4), RunOptions(data_dir=Path("a b")))))
    assert start["command"] == "python train.py --data-dir 'a b'"
    assert start["settings"]["batch_size"] == 4
    assert start["settings"]["data_dir"] == "a b"
    assert start["settings"]["recurrence"] == 2
    assert start["versions"]["torch"] == torch.__version__
    assert start["machine"]["gpus"] == [] or torch.cuda.is_available()


def test_the_commit(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(("git", "-C", tmp_path, *identity, *arguments), check=True, capture_output=True)
        return done.stdout.decode().strip()

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-m", "x")
    assert git_commit(tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "x").write_text("2")
    assert git_commit(tmp_path)["modified"]


def test_starts_are_collected(tmp_path):
    path = tmp_path / "run.json"
    write_run_file(path, {"first_step": 0}, continues=False)
    write_run_file(path, {"first_step": 5}, continues=True)
    write_run_file(path, {"first_step": 9}, continues=True)
    assert json.loads(path.read_text()) == {
        "first_step": 0,
        "continued": [{"first_step": 5}, {"first_step": 9}],
    }
    write_run_file(path, {"first_step": 0}, continues=False)  # a new run
    assert json.loads(path.read_text()) == {"first_step": 0}
    path.write_text(path.read_text()[:5])  # cut short by a kill
    write_run_file(path, {"first_step": 2}, continues=True)
    assert json.loads(path.read_text()) == {"first_step": 2}
    path.write_text("[1]")  # of something else
    write_run_file(path, {"first_step": 3}, continues=True)
    assert json.loads(path.read_text()) == {"first_step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
