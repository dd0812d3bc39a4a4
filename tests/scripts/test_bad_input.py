"""Each mistake of a user: one line on the standard error, the right status, nothing half-done."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from networks import build_model
from tests.samples import write_pair
from tests.scripts.conftest import ROOT, SMALL, THIN
from training.snapshots import Snapshots


class Unpickled:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def one_line(result, script, status):
    assert result.status == status, result
    # The progress bar, which is rewritten in place, is no message.
    lines = [line for line in result.error.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, result.error
    assert lines[0].startswith(f"{script}: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("train.py", "--data-dir"),
        ("evaluate.py", "--data-dir, --restore-from"),
        ("predict.py", "--restore-from, --input, --output-dir"),
        ("export.py", "--restore-from, --output"),
    ],
)
def test_what_must_be_given(call, script, needed):
    assert f"the following arguments are required: {needed} (" in one_line(call(script), script, 2)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input-size", "769"), "argument --input-size: expected HEIGHT,WIDTH, got '769'"),
        (("--input-size", "0,769"), "--input-size: expected a positive height and width"),
        (("--input-size=-5,769",), "--input-size: expected a positive height and width"),
        (("--batch-size", "0"), "--batch-size: expected a whole number at least 1, got '0'"),
        (("--num-workers", "-1"), "--num-workers: expected a whole number at least 0"),
        (("--recurrence", "-2"), "--recurrence: expected a whole number at least 0"),
        (("--ignore-label", "300"), "--ignore-label: expected a whole number at least 0 and at most 255"),
        (("--num-classes", "300"), "--num-classes: expected a whole number at least 1 and at most 255"),
        (("--gpu", "7"), "--gpu 7: there is no GPU 7, 0 visible"),
        (("--colour", "blue"), "unrecognized arguments: --colour blue"),
    ],
)
def test_usage(call, script, arguments, message, demo_data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needed = ("--restore-from", "x.pth") if script == "evaluate.py" else ()
    result = call(script, "--data-dir", demo_data, *needed, *arguments)
    assert message in one_line(result, script, 2)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pascal", "--dataset pascal: known are cityscapes, camvid, ade20k, lip, list"),
        ("list", "--dataset list needs --data-list"),
    ],
)
def test_usage_of_data(call, script, name, message, demo_data, trained):
    """An unknown data set, or one that needs more to be said, is a mistake of the command line."""
    needed = ("--restore-from", trained) if script == "evaluate.py" else ()
    result = call(script, "--data-dir", demo_data, *needed, "--gpu", "cpu", "--dataset", name)
    assert message in one_line(result, script, 2)


def test_a_list_needs_its_number_of_classes(call, list_data):
    """What is missing is named, and only that."""
    options = ("--data-dir", list_data, "--dataset", "list", "--gpu", "cpu")
    line = one_line(call("train.py", *options), "train.py", 2)
    assert line == "train.py: error: --dataset list needs --data-list and --num-classes"
    line = one_line(call("train.py", *options, "--num-classes", 3), "train.py", 2)
    assert line == "train.py: error: --dataset list needs --data-list"
    line = one_line(call("train.py", *options, "--data-list", list_data / "train.lst"), "train.py", 2)
    assert line == "train.py: error: --dataset list needs --num-classes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-steps", "0"), "--num-steps: expected a whole number at least 1"),
        (("--num-steps", "10", "--start-iters", "10"), "--start-iters 10 is not below --num-steps 10"),
        (("--learning-rate", "0"), "--learning-rate: expected a number above 0"),
        (("--learning-rate", "-1"), "--learning-rate: expected a number above 0"),
        (("--weight-decay", "-1"), "--weight-decay: expected a number at least 0"),
        (("--momentum", "1.5"), "--momentum: expected a number at least 0 and at most 1"),
        (("--random-seed", "9" * 20), "--random-seed: expected a whole number at least 0"),
        (("--input-size", "5,5", "--batch-size", "1"), "one feature a batch has no variance"),
        (
            ("--model", "pspnet", "--batch-size", "1"),
            "--model pspnet normalises means of images, and that of one image",
        ),
        (("--model", "deeplabv3", "--batch-size", "2", "--accumulate", "2"), "or lower --accumulate"),
        (("--ohem-thres", "2"), "--ohem-thres: expected a number at least 0 and at most 1"),
        (("--ohem", "perhaps"), "--ohem: expected true or false, got 'perhaps'"),
        (("--save-pred-every", "0"), "--save-pred-every: expected a whole number at least 1"),
        (("--not-restore-last",), "--not-restore-last needs --restore-from"),
        (("--val-list", "val.lst"), "--val-list and --val-split need --val-every"),
        (("--gpu", "0,1", "--compile"), "--compile does not work with --gpu 0,1; use torchrun"),
        (("--checkpoint-activations", "--compile"), "--checkpoint-activations does not work with --compile"),
        (("--amp", "fp8"), "--amp: invalid choice: 'fp8'"),
    ],
)
def test_usage_of_training(call, arguments, message, demo_data):
    assert message in one_line(call("train.py", "--data-dir", demo_data, *arguments), "train.py", 2)


def test_a_batch_that_does_not_fit_the_gpus(call, demo_data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    result = call("train.py", "--data-dir", demo_data, "--gpu", "0,1,2")
    assert "--batch-size 8 cannot be split over 3 GPUs" in one_line(result, "train.py", 2)


def test_scales(call, demo_data):
    result = call("evaluate.py", "--data-dir", demo_data, "--restore-from", "x", "--scales", "1,-1")
    assert "--scales: expected a number above 0" in one_line(result, "evaluate.py", 2)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("fault", ["missing", "empty", "other layout", "list line", "list image"])
def test_data(call, script, fault, tmp_path, trained):
    data, more = tmp_path / "data", ()
    if fault != "missing":
        data.mkdir()
    if fault == "other layout":
        (data / "photos").mkdir()
    if fault.startswith("list"):
        line = write_pair(data, "a")
        (data / "x.lst").write_text(line + ("a b c\n" if fault == "list line" else "no.png no.png\n"))
        more = ("--dataset", "list", "--data-list", data / "x.lst", "--num-classes", "3")
    needed = ("--restore-from", trained) if script == "evaluate.py" else ()
    result = call(script, "--data-dir", data, *needed, "--gpu", "cpu", *more)
    message = {
        "missing": "data: no such data folder",
        "empty": "data: the data folder is empty",
        "other layout": "not the layout of one known data set",
        "list line": "x.lst, line 2: expected 'image label', got 'a b c'",
        "list image": f"x.lst, line 2: no file {data}/no.png",
    }[fault]
    assert message in one_line(result, script, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["sizes", "value", "truncated"])
def test_data_met_while_training(call, list_data, tmp_path, fault, workers):
    label, image = list_data / "labels/scene 1.png", list_data / "images/scene 1.png"
    if fault == "sizes":
        Image.new("L", (31, 20)).save(label)
        message = f"{image} is 30x20 but its label {label} is 31x20"
    elif fault == "value":
        Image.new("L", (30, 20), 77).save(label)
        message = f"{label}: holds label value 77, which is none of the 3 classes"
    else:
        image.write_bytes(image.read_bytes()[:900])
        message = f"{image}: unreadable or truncated image"
    result = call(
        "train.py", "--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst",
        "--num-classes", 3, "--snapshot-dir", tmp_path / "run", *THIN, "--num-workers", workers,
        "--batch-size", 1, "--num-steps", 3,
    )  # fmt: skip
    assert message in one_line(result, "train.py", 1)


def test_labels_of_the_validation_are_looked_at_before_training(call, list_data, tmp_path):
    (list_data / "own.lst").write_text(write_pair(list_data, "own", values=4))
    result = call(
        "train.py", "--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst",
        "--num-classes", 3, "--snapshot-dir", tmp_path / "run", *THIN, "--batch-size", 1,
        "--val-every", 3, "--val-list", "own.lst",
    )  # fmt: skip
    assert "labels/own.png: holds label value 3, which is none of the 3 classes" in one_line(
        result, "train.py", 1
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "architecture", "pickle"])
def test_checkpoints(call, script, fault, demo_data, tmp_path, trained):
    path = tmp_path / "weights.pth"
    if fault == "truncated":
        path.write_bytes(trained.read_bytes()[:50_000])
    elif fault == "architecture":
        torch.save(build_model(backbone="resnet50").state_dict(), path)
    elif fault == "pickle":
        torch.save({"model": Unpickled()}, path)
    result = call(
        script, "--data-dir", demo_data, "--restore-from", path, "--backbone", "thin", "--gpu", "cpu",
        *(("--snapshot-dir", tmp_path / "run") if script == "train.py" else ("--output-dir", tmp_path)),
    )  # fmt: skip
    message = {
        "missing": f"{path}: no such checkpoint",
        "truncated": f"{path}: not a readable checkpoint, truncated",
        "architecture": f"{path}: does not fit this network; ",
        "pickle": f"{path}: refused, it holds pickled objects",
    }[fault]
    line = one_line(result, script, 1)
    assert message in line
    if fault == "architecture":
        assert line.endswith("; its backbone is resnet50, the network's thin: --backbone resnet50")


def test_resuming_from_what_is_no_checkpoint_of_a_run(call, demo_data, tmp_path):
    torch.save(build_model(backbone="thin").state_dict(), tmp_path / "plain.pth")
    resume = ("--resume", tmp_path / "plain.pth")
    result = call("train.py", "--data-dir", demo_data, "--snapshot-dir", tmp_path / "run", *THIN, *resume)
    message = "plain.pth: cannot be resumed, it lacks model, optimizer, random_states, step"
    assert message in one_line(result, "train.py", 1)


def test_a_folder_without_checkpoints(call, demo_data, tmp_path):
    result = call("evaluate.py", "--data-dir", demo_data, "--restore-from", tmp_path, "--gpu", "cpu")
    assert f"{tmp_path}: no checkpoint <name>_<step>.pth" in one_line(result, "evaluate.py", 1)


def test_snapshots_that_cannot_be_written(call, demo_data, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    result = call("train.py", "--data-dir", demo_data, "--snapshot-dir", folder, *THIN)
    assert f"{folder}: cannot hold checkpoints (Not a directory)" in one_line(result, "train.py", 1)


def test_no_room_is_found_before_training(demo_data, tmp_path):
    """A real limit on the size of files, as a quota sets one: 20 MB where a checkpoint needs 115."""
    options = " ".join(("--data-dir", str(demo_data), "--snapshot-dir", str(tmp_path), *SMALL))
    script = f"ulimit -f 20000; exec {sys.executable} {ROOT / 'train.py'} {options}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"train.py: error: {tmp_path}: cannot write a checkpoint of 1")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run(call, demo_data, tmp_path):
    result = call(
        "train.py", "--data-dir", demo_data, "--snapshot-dir", tmp_path, *THIN, "--batch-size", 2,
        "--num-steps", 12, "--learning-rate", 1e20, "--save-pred-every", 1, "--ohem", 0,
    )  # fmt: skip
    line = one_line(result, "train.py", 1)
    assert "the loss is " in line
    assert "earlier checkpoints are kept" in line


def test_a_step_that_needs_more_memory_than_there_is(call, demo_data, tmp_path, monkeypatch):
    def full(self, *inputs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("networks.Segmenter.forward", full)
    result = call("train.py", "--data-dir", demo_data, "--snapshot-dir", tmp_path / "run", *THIN)
    line = one_line(result, "train.py", 1)
    assert line.startswith("train.py: error: step 1: out of memory; lower --batch-size or --input-size")


def test_two_runs_in_one_folder(call, demo_data, tmp_path):
    with Snapshots(tmp_path, "CS_scenes").locked():
        result = call("train.py", "--data-dir", demo_data, "--snapshot-dir", tmp_path, *THIN)
    assert f"{tmp_path}: another run is writing there" in one_line(result, "train.py", 1)
