"""Training from the command line: what it writes, what it starts from, that it survives being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from libs import ABN
from networks import build_model
from tests.scripts.conftest import ROOT, SMALL
from utils.checkpoint import load_checkpoint


def command(demo_data, folder, *more, launcher=()):
    options = ("--data-dir", demo_data, "--snapshot-dir", folder, *SMALL, "--batch-size", "2", *more)
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, options)]


def same_tensors(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["loss"] for line in log_of(folder)}


def test_what_a_run_leaves(call, demo_data, tmp_path):
    result = call(
        "train.py", "--data-dir", demo_data, "--snapshot-dir", tmp_path / "run", *SMALL,
        "--batch-size", 2, "--num-steps", 12, "--save-pred-every", 5, "--learning-rate", 0.02,
    )  # fmt: skip
    assert result.status == 0, result.error
    folder = tmp_path / "run"
    assert {p.name for p in folder.glob("*.pth")} == {f"CS_scenes_{step}.pth" for step in (5, 10, 12)}
    assert not list(folder.glob("*.tmp"))

    log = log_of(folder)
    assert [line["step"] for line in log] == [5, 10, 12]
    assert log[-1]["learning_rate"] == pytest.approx(0.02 * (1 - 11 / 12) ** 0.9)
    assert all(0 < line["loss"] < 10 for line in log)

    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 12]
    assert "image, label, prediction/0" in events.Tags()["images"]

    checkpoint = load_checkpoint(folder / "CS_scenes_12.pth")
    assert checkpoint["step"] == 12
    assert checkpoint["settings"]["input_size"] == (33, 41)
    assert checkpoint["model"].keys() == build_model(backbone="resnet18").state_dict().keys()
    moved = load_checkpoint(folder / "CS_scenes_5.pth")["model"]
    assert not same_tensors(checkpoint["model"], moved)


@pytest.fixture(scope="module")
def undisturbed(demo_data, tmp_path_factory):
    """The folder of a run of five steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = command(demo_data, folder, "--num-steps", 5, "--save-pred-every", 1)
    subprocess.run(run, check=True, capture_output=True)
    return folder


# When the process is killed: as soon as one of these files is there.
MOMENTS = {
    "while the first checkpoint is written": "CS_scenes_1.tmp",
    "while the third checkpoint is written": "CS_scenes_3.tmp",
    "within a step": "CS_scenes_2.pth",
    "before the first step": "events.out.tfevents.*",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_ends_with_the_same_bits(demo_data, tmp_path, undisturbed, moment):
    options = ("--num-steps", 5, "--save-pred-every", 1)
    process = subprocess.Popen(command(demo_data, tmp_path, *options), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(MOMENTS[moment])):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "CS_scenes_5.pth").exists()

    # The number of workers may differ; the run may not.
    resumed = command(demo_data, tmp_path, *options, "--resume", "--num-workers", 1)
    subprocess.run(resumed, check=True, capture_output=True)
    expected, got = (load_checkpoint(f / "CS_scenes_5.pth") for f in (undisturbed, tmp_path))
    assert same_tensors(got["model"], expected["model"])
    for index, state in expected["optimizer"]["state"].items():
        assert torch.equal(got["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])
    assert torch.equal(got["random_states"][0]["torch"], expected["random_states"][0]["torch"])
    assert losses(tmp_path) == losses(undisturbed)


def test_resuming_a_finished_run_and_changed_settings(call, demo_data, trained):
    options = ("--data-dir", demo_data, "--snapshot-dir", trained.parent, *SMALL, "--resume")
    result = call("train.py", *options, "--batch-size", 2, "--num-steps", 2)
    assert result.status == 0
    assert "the run is complete: all 2 steps are done" in result.out
    assert "settings changed" not in result.out
    result = call("train.py", *options, "--batch-size", 4, "--num-steps", 2)
    assert "these settings changed: batch_size 2 → 4" in result.out


def resumed(call, demo_data, trained, folder, *more, **change):
    """Resume a copy of the trained checkpoint, with some of its contents changed, for one more step."""
    folder.mkdir()
    torch.save(load_checkpoint(trained) | change, folder / "CS_scenes_2.pth")
    options = ("--data-dir", demo_data, "--snapshot-dir", folder, *SMALL, "--batch-size", 2)
    return call("train.py", *options, "--resume", "--num-steps", 3, *more)


def test_changed_settings_of_the_optimiser_hold(call, demo_data, trained, tmp_path):
    result = resumed(call, demo_data, trained, tmp_path / "a", "--weight-decay", 0.5, "--momentum", 0.1)
    assert result.status == 0, result.error
    assert "momentum 0.9 → 0.1, weight_decay 0.0001 → 0.5" in result.out
    (group,) = load_checkpoint(tmp_path / "a" / "CS_scenes_3.pth")["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.1, 0.5)
    assert resumed(call, demo_data, trained, tmp_path / "b").status == 0
    left, right = (load_checkpoint(tmp_path / x / "CS_scenes_3.pth")["model"] for x in "ab")
    assert not same_tensors(left, right)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "two"},
        {"settings": None},
        {"optimizer": {}},
        {"random_states": [{}]},
        {"random_states": None},
    ],
)
def test_a_damaged_checkpoint_is_not_resumed(call, demo_data, trained, tmp_path, change):
    result = resumed(call, demo_data, trained, tmp_path / "run", **change)
    assert result.status == 1
    assert "CS_scenes_2.pth: cannot be resumed, its contents are damaged" in result.error
    assert result.error.count("\n") == 1


