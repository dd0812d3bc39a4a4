"""Training on several devices: the numbers are those of one process."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.scripts.conftest import ROOT, SMALL, THIN, log_of
from tests.scripts.processes import Processes, free_port
from utils.checkpoint import load_checkpoint

# At a usual rate rounding grows from step to step: ReLUs switch, and weights are random yet.
SLOW = ("--learning-rate", 1e-5, "--num-steps", 3, "--save-pred-every", 1)


@pytest.mark.parametrize(
    ("counts", "more"),
    [
        ((1, 2, 3), ("--ohem", 0)),
        ((1, 3), ("--ohem-thres", 0.05, "--ohem-keep", 200)),
        ((1, 2), ("--accumulate", 2, "--batch-size", 12, "--checkpoint-activations")),
        ((1, 3), ("--ohem", 0, "--ccl")),
    ],
    ids=["plain", "mined", "accumulated", "category"],
)
def test_any_number_of_processes_has_the_same_losses(demo_data, tmp_path, counts, more):
    """Batches, augmentation, dropout, statistics, mining and ignored pixels are those of the whole batch."""
    logs = []
    for count in counts:
        folder = tmp_path / str(count)
        options = (
            "--data-dir",
            demo_data,
            *THIN,
            "--batch-size",
            6,
            *SLOW,
            "--num-steps",
            2,
            *more,
        )
        Processes(folder, "train.py", *options, "--snapshot-dir", folder / "run", count=count).succeed()
        logs.append(log_of(folder / "run"))
    for one, *others in zip(*logs, strict=True):
        for other in others:
            for name in (name for name in one if name.startswith("loss")):
                # Class means of few pixels are more sensitive to what rounding did to the weights.
                tolerance = 1e-4 if "ccl" in name and one["step"] > 1 else 1e-5
                assert other[name] == pytest.approx(one[name], rel=tolerance), (name, one["step"])
            assert other["kept_pixels"] == pytest.approx(one["kept_pixels"], abs=1e-3)
            assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    if "--ohem-keep" in more:
        assert logs[0][0]["kept_pixels"] < 0.9
    assert len({line["loss"] for line in logs[0]}) == len(logs[0])


def test_two_machines(demo_data, tmp_path):
    """torchrun's own rendezvous, a launcher for each machine; here both are on the loopback."""
    port = free_port()
    options = (
        "--data-dir",
        demo_data,
        *SMALL,
        "--batch-size",
        2,
        "--num-steps",
        2,
        "--snapshot-dir",
        tmp_path,
    )
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *(str(ROOT / "train.py"), *map(str, options)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    outputs = [launcher.communicate(timeout=120) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    first, second = (out for out, _ in outputs)
    assert "device    CPU in each of 2 processes; fp32" in first
    assert "norm      InPlaceABNSync; " in first
    assert "network   " not in second  # only the first process speaks
    checkpoint = load_checkpoint(tmp_path / "CS_scenes_2.pth")
    assert not any(name.startswith("module.") for name in checkpoint["model"])
    assert len(checkpoint["random_states"]) == 2
    assert not torch.equal(*(state["torch"] for state in checkpoint["random_states"]))


def test_going_on_with_another_number_of_processes(demo_data, tmp_path):
    options = ("--data-dir", demo_data, *THIN, "--batch-size", 2, *SLOW)
    Processes(tmp_path, "train.py", *options, "--snapshot-dir", tmp_path / "one").succeed()
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "CS_scenes_2.pth", tmp_path / "two")
    run = Processes(tmp_path, "train.py", *options, "--snapshot-dir", tmp_path / "two", "--resume", count=2)
    run.succeed()
    assert "processes 1 → 2: the same numbers up to rounding" in run.out()
    assert "not the same run" not in run.out()
    one, two = log_of(tmp_path / "one")[2:], log_of(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "statuses", "message"),
    [
        (("--batch-size", 5), [2, 2], "--batch-size 5 cannot be split over 2 processes"),
        (
            ("--batch-size", 6, "--accumulate", 2),
            [2, 2],
            "--batch-size 6 cannot be split into 2 parts over 2 processes",
        ),
        # Devices are looked for when the processes have joined: the first that lacks one tells the others.
        (("--gpu", "0,1"), [2, 1], "--gpu 0,1: under torchrun each process takes its own GPU"),
    ],
)
def test_usage(demo_data, tmp_path, arguments, statuses, message):
    options = ("--data-dir", demo_data, *THIN[:-4], *arguments, "--snapshot-dir", tmp_path / "run")
    run = Processes(tmp_path, "train.py", *options, count=2)
    assert run.wait() == statuses
    assert message in run.error()
