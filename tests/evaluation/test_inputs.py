"""Which files ``--input`` names, and what their results are called."""

import shutil

import pytest
from PIL import Image

from dataset import DataError
from evaluation.inputs import find_inputs
from utils.arguments import UsageError


def test_results_of_an_earlier_call_are_no_input(tmp_path, caplog):
    (tmp_path / "out" / "attention").mkdir(parents=True)
    (tmp_path / "out" / "attention" / "a.html").touch()
    for name in ("a.png", "out/ids/a.png", "out/overlay/a.png", "out/b.png", "out/legend.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    assert [file.name for file in find_inputs([tmp_path], tmp_path / "out")] == ["a", "out/b"]
    assert not caplog.records
    with pytest.raises(UsageError):
        find_inputs([tmp_path / "out" / "ids" / "a.png"], tmp_path / "out")


def test_a_number_never_takes_the_name_of_another_input(tmp_path):
    paths = [
        tmp_path / folder / f"{name}.png" for folder, name in zip("abc", ("x", "x", "x_png_2"), strict=True)
    ]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    names = [file.name for file in find_inputs(paths, tmp_path / "out")]
    assert names == ["x_png", "x_png_3", "x_png_2"]


def test_links_are_followed_and_folders_of_results_are_not_searched(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
        Image.new("RGB", (3, 2)).save(path / "a.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    (folder / "day").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    # An output folder of an earlier call, and what is no result in it.
    for name in ("legend.png", "colour/a.png", "ids/a.png", "more/c.png"):
        (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "a.png", folder / "out" / name)
    names = [file.name for file in find_inputs([folder, folder], tmp_path / "other")]
    assert names == ["a", "b", "day/a", "out/more/c"]
    shutil.rmtree(folder / "out" / "more")
    with pytest.raises(DataError, match="out: holds nothing but results of an earlier call"):
        find_inputs([folder / "out"], tmp_path / "other")
