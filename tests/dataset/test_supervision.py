"""Labels that cannot teach or score are found out before a run."""

import time

import numpy as np
import pytest
from PIL import Image

from dataset import DataError, Pair, check_supervision, find_dataset, generic_table, list_samples, supervision
from dataset.cityscapes import LABELS as CITYSCAPES


def write(folder, *arrays):
    pairs = []
    for index, values in enumerate(arrays):
        path = folder / f"{index:03d}.png"
        Image.fromarray(np.asarray(values, np.uint8)).save(path)
        pairs.append(Pair(folder / "no image is read.png", path))
    return pairs


def test_good_labels_give_no_warning(demo_data, tmp_path):
    spec = find_dataset(demo_data)
    assert check_supervision(list_samples(spec, demo_data, "train"), spec.labels) == []
    assert (
        check_supervision(write(tmp_path, [[0, 1, 255]]), generic_table(3)) == []
    )  # a rare class is missing
    assert check_supervision([Pair(tmp_path / "x.png", None)], generic_table(2)) == []  # a test split


@pytest.mark.parametrize("ignore_label", [1, 255])
def test_one_class_is_refused(tmp_path, ignore_label):
    with pytest.raises(DataError, match=r"^one class cannot be trained .* hold values 0, 1; give at least 2"):
        check_supervision(write(tmp_path, [[0, 1]]), generic_table(1, ignore_label=ignore_label))


def test_labels_of_which_no_pixel_counts(tmp_path):
    message = r"^no pixel of the 2 labels counts: they hold value 255, .* 0 \(class 0\), 1 \(class 1\)$"
    with pytest.raises(DataError, match=message):
        check_supervision(write(tmp_path, [[255, 255]], [[255, 255]]), generic_table(2))


def test_only_where_no_pixel_of_the_sample_counts_the_rest_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "MAX_FILES", 3)
    read = []
    original = supervision.read_label
    monkeypatch.setattr(supervision, "read_label", lambda path: read.append(path.name) or original(path))
    arrays = [[[255, 255]] for _ in range(9)]
    arrays[2] = [[0, 1]]
    assert check_supervision(write(tmp_path, *arrays), generic_table(2)) == []
    assert read == ["000.png", "000.png", "004.png", "008.png", "001.png", "002.png"]
    read.clear()
    arrays[4] = [[0, 1]]
    assert check_supervision(write(tmp_path, *arrays), generic_table(2)) == []
    assert read == ["000.png", "000.png", "004.png", "008.png"]


def test_masks_of_0_and_255_hold_one_class(tmp_path, monkeypatch):
    pairs = write(tmp_path, *[[[0, 255]] for _ in range(9)])
    fault = r"only 'class 0' occurs in all labels: they hold values 0, 255; expected are 0 .*, 1 "
    with pytest.raises(DataError, match=rf"^{fault}.*one class cannot be trained"):
        check_supervision(pairs, generic_table(2))
    monkeypatch.setattr(supervision, "MAX_FILES", 3)
    (line,) = check_supervision(pairs, generic_table(2))
    assert line.startswith("only 'class 0' occurs in 3 of 9 labels: they hold values 0, 255;")


def test_train_ids_in_place_of_ids(tmp_path):
    """Cityscapes' labelTrainIds read as labelIds: all values are known, most are ignored."""
    stored = np.repeat([*range(19), 255], [40, *[3] * 18, 6])[None]
    (line,) = check_supervision(write(tmp_path, stored), CITYSCAPES)
    assert line.startswith(
        "82% of the pixels of all labels are ignored (as 255) and 13 of 19 classes never occur"
    )
    assert "values 0, 1, 2, 3" in line
    assert "7 (road), 8 (sidewalk)" in line
    assert "\n" not in line


def test_scribbles_that_show_every_class_give_no_warning(tmp_path):
    stored = np.full((20, 30), 255)
    stored[3, :3] = [0, 1, 2]
    assert check_supervision(write(tmp_path, stored), generic_table(3)) == []
    assert len(check_supervision(write(tmp_path, stored), generic_table(4))) == 1


def test_values_of_no_class_name_the_file_and_what_was_expected(tmp_path):
    pairs = write(tmp_path, [[0, 1]], [[0, 127]])
    with pytest.raises(DataError, match=r"001\.png: holds label value 127, .* expected are 0 \(class 0\), 1"):
        check_supervision(pairs, generic_table(2))


def test_large_labels_are_sampled_more_thinly(tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "MAX_PIXELS", 100)
    pairs = write(tmp_path, *[np.tile([0, 1], (5, 5)) for _ in range(9)])
    read = []
    original = supervision.read_label
    monkeypatch.setattr(supervision, "read_label", lambda path: read.append(path) or original(path))
    began = time.perf_counter()
    assert check_supervision(pairs, generic_table(2)) == []
    assert len(read) == 1 + 2
    assert time.perf_counter() - began < 5


def test_counts_of_labels_taller_than_a_block(tmp_path):
    stored = np.zeros((2500, 1))
    stored[[0, 1024, 2499], 0] = 255, 1, 2
    (pair,) = write(tmp_path, stored)
    counts = supervision._count_values([pair.label])
    assert {value: counts[value] for value in np.flatnonzero(counts)} == {0: 2497, 1: 1, 2: 1, 255: 1}


def test_many_ignored_values_are_doubtful_however_few_their_pixels(tmp_path):
    stored = np.repeat([7, 8, 0, 1, 2, 3, 4], [60, 30, 2, 2, 2, 2, 2])[None]
    (line,) = check_supervision(write(tmp_path, stored), CITYSCAPES)
    assert line.startswith("10% of the pixels of all labels are ignored (as 255) and 17 of 19 classes")
