"""Running the scripts as users do."""

import json
import runpy
import sys
from typing import NamedTuple

import pytest
import torch

from tests.scripts.processes import ROOT

TINY = ("--input-size", "33,41", "--gpu", "cpu", "--num-workers", "0")
# The smallest real network on the smallest crops, and one that only tests have.
SMALL = ("--backbone", "resnet18", *TINY)
THIN = ("--backbone", "thin", *TINY)


class Result(NamedTuple):
    status: int
    out: str
    error: str


def log_of(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def scores_of(call, data, checkpoint, output):
    """What evaluate.py writes of a checkpoint."""
    options = ("--restore-from", checkpoint, "--output-dir", output, "--gpu", "cpu")
    result = call("evaluate.py", "--data-dir", data, *options)
    assert result.status == 0, result.error
    return json.loads((output / "metrics.json").read_text())


def same_tensors(left, right):
    """Whether two state dicts have the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script in this process, as ``python script.py …`` does but without starting a new Python."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(demo_data, tmp_path_factory):
    """The checkpoint of a network that saw two batches."""
    folder = tmp_path_factory.mktemp("trained")
    argv = sys.argv
    sys.argv = ["train.py", "--data-dir", str(demo_data), "--snapshot-dir", str(folder), *THIN]
    sys.argv += ["--batch-size", "2", "--num-steps", "2"]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return folder / "CS_scenes_2.pth"
