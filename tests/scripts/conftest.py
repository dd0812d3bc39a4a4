"""Running the scripts as users do."""

import json
import runpy
import sys
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch

from dataset import LabelTable
from networks import build_model
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


# What predict.py is given

TABLE = LabelTable(("road", "tree", "sky"), (7, 21, 23), ((128, 64, 128), (107, 142, 35), (70, 130, 180)))


def save_checkpoint(path, **changes):
    torch.manual_seed(1)
    settings = {"num_classes": 3, "backbone": "resnet18", "recurrence": changes.get("recurrence", 2)}
    network = build_model(**settings)
    network.head.cca.gamma.data.fill_(0.5)
    network.head.classifier.weight.data.normal_()
    contents = {
        "model": network.state_dict(),
        "network": settings,
        "recipe": {"input_size": (33, 41), "clip": changes.get("clip", 1)},
        "data": {"names": TABLE.names, "ids": TABLE.ids, "palette": TABLE.palette},
    }
    torch.save(contents, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "x_1.pth")


@pytest.fixture
def predict(call, checkpoint, tmp_path):
    """Run predict.py; results go to ``tmp_path/out``."""

    def run(*arguments, restore_from=checkpoint, output_dir=tmp_path / "out"):
        fixed = ("--restore-from", restore_from, "--output-dir", output_dir, "--gpu", "cpu", "--amp", "off")
        return call("predict.py", *fixed, "--input", *arguments)

    return run


def random_picture(*size, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_video(path, frames, rate=12.5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
