"""docs/extending.md: its files, as they stand there, add a head, a data set and a loss from outside."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DATASETS
from networks import HEADS
from tests.scripts.conftest import log_of
from tests.scripts.processes import ROOT
from training.criterion import CRITERIA
from utils.checkpoint import load_checkpoint

BLOCKS = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the files of the page and a data set for them; nothing of it stays registered."""
    before = [(registry, dict(registry)) for registry in (HEADS, DATASETS, CRITERIA)]
    for name, code in BLOCKS:
        (tmp_path / name).write_text(code)
    for split in ("train", "val"):
        for kind in ("pictures", "masks"):
            (tmp_path / "coins" / kind / split).mkdir(parents=True)
        for index in range(4):
            mask = np.zeros((40, 50), np.uint8)
            mask[10 + index : 25, 5:30] = 1
            picture = np.stack([200 * mask + 20] * 3, axis=2)
            Image.fromarray(picture).save(tmp_path / "coins" / "pictures" / split / f"{index}.png")
            Image.fromarray(mask).save(tmp_path / "coins" / "masks" / split / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for registry, entries in before:
        registry.clear()
        registry.update(entries)
    for name, _ in BLOCKS:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_each_file_is_short():
    assert {name for name, _ in BLOCKS} == {"my_head.py", "my_data.py", "my_loss.py", "my_run.py"}
    for name, code in BLOCKS:
        assert code.count("\n") < 40, name


def test_they_train_and_evaluate(call, project):
    options = (
        "--recipe",
        "my_run:RECIPE",
        "--data-dir",
        project / "coins",
        "--gpu",
        "cpu",
        "--num-workers",
        "0",
    )
    result = call("train.py", *options)
    assert result.status == 0, result.error
    assert "data      coins, 4 images" in result.out
    assert "global_mean on resnet18" in result.out
    (line,) = log_of(project / "snapshots")
    assert line["loss"] == pytest.approx(
        line["loss_head"] + 0.4 * line["loss_aux"] + 1e-3 * line["loss_features"], rel=1e-5
    )
    assert line["loss_features"] > 0
    checkpoint = load_checkpoint(project / "snapshots" / "coins_2.pth")
    assert checkpoint["network"]["model"] == "global_mean"
    assert checkpoint["data"]["names"] == ("table", "coin")
    result = call(
        "evaluate.py", *options, "--restore-from", project / "snapshots", "--output-dir", project / "r"
    )
    assert result.status == 0, result.error
    assert "coin" in result.out
    used = ("--recipe", "my_run:RECIPE", "--restore-from", project / "snapshots")
    picture = project / "coins" / "pictures" / "val" / "0.png"
    result = call("predict.py", *used, "--input", picture, "--output-dir", project / "p", "--gpu", "cpu")
    assert result.status == 0, result.error
    assert (project / "p" / "ids" / "0.png").is_file()
    result = call("export.py", *used, "--output", project / "coins.pt2")
    assert result.status == 0, result.error


def test_a_head_that_is_not_registered_is_told(call, project):
    (project / "snapshots").mkdir()
    torch.save({"model": {"x": torch.zeros(1)}, "network": {"model": "global_mean"}}, "snapshots/coins_2.pth")
    picture = project / "coins" / "pictures" / "val" / "0.png"
    result = call("predict.py", "--restore-from", "snapshots", "--input", picture, "--output-dir", "p")
    assert result.status == 1
    assert "got 'global_mean'" in result.error
    assert "a file of yours that adds it is named by --recipe module:NAME" in result.error
