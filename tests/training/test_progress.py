import errno
import json
import math
import shutil
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.progress import LogError, LossWindow, Progress, was_logged
from training.step import TrainingError
from utils.distributed import Process


def test_log_holds_one_line_a_step_and_resuming_takes_back_what_came_after(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    with Progress(tmp_path / "run", 0, 30) as logger:
        for step in (10, 20, 30):
            logger.scalars(step, {"loss": float(step)})
    log.write_text(log.read_text() + '{"step": 40, "lo')  # killed while writing
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text('{"step": 10, "loss": 1.0}')  # before the end of the line
    with Progress(tmp_path / "other", 10, 30) as logger:
        logger.scalars(20, {"loss": 2.0})
    assert json.loads((tmp_path / "other" / "log.jsonl").read_text()) == {"step": 20, "loss": 2.0}
    with Progress(tmp_path / "run", 20, 30) as logger:
        logger.scalars(30, {"loss": 31.0})
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": 10, "loss": 10.0},
        {"step": 20, "loss": 20.0},
        {"step": 30, "loss": 31.0},
    ]
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_several_numbers_of_one_name(tmp_path):
    with Progress(tmp_path, 0, 9) as logger:
        logger.scalars(5, {"mIoU": 0.25, "IoU": {"road": 0.5, "bus": None}}, group="val")
    assert json.loads((tmp_path / "log.jsonl").read_text())["IoU"] == {"road": 0.5, "bus": None}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"val/mIoU", "val/IoU/road"}
    assert was_logged(tmp_path, 5, "mIoU")
    assert not was_logged(tmp_path, 5, "loss")
    assert not was_logged(tmp_path, 4, "mIoU")
    assert not was_logged(tmp_path / "none", 5, "mIoU")


def test_names_and_values_of_a_loss_of_ones_own(tmp_path):
    with Progress(tmp_path, 0, 9) as logger:
        logger.scalars(5, {"step": 0.5, "margin": math.nan, "loss": 1.0, "by": {"x": math.inf}})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    # Of standard JSON, and a run can go on from it.
    assert line == '{"step": 5, "margin": null, "loss": 1.0, "by": {"x": null}}'
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("train/step")[0].value == 0.5


@pytest.mark.parametrize("first_step", [0, 10])
def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_not_shown(tmp_path, first_step):
    for start in (0, first_step):
        with Progress(tmp_path, start, 30) as progress:
            for step in range(start + 10, 31 if start == first_step else 21, 10):
                progress.scalars(step, {"loss": 1.0})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30]


def test_a_folder_that_is_removed_is_one_line(tmp_path, capsys):
    folder = tmp_path / "run"

    def run():
        with Progress(folder, 0, 9) as progress:
            progress.scalars(1, {"loss": 1.0})
            shutil.rmtree(folder)
            progress.scalars(2, {"loss": 1.0})
            progress.scalars(3, {"loss": 1.0})  # the thread that writes events has noticed by now

    with pytest.raises(LogError, match=r"run: cannot write log.jsonl and TensorBoard events \(No such file"):
        run()
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run():
        with Progress(tmp_path, 0, 9) as progress:
            monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
            progress.scalars(1, {"loss": 1.0})

    with pytest.raises(LogError, match="No space left on device"):
        run()
    assert "Traceback" not in capsys.readouterr().err


def test_a_log_that_is_not_text_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(LogError, match=r"log.jsonl: cannot read this log"):
        Progress(tmp_path, 5, 9)
    with pytest.raises(LogError, match=r"log.jsonl: cannot read this log"):
        was_logged(tmp_path, 5, "loss")


CPU = torch.device("cpu")


def losses(total):
    values = {"loss": total, "loss_head": total - 1, "loss_aux": 2.5, "kept_pixels": 0.5}
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def test_a_window_of_losses():
    window = LossWindow(Process((CPU,)), batch_size=300)
    for total in (4, 6):
        window.begin()
        time.sleep(0.02)
        window.end(losses(total))
    time.sleep(0.2)  # not a part of any step
    values = window.read(12)
    speed = values.pop("images_per_second")
    assert values == {"loss": 5, "loss_head": 4, "loss_aux": 2.5, "kept_pixels": 0.5}
    assert 2000 < speed < 15000
    window.end(losses(7))
    assert window.read(13)["loss"] == 7


@pytest.mark.parametrize(("totals", "step"), [((1, float("nan"), 3), 11), ((1, 2, float("inf")), 12)])
def test_the_step_of_a_loss_that_is_not_finite_is_told(totals, step):
    window = LossWindow(Process((CPU,)), 1)
    for total in totals:
        window.end(losses(total))
    with pytest.raises(
        TrainingError, match=f"step {step}: the loss is (nan|inf); earlier checkpoints are kept"
    ):
        window.read(12)
