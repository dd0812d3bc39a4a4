"""The folder of a run's checkpoints."""

import pytest
import torch

from training import snapshots as module
from training.snapshots import (
    Snapshots,
    check_room,
    checkpoints,
    find_checkpoint,
    newest_checkpoint,
    newest_or_best,
)
from utils.checkpoint import CheckpointError, load_checkpoint


def test_newest_is_the_highest_step_not_the_last_name(tmp_path):
    for name in ("a_9.pth", "a_100.pth", "a_20.tmp", "b_300.pth", "a_x.pth", "aa_500.pth", "a_best.pth"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path).name == "aa_500.pth"
    assert checkpoints(tmp_path, "c") == []
    assert newest_checkpoint(tmp_path / "missing") is None
    assert [path.name for path in checkpoints(tmp_path, "a")] == ["a_9.pth", "a_100.pth"]


def test_room_is_checked_for_all_checkpoints_to_come(tmp_path, monkeypatch):
    check_room(tmp_path / "new" / "folder", 1000, 3)
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(9, 9, 2500))
    with pytest.raises(CheckpointError, match="to come: 3 checkpoints"):
        check_room(tmp_path, 1000, 3)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/snapshots: .*Not a directory"):
        check_room(tmp_path / "file" / "snapshots", 1000, 1)


def contents(step, **more):
    return {"model": {"x": torch.full((5,), float(step))}, "step": step, **more}


@pytest.mark.parametrize(("keep", "left"), [(0, [3, 5, 7, 9]), (1, [9]), (2, [7, 9]), (9, [3, 5, 7, 9])])
def test_old_ones_go_and_the_best_stays(tmp_path, keep, left):
    snapshots = Snapshots(tmp_path, "run", keep)
    (tmp_path / "other_1.pth").touch()
    for step in (3, 5, 7, 9):
        snapshots.save(contents(step), step)
        assert (tmp_path / f"run_{step}.pth").exists()
        snapshots.prune()
        if step == 5:
            validation = {"step": 5, "mIoU": 0.25, "images": "a", "fit": 180}
            snapshots.save_best(contents(step, validation=validation))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"other_1.pth", "run_best.pth"} | {f"run_{step}.pth" for step in left}
    assert snapshots.best_miou("a", 180) == 0.25
    with pytest.raises(
        CheckpointError, match=r"run_best.pth: was scored on a \(scaled to 180\), now .* on b"
    ):
        snapshots.best_miou("b", 180)
    with pytest.raises(CheckpointError, match=r"\(scaled to 180\), now it would be on a \(not scaled\)"):
        snapshots.best_miou("a")
    other = Snapshots(tmp_path, "copy")
    other.save_best(contents(5))
    with pytest.raises(CheckpointError, match=r"copy_best.pth: holds no score of a validation"):
        other.best_miou("a")
    for validation in (None, [0.25], {"mIoU": None}):
        other.save_best(contents(5, validation=validation))
        with pytest.raises(CheckpointError, match=r"copy_best.pth: holds no score of a validation"):
            other.best_miou("a")
    other.save_best(contents(5, validation={"mIoU": 0.25}))
    with pytest.raises(CheckpointError, match=r"copy_best.pth: does not say on which images it was scored"):
        other.best_miou("a")
    other.best_path.unlink()
    assert load_checkpoint(snapshots.best_path)["step"] == 5
    assert newest_or_best(tmp_path).name == "run_9.pth"


def test_a_failed_save_removes_nothing(tmp_path, monkeypatch):
    snapshots = Snapshots(tmp_path, "run", keep_last=1)
    snapshots.save(contents(1), 1)

    def full(contents, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"run_2.pth: cannot save .*\(No space left on device\)"):
        snapshots.save(contents(2), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["run_1.pth"]


def test_no_best_yet(tmp_path):
    assert Snapshots(tmp_path, "run").best_miou("a") == -1


def test_the_best_is_all_there_is(tmp_path):
    """Where a run was killed after an evaluation and before its first checkpoint."""
    snapshots = Snapshots(tmp_path, "run")
    assert newest_or_best(tmp_path) is None
    snapshots.save_best(contents(5))
    assert newest_or_best(tmp_path) == find_checkpoint(tmp_path) == tmp_path / "run_best.pth"
    snapshots.save(contents(3), 3)
    assert newest_or_best(tmp_path) == find_checkpoint(tmp_path) == tmp_path / "run_3.pth"


@pytest.mark.parametrize("name", ["run_7.pth", "run_best.pth", "other_7.pth"])
def test_another_runs_checkpoints_are_not_written_among(tmp_path, name):
    torch.save(contents(7), tmp_path / name)
    with pytest.raises(CheckpointError, match=f"holds {name} of an earlier run; continue it with --resume"):
        Snapshots(tmp_path, "run").prepare(0, False, 1000, 3)
    Snapshots(tmp_path, "run").prepare(7, True, 1000, 3)


def test_what_a_kill_left_goes(tmp_path):
    for name in ("run_4.tmp", "run_best.tmp", "other.tmp"):
        (tmp_path / name).touch()
    Snapshots(tmp_path, "run").prepare(3, True, 1000, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["other.tmp"]


def test_room_for_those_that_are_kept_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(9, 9, 3500))
    Snapshots(tmp_path, "run", keep_last=2).prepare(0, False, 1000, 12)
    with pytest.raises(CheckpointError, match="to come: 12 checkpoints"):
        Snapshots(tmp_path, "run").prepare(0, False, 1000, 12)
    with pytest.raises(CheckpointError, match="to come: 4 checkpoints"):
        Snapshots(tmp_path, "run", keep_last=2).prepare(0, False, 1000, 12, best=True)
    for step in (1, 2):  # there already, and one of them goes
        (tmp_path / f"run_{step}.pth").touch()
    Snapshots(tmp_path, "run", keep_last=2).prepare(2, True, 1000, 12, best=True)


def test_a_new_checkpoint_needs_room_before_old_ones_go(tmp_path, monkeypatch):
    for step in range(5):
        (tmp_path / f"run_{step}.pth").touch()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(9, 9, 500))
    with pytest.raises(CheckpointError, match="to come: 1 checkpoint of"):
        Snapshots(tmp_path, "run", keep_last=2).prepare(9, True, 1000, 12)
