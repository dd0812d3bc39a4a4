"""The commands of the README, in a copy of the project, with the environment that the tests run in."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import train
from tests.scripts.conftest import ROOT


@pytest.fixture
def project(tmp_path):
    """A copy without environments, data and results, and a function that runs a command in it."""
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns(".*", "data", "snapshots", "results", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, copy, ignore=ignored)

    def run(*command, **variables):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    run.folder = copy
    return run


def test_demo(project):
    small = {"DEMO_STEPS": "1", "DEMO_SIZE": "64,128"}
    result = project("project/run_local.sh", **small)
    assert result.returncode == 0, result.stderr
    assert f"environment: {Path(sys.executable).parent}" in result.stdout
    assert "mIoU" in result.stdout
    assert len(list((project.folder / "results/demo/panels").iterdir())) == 12
    assert json.loads((project.folder / "results/demo/metrics.json").read_text())["settings"]["step"] == 1
    again = project("project/run_local.sh", **small)
    assert again.returncode == 0
    assert "the run is complete" in again.stdout


def test_published_recipe_on_tiny_data(project, demo_data):
    small = ("--backbone", "resnet18", "--input-size", "65,65", "--num-steps", "1", "--batch-size", "2")
    result = project("project/run_local.sh", demo_data, *small, BACKBONE="none")
    assert result.returncode == 0, result.stderr
    settings = json.loads((project.folder / "results/cityscapes/metrics.json").read_text())["settings"]
    assert (settings["recurrence"], settings["whole"], settings["step"]) == (2, False, 1)


def test_published_recipe_needs_its_backbone(project, demo_data):
    result = project("project/run_local.sh", demo_data)
    assert result.returncode == 1
    assert "no resnet101-imagenet.pth here: the recipe starts from ImageNet weights" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--batch-size", "4"), 2, "expected the path of a Cityscapes folder, got --batch-size"),
        (("nowhere",), 1, "nowhere: no such data folder"),
        ((".", "--snapshot-dir", "x"), 2, "--snapshot-dir is set here"),
    ],
)
def test_mistakes_are_met_before_anything_is_installed(project, arguments, status, message):
    result = project("project/run_local.sh", *arguments)
    assert result.returncode == status
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_help(project):
    result = project("project/run_local.sh", "--help")
    assert result.returncode == 0
    assert "BACKBONE=resnet101-imagenet.pth" in result.stdout


def test_an_environment_that_lacks_something_is_not_taken():
    def status(extra):
        script = f"source ./environment.sh; satisfies {sys.executable} {extra}"
        return subprocess.run(["bash", "-c", script], cwd=ROOT).returncode

    assert status("test") == 0
    assert status("nosuchextra") != 0


def documented_commands():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/training.md"))
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("for ", "done", "#"))]


@pytest.mark.parametrize("line", documented_commands())
def test_every_documented_command_is_understood(line):
    words = shlex.split(line.replace("$seed", "1"), comments=True)
    if words[:2] == ["pip", "install"]:  # the build has tests of its own
        assert words[2:] == ["-e", "."]
        return
    script = next(word for word in words if word.endswith((".sh", ".py")) or word == "-m")
    arguments = words[words.index(script) + 1 :]
    if script == "train.py":
        train.parse_args(None, arguments)
    elif script == "evaluate.py":
        evaluate.parse_options(evaluate.EvaluationOptions, None, arguments)
    else:
        assert script == "-m" or (ROOT / script).is_file()
