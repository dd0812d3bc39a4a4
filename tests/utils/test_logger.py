import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.logger import Logger, duration, side_by_side, was_logged


def test_log_holds_one_line_a_step_and_resuming_takes_back_what_came_after(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    with Logger(tmp_path / "run") as logger:
        for step in (10, 20, 30):
            logger.scalars(step, {"loss": float(step)})
    log.write_text(log.read_text() + '{"step": 40, "lo')  # killed while writing
    with Logger(tmp_path / "run", step=20) as logger:
        logger.scalars(30, {"loss": 31.0})
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": 10, "loss": 10.0},
        {"step": 20, "loss": 20.0},
        {"step": 30, "loss": 31.0},
    ]
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_several_numbers_of_one_name(tmp_path):
    with Logger(tmp_path) as logger:
        logger.scalars(5, {"mIoU": 0.25, "IoU": {"road": 0.5, "bus": None}}, group="val")
    assert json.loads((tmp_path / "log.jsonl").read_text())["IoU"] == {"road": 0.5, "bus": None}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"val/mIoU", "val/IoU/road"}
    assert was_logged(tmp_path, 5, "mIoU")
    assert not was_logged(tmp_path, 5, "loss")
    assert not was_logged(tmp_path, 4, "mIoU")
    assert not was_logged(tmp_path / "none", 5, "mIoU")


@pytest.mark.parametrize(
    ("seconds", "text"), [(20, "20 s"), (90, "2 min"), (5400, "1 h 30 min"), (100 * 3600, "4 d 4 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_side_by_side():
    row = side_by_side(np.zeros((4, 5, 3), np.uint8), np.zeros((4, 6, 3), np.uint8))
    assert row.shape == (4, 5 + 2 + 6, 3)
    assert (row[:, 5:7] == 255).all()
