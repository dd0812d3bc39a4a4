"""Running the scripts as users do."""

import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The smallest real network on the smallest crops.
SMALL = ("--backbone", "resnet18", "--input-size", "33,41", "--gpu", "cpu", "--num-workers", "0")


class Result(NamedTuple):
    status: int
    out: str
    error: str


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
    sys.argv = ["train.py", "--data-dir", str(demo_data), "--snapshot-dir", str(folder), *SMALL]
    sys.argv += ["--batch-size", "2", "--num-steps", "2"]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return folder / "CS_scenes_2.pth"