def test_other_data_is_another_run(call, demo_data, trained, tmp_path):
    result = resumed(call, demo_data, trained, tmp_path / "run", "--split", "val")
    assert result.status == 1
    assert "CS_scenes_2.pth: was trained on other data (4 images, " in result.error


def test_a_branch_does_not_mix_with_later_checkpoints(call, demo_data, trained, tmp_path):
    (tmp_path / "CS_scenes_9.pth").touch()
    options = ("--data-dir", demo_data, "--snapshot-dir", tmp_path, *SMALL, "--resume", trained)
    result = call("train.py", *options, "--batch-size", 2, "--num-steps", 3)
    assert result.status == 1
    assert "holds CS_scenes_9.pth, which is later than step 2" in result.error


def test_an_earlier_run_is_not_overwritten(call, demo_data, trained):
    result = call("train.py", "--data-dir", demo_data, "--snapshot-dir", trained.parent, *SMALL)
    assert result.status == 1
    assert "holds CS_scenes_2.pth of an earlier run; continue it with --resume" in result.error


def start_from(call, demo_data, folder, weights, *more):
    return call(
        "train.py", "--data-dir", demo_data, "--snapshot-dir", folder, *SMALL, "--batch-size", 2,
        "--num-steps", 1, "--learning-rate", 1e-30, "--restore-from", weights, *more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["backbone", "checkpoint", "module."])
def test_starting_from_weights(call, demo_data, tmp_path, kind):
    state = build_model(backbone="resnet18").state_dict()
    if kind == "backbone":  # as MIT's ImageNet file: no heads, but a classifier
        state = {n: x for n, x in state.items() if not n.startswith(("head.", "dsn."))}
        state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    prefix = "module." if kind == "module." else ""
    torch.save({"state_dict": {prefix + n: x for n, x in state.items()}}, tmp_path / "weights.pth")
    result = start_from(call, demo_data, tmp_path / "run", tmp_path / "weights.pth")
    assert result.status == 0, result.error
    weights = load_checkpoint(tmp_path / "run" / "CS_scenes_1.pth")["model"]
    for name in ("conv1.weight", "layer4.1.conv2.weight"):
        torch.testing.assert_close(weights[name], state[name])


def test_another_number_of_classes_needs_not_restore_last(call, demo_data, tmp_path):
    state = build_model(backbone="resnet18", num_classes=11).state_dict()
    torch.save(state, tmp_path / "camvid.pth")
    result = start_from(call, demo_data, tmp_path / "run", tmp_path / "camvid.pth")
    assert result.status == 1
    assert "4 of another shape: head.bottleneck.3.weight (11, 128, 1, 1) instead of (19" in result.error
    result = start_from(call, demo_data, tmp_path / "run", tmp_path / "camvid.pth", "--not-restore-last")
    assert result.status == 0, result.error


@pytest.mark.parametrize("flag", ["--freeze-bn", "--ft"])
def test_fine_tuning_keeps_the_normalisation(call, demo_data, tmp_path, flag):
    model = build_model(backbone="resnet18")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights, rate = tmp_path / "weights.pth", ("--learning-rate", 0.01)
    result = start_from(call, demo_data, tmp_path / "run", weights, flag, *rate)
    assert result.status == 0, result.error
    after = load_checkpoint(tmp_path / "run" / "CS_scenes_1.pth")["model"]
    kept = {
        f"{name}.{entry}" if name else entry
        for name, layer in model.named_modules()
        if isinstance(layer, ABN)
        for entry in layer.state_dict()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(after[name], value) == (name in kept), name


def test_own_data_with_a_list(call, list_data, tmp_path):
    result = call(
        "train.py", "--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst",
        "--num-classes", 3, "--snapshot-dir", tmp_path / "run", *SMALL, "--batch-size", 2, "--num-steps", 1,
        "--recurrence", 0,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert (tmp_path / "run" / "model_1.pth").exists()


def test_camvid(call, camvid, tmp_path):
    result = call(
        "train.py", "--data-dir", camvid, "--snapshot-dir", tmp_path, *SMALL, "--batch-size", 2,
        "--num-steps", 2, "--ohem", "false", "--recurrence", 1,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert (tmp_path / "CamVid_2.pth").exists()


def test_two_processes(demo_data, tmp_path):
    """They train, and a resumed run is the same to the bit: each process has its own random state."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(folder, *more):
        options = ("--num-steps", 2, "--save-pred-every", 1, "--norm", "sync", *more)
        words = command(demo_data, folder, *options, launcher=launcher)
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done, load_checkpoint(folder / "CS_scenes_2.pth")

    done, whole = run(tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "CS_scenes_1.pth", tmp_path / "resumed")
    _, again = run(tmp_path / "resumed", "--resume")
    assert same_tensors(again["model"], whole["model"])
    assert len(whole["random_states"]) == 2
    assert not torch.equal(*(state["torch"] for state in whole["random_states"]))
    assert not any(name.startswith("module.") for name in whole["model"])
    assert done.stdout.count("network   ") == 1  # only the first process speaks
