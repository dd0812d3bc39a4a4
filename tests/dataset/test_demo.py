"""The synthetic demo data: what it writes, that it is the same every time, and that it spares other files."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset.cityscapes import CLASSES, IDS, LABELS, list_samples
from dataset.demo import draw_scene, files, generate
from dataset.demo.__main__ import main
from dataset.labels import DataError


def small(root: Path, seed: int = 0, num_train: int = 2) -> None:
    generate(root, num_train=num_train, num_val=1, height=64, width=128, seed=seed)


def snapshot(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def test_layout_is_that_of_cityscapes(tmp_path: Path) -> None:
    small(tmp_path / "demo")
    assert set(snapshot(tmp_path / "demo")) == {
        "demo.json",
        "leftImg8bit/train/demotown/demotown_000000_000019_leftImg8bit.png",
        "leftImg8bit/train/demotown/demotown_000001_000019_leftImg8bit.png",
        "leftImg8bit/val/demoville/demoville_000000_000019_leftImg8bit.png",
        "gtFine/train/demotown/demotown_000000_000019_gtFine_labelIds.png",
        "gtFine/train/demotown/demotown_000001_000019_gtFine_labelIds.png",
        "gtFine/val/demoville/demoville_000000_000019_gtFine_labelIds.png",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]  # nothing temporary stays


def test_files_hold_the_scene_of_seed_split_and_index(tmp_path: Path) -> None:
    small(tmp_path / "demo", seed=3)
    pair = list_samples(tmp_path / "demo", "train")[1]
    assert pair.label is not None
    image, label = draw_scene(np.random.default_rng([3, 0, 1]), 64, 128)
    np.testing.assert_array_equal(cv2.imread(str(pair.image), cv2.IMREAD_UNCHANGED), image)
    np.testing.assert_array_equal(cv2.imread(str(pair.label), cv2.IMREAD_UNCHANGED), label)


def test_default_val_scenes_show_every_class_and_ignored_areas() -> None:
    labels = [draw_scene(np.random.default_rng([0, 1, index]), 128, 256)[1] for index in range(12)]
    scenes_with = {name: sum(IDS[name] in label for label in labels) for name in IDS}
    assert all(scenes_with[name] >= 3 for name in CLASSES), scenes_with
    assert scenes_with["ego vehicle"] == 12
    assert scenes_with["static"] > 0 and scenes_with["unlabeled"] > 0
    ignored = np.mean([np.mean(LABELS.encode(label) == 255) for label in labels])  # raises on a foreign id
    assert 0.01 < ignored < 0.15


@pytest.mark.parametrize("size", [(64, 128), (32, 32), (65, 131), (97, 64), (128, 300)])
def test_any_size(size: tuple[int, int]) -> None:
    for index in range(4):
        image, label = draw_scene(np.random.default_rng(index), *size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        assert label.shape == size and label.dtype == np.uint8
        assert set(np.unique(label)) <= set(IDS.values())
        assert {IDS["road"], IDS["sky"]} <= set(np.unique(label))


def test_same_seed_same_scene_other_seed_other_scene() -> None:
    first, again, other = (draw_scene(np.random.default_rng(seed), 64, 128) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_scenes_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    small(tmp_path / "two", num_train=2)
    small(tmp_path / "three", num_train=3)
    two, three = snapshot(tmp_path / "two"), snapshot(tmp_path / "three")
    del two["demo.json"]
    assert two.items() <= three.items()


def test_complete_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path / "demo")
    before = snapshot(tmp_path / "demo")
    monkeypatch.setattr(files, "draw_scene", None)  # would fail if called
    small(tmp_path / "demo")
    assert snapshot(tmp_path / "demo") == before


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    small(tmp_path / "demo")
    assert len(list_samples(tmp_path / "demo", "train")) == 2


def test_folder_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    small(tmp_path / "demo")
    assert (tmp_path / "demo").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_interrupted_generation_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*arguments: object) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "draw_scene", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "demo")
    assert calls and not any(tmp_path.iterdir())
    small(tmp_path / "demo")
    assert len(list_samples(tmp_path / "demo", "val")) == 1


def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / ".demo-notes"  # hidden too, but no workspace
    mine.mkdir()
    drawing = multiprocessing.get_context("fork").Event()

    def draw_and_wait(*_: object) -> None:
        drawing.set()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(files, "draw_scene", draw_and_wait)
        process = multiprocessing.get_context("fork").Process(target=small, args=(tmp_path / "demo",))
        process.start()
    assert drawing.wait(30)
    (workspace,) = set(tmp_path.iterdir()) - {mine}
    small(tmp_path / "demo")
    assert workspace.is_dir()  # its process lives
    shutil.rmtree(tmp_path / "demo")
    process.kill()
    process.join()
    assert workspace.is_dir()
    small(tmp_path / "demo")
    assert {path.name for path in tmp_path.iterdir()} == {"demo", ".demo-notes"}


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        (MemoryError(), 1, "error: not enough memory to draw scenes of 128×64"),
        (KeyboardInterrupt(), 130, "{root}: interrupted, nothing was written"),
        (
            OSError(28, "No space left on device", "demo.json"),
            1,
            "error: [Errno 28] No space left on device: 'demo.json'",
        ),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: BaseException,
    status: int,
    line: str,
) -> None:
    def draw(*_: object) -> None:
        raise fault

    monkeypatch.setattr(files, "draw_scene", draw)
    root = tmp_path / "demo"
    assert main([str(root), "--size", "64,128"]) == status
    assert capsys.readouterr().err == line.format(root=root) + "\n"
    assert not any(tmp_path.iterdir())


def foreign_folder(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")


def foreign_file(root: Path) -> None:
    root.write_text("a file")


def other_settings(root: Path) -> None:
    small(root, seed=7)


def missing_scene(root: Path) -> None:
    small(root)
    next(root.glob("gtFine/val/*/*.png")).unlink()


def broken_settings(root: Path) -> None:
    small(root)
    (root / "demo.json").write_text("{")


@pytest.mark.parametrize(
    "prepare", [foreign_folder, foreign_file, other_settings, missing_scene, broken_settings]
)
def test_anything_else_is_refused_and_kept(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    root = tmp_path / "demo"
    prepare(root)
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match="holds something other"):
        small(root)
    assert snapshot(tmp_path) == before


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "deep" / "demo"
    command = [str(root), "--train", "1", "--val", "1", "--size", "48,96", "--seed", "5"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{root}: wrote 1 training and 1 validation scenes of 96×48\n"
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{root}: left alone, ")
    settings = json.loads((root / "demo.json").read_text())
    assert (settings["height"], settings["width"], settings["seed"]) == (48, 96, 5)
    assert main([*command[:-1], "6"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {root}: holds something other") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train", "0"), ("--train", "many"), ("--val", "-1"), ("--val", "1.5"), ("--seed", "-1"),
        ("--size", "64"), ("--size", "64,"), ("--size", "31,64"), ("--size", "64x128"), ("--size", "1,2,3"),
        ("--size", "9999999,9999999"), ("--size", "64,8193"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "demo"), f"{option}={value}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m dataset.demo: error: argument {option}: {value!r} is not")
    assert error.endswith("(see --help)\n") and error.count("\n") == 1
    assert not (tmp_path / "demo").exists()
