"""``--val-every``: networks are evaluated on the way of a training run, and the best one is kept."""

import shutil

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.scripts.conftest import THIN, log_of, scores_of
from tests.scripts.processes import Processes
from utils.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def validated(demo_data, tmp_path_factory):
    """The folder of a run of 6 steps in two processes, evaluated every 2, with two checkpoints kept."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    run = Processes(
        folder.parent, "train.py", "--data-dir", demo_data, "--snapshot-dir", folder, *THIN,
        "--batch-size", 2, "--num-steps", 6, "--save-pred-every", 1, "--val-every", 2, "--keep-last", 2,
        "--learning-rate", 0.05, count=2,
    )  # fmt: skip
    run.succeed()
    return folder


def test_validation_is_evaluation(call, demo_data, validated, tmp_path):
    """Images shared by two processes give the very numbers that evaluate.py computes of the checkpoint."""
    lines = {line["step"]: line for line in log_of(validated) if "mIoU" in line}
    assert list(lines) == [2, 4, 6]
    metrics = scores_of(call, demo_data, validated / "CS_scenes_6.pth", tmp_path)
    for name in ("mIoU", "pixel_accuracy", "mean_accuracy", "IoU", "accuracy"):
        assert lines[6][name] == metrics[name]
    events = EventAccumulator(str(validated)).Reload()
    assert [event.step for event in events.Scalars("val/mIoU")] == [2, 4, 6]
    assert events.Scalars("val/IoU/road")[-1].value == pytest.approx(metrics["IoU"]["road"])


def test_the_best_checkpoint_is_kept_and_the_last_ones(call, demo_data, validated, tmp_path):
    names = {path.name for path in validated.glob("*.pth")}
    assert names == {"CS_scenes_5.pth", "CS_scenes_6.pth", "CS_scenes_best.pth"}
    scores = {line["step"]: line["mIoU"] for line in log_of(validated) if "mIoU" in line}
    best = load_checkpoint(validated / "CS_scenes_best.pth")
    assert best["step"] == max(scores, key=scores.get)
    assert best["validation"]["mIoU"] == max(scores.values())
    assert scores_of(call, demo_data, validated / "CS_scenes_best.pth", tmp_path)["mIoU"] == max(
        scores.values()
    )


@pytest.mark.parametrize("last", [False, True])
def test_a_validation_that_was_interrupted_is_made_up_for(call, demo_data, tmp_path, monkeypatch, last):
    """Killed between a checkpoint and the end of its evaluation, perhaps the run's last."""
    options = ("--data-dir", demo_data, *THIN, "--batch-size", 2, "--save-pred-every", 2, "--val-every", 2)
    options += ("--snapshot-dir", tmp_path, "--num-steps", 2 if last else 3)

    def killed(self, checkpoint):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("training.snapshots.Snapshots.save_best", killed)
        assert call("train.py", *options).status == 130
    assert {path.name for path in tmp_path.glob("*.pth")} == {"CS_scenes_2.pth"}
    result = call("train.py", *options, "--resume")
    assert result.status == 0, result.error
    assert [line["step"] for line in log_of(tmp_path) if "mIoU" in line] == [2]
    assert load_checkpoint(tmp_path / "CS_scenes_best.pth")["step"] == 2
    assert "the run is complete" in call("train.py", *options, "--resume").out


def test_validation_needs_labels_and_a_split(call, list_data, tmp_path):
    options = ("--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst", *THIN)
    options += ("--num-classes", 3, "--snapshot-dir", tmp_path / "run", "--batch-size", 2, "--num-steps", 1)
    result = call("train.py", *options, "--val-every", 1)
    assert result.status == 1
    assert "--val-split val: list has no splits of its own; give --val-list" in result.error
    shutil.copy(list_data / "images" / "scene 0.png", list_data / "images" / "alone.png")
    (list_data / "val.lst").write_text("images/alone.png\n")
    result = call("train.py", *options, "--val-every", 1, "--val-list", list_data / "val.lst")
    assert result.status == 1
    assert "val.lst: has images without labels, which --val-every cannot score" in result.error
    (list_data / "none.lst").write_text("images/alone.png\tlabels/none.png\n")
    Image.new("L", (30, 20), 255).save(list_data / "labels" / "none.png")
    elsewhere = ("--val-list", list_data / "none.lst", "--snapshot-dir", tmp_path / "none")
    result = call("train.py", *options, "--val-every", 1, *elsewhere)
    assert result.status == 1
    assert "no pixel of the 1 labels counts: they hold value 255" in result.error
    result = call("train.py", *options, "--val-every", 1, "--val-list", list_data / "train.lst")
    assert result.status == 0, result.error
    assert (tmp_path / "run" / "model_best.pth").exists()
