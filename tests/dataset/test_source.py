"""Finding the samples of a data set: layouts, splits and list files."""

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import (
    DATASETS,
    DataError,
    EvaluationDataset,
    Pair,
    find_dataset,
    fingerprint,
    list_samples,
)
from dataset.reading import read_label, read_sample
from dataset.source import read_list
from tests.samples import write_pair


def test_list_files(list_data):
    pairs = read_list(list_data / "train.lst", list_data)
    assert [pair.image.name for pair in pairs] == ["scene 0.png", "scene 1.png", "scene 2.png"]


@pytest.mark.parametrize(
    "line",
    [
        "\n  images/b.png   labels/b.png \n\n",
        "images/b.png\tlabels/b.png\t\n",
        "images/b.png \t labels/b.png\r\n\r\n",
        "/images/b.png /labels/b.png\n",
        "/images/b.png\t/labels/b.png\n",
        "{root}/images/b.png {root}/labels/b.png\n",
        "images\\b.png labels\\b.png\n",
        "./images/b.png images/../labels/b.png",
        "\ufeffimages/b.png labels/b.png\n",  # as Windows writes it
        "images/b.png\n",
    ],
)
def test_forms_of_lines(tmp_path, line):
    write_pair(tmp_path, "b")
    (tmp_path / "x.lst").write_bytes(line.replace("{root}", str(tmp_path)).encode())
    ((image, label),) = read_list(tmp_path / "x.lst", tmp_path)
    assert image.samefile(tmp_path / "images/b.png")
    assert label is None if line.count("b.png") == 1 else label.samefile(tmp_path / "labels/b.png")


def test_names_with_blanks_need_no_tab_where_one_reading_fits(tmp_path):
    line = write_pair(tmp_path, "my own  photo")
    (tmp_path / "x.lst").write_text(line.replace("\t", " ") + "images/my own  photo.png\n")
    first, second = read_list(tmp_path / "x.lst", tmp_path)
    assert first == (tmp_path / "images/my own  photo.png", tmp_path / "labels/my own  photo.png")
    assert second == (first.image, None)
    (tmp_path / "images/my").touch()
    (tmp_path / "own  photo.png labels").mkdir()
    (tmp_path / "own  photo.png labels/my own  photo.png").touch()
    with pytest.raises(DataError, match=r"x\.lst, line 1: .* can be read in 2 ways; .* tab"):
        read_list(tmp_path / "x.lst", tmp_path)


def test_lists_are_looked_for_where_the_user_is_and_in_the_data_folder(list_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_list(Path("train.lst"), list_data)) == 3
    (tmp_path / "train.lst").write_text((list_data / "train.lst").read_text().splitlines()[0])
    assert len(read_list(Path("train.lst"), list_data)) == 1
    with pytest.raises(
        DataError, match=r"^val\.lst: .* no such file \(looked for (\S+) and (.+)\)$"
    ) as caught:
        read_list(Path("val.lst"), list_data)
    assert f"{tmp_path}/val.lst and {list_data}/val.lst" in str(caught.value)


def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 3)).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "x.lst").write_bytes(b"train/caf\xe9.png\ttrainannot/caf\xe9.png\n")
    spec = find_dataset(tmp_path)
    pairs = list_samples(spec, tmp_path, "train")
    assert pairs == list_samples(spec, tmp_path, "train", tmp_path / "x.lst")
    assert read_sample(pairs[0], spec.labels, 255)[0].shape == (3, 4, 3)
    names = b"train/caf\xe9.png\ntrainannot/caf\xe9.png"
    assert fingerprint(pairs, tmp_path) == f"1 images, {hashlib.sha256(names).hexdigest()[:12]}"
    assert EvaluationDataset(pairs, spec.labels).names == ["caf\\xe9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/a.png labels/a.png\na b c\n", "line 2: expected 'image label', got 'a b c'"),
        ("/nowhere/x.png labels/a.png\n", r"line 1: no file .*/nowhere/x\.png"),
        ("images/a.png\t\n\nimages/a.png\t\tlabels/a.png\n", "line 3: expected 'image label'"),
        ("images/a.png labels/a.png\n\nimages/x.png labels/a.png\n", r"line 3: no file .*images/x\.png"),
        ("images/a.png labels/x.png\n", r"line 1: no file .*labels/x\.png"),
        ("\n\n", "the list is empty"),
        (b"\xff\xfe", "cannot read this list file"),
        (f"images/{'x' * 300}.png labels/a.png\n", "line 1: no file"),
    ],
)
def test_malformed_lists_name_the_line(tmp_path, text, message):
    write_pair(tmp_path, "a")
    list_file = tmp_path / "train.lst"
    list_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=rf"train\.lst.*{message}") as caught:
        read_list(list_file, tmp_path)
    assert "\n" not in str(caught.value)


def test_cityscapes_by_folder_and_by_list(demo_data, tmp_path):
    spec = find_dataset(demo_data)
    assert (spec.name, spec.prefix, spec.labels.num_classes) == ("cityscapes", "CS_scenes", 19)
    train, val = (list_samples(spec, demo_data, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 3)
    assert list_samples(spec, demo_data, "trainval") == train + val
    image, label = (path.relative_to(demo_data) for path in train[1])
    (tmp_path / "train.lst").write_text(f"{image}\t{label}\n")
    assert list_samples(spec, demo_data, "train", tmp_path / "train.lst") == train[1:2]


def test_lists_that_name_labels_of_other_values(demo_data, tmp_path):
    image, label = list_samples(find_dataset(demo_data), demo_data, "val")[0]
    other = demo_data / label.name.replace("labelIds", "labelTrainIds")
    other.write_bytes(label.read_bytes())
    (tmp_path / "val.lst").write_text(f"{image}\t{other}\n")
    with pytest.raises(DataError, match=r"labelTrainIds\.png does not hold the label ids of cityscapes"):
        list_samples(find_dataset(demo_data), demo_data, "val", tmp_path / "val.lst")


def test_ignoring_a_class_is_refused(demo_data):
    with pytest.raises(DataError, match="--ignore-label 18 is one of the 19 classes of cityscapes"):
        find_dataset(demo_data, ignore_label=18)
    assert find_dataset(demo_data, ignore_label=19).name == "cityscapes"


def test_fingerprint_knows_the_data_wherever_it_lies(demo_data, tmp_path):
    spec = find_dataset(demo_data)
    moved = tmp_path / "moved"
    moved.symlink_to(demo_data)
    val = fingerprint(list_samples(spec, demo_data, "val"), demo_data)
    assert val == fingerprint(list_samples(spec, moved, "val"), moved)
    assert val.startswith("3 images, ")
    assert val != fingerprint(list_samples(spec, demo_data, "train")[:3], demo_data)
    assert val != fingerprint(
        list_samples(spec, demo_data, "val")[::-1], demo_data
    )  # another order of the run


def test_camvid(camvid):
    spec = find_dataset(camvid)
    assert spec.name == "camvid"
    sizes = {split: len(list_samples(spec, camvid, split)) for split in spec.splits}
    assert sizes == {"train": 367, "val": 101, "trainval": 468, "test": 233}
    image, label = read_sample(list_samples(spec, camvid, "test")[-1], spec.labels, 255)
    assert image.shape == (360, 480, 3)
    assert label.shape == (360, 480)
    assert set(np.unique(label)) <= {*range(11), 255}


def test_camvid_without_lists_or_with_those_of_segnet(tmp_path):
    write_pair(tmp_path, "a")
    (tmp_path / "images").rename(tmp_path / "train")
    (tmp_path / "labels").rename(tmp_path / "trainannot")
    spec = find_dataset(tmp_path)
    expected = [Pair(tmp_path / "train/a.png", tmp_path / "trainannot/a.png")]
    assert list_samples(spec, tmp_path, "train") == expected
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n")
    assert list_samples(spec, tmp_path, "train") == expected


def test_every_usual_picture_is_taken_and_what_is_left_out_is_named(tmp_path, caplog):
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    names = ["0.png", "1.PNG", "2.jpeg", "3.JPG", "4.Tif", "5.bmp", "6.WebP", "7.tiff"]
    for name in names:
        Image.new("RGB", (4, 3)).save(tmp_path / "train" / name)
        Image.new("L", (4, 3)).save(tmp_path / "trainannot" / f"{name[0]}.{'PNG' if name < '4' else 'png'}")
    for name in ("._0.png", ".directory"):
        (tmp_path / "train" / name).write_bytes(b"\0\5\x16\7Mac OS X")
        (tmp_path / "trainannot" / name).write_bytes(b"\0\5\x16\7Mac OS X")
    spec = find_dataset(tmp_path)
    pairs = list_samples(spec, tmp_path, "train")
    assert [pair.image.name for pair in pairs] == names
    assert all(read_sample(pair, spec.labels, 255)[1].shape == (3, 4) for pair in pairs)
    assert not caplog.records
    (tmp_path / "train" / "8.heic").touch()
    (tmp_path / "train" / "notes.txt").touch()
    assert list_samples(spec, tmp_path, "train") == pairs
    (record,) = caplog.records
    left_out = "2 of 10 files are no pictures of this data set and are left out: 8.heic, notes.txt"
    assert record.getMessage() == f"{tmp_path}/train: {left_out}"


LAYOUTS = {  # an image and its label
    "camvid": ("train/{}.png", "trainannot/{}.png"),
    "ade20k": ("images/training/{}.png", "annotations/training/{}.png"),
    "lip": ("train_images/{}.png", "train_segmentations/{}.png"),
    "cityscapes": (
        "leftImg8bit/train/aachen/{}_leftImg8bit.png",
        "gtFine/train/aachen/{}_gtFine_labelIds.png",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_without_an_image_are_named_and_a_shared_one_is_refused(tmp_path, caplog, name):
    image, label = (tmp_path / pattern for pattern in LAYOUTS[name])
    for path in (image, label):
        path.parent.mkdir(parents=True)
        Image.new("L", (4, 3)).save(str(path).format("a"))
    other = Path(str(label).format("b"))
    other.write_bytes(Path(str(label).format("a")).read_bytes())
    spec = find_dataset(tmp_path)
    assert spec.name == name
    (pair,) = list_samples(spec, tmp_path, "train")
    assert pair == (Path(str(image).format("a")), Path(str(label).format("a")))
    (record,) = caplog.records
    assert re.search(
        rf"^{tmp_path}/\S+: 1 of 2 labels have no image .*: \S*{other.name}$", record.getMessage()
    )
    pair.image.with_suffix(".jpg").write_bytes(pair.image.read_bytes())
    with pytest.raises(DataError, match=r"a\S*\.jpg and a\S*\.png have the same label; remove one"):
        list_samples(spec, tmp_path, "train")


def test_hidden_files_and_other_endings_in_cityscapes(tmp_path, caplog):
    for kind, names in (
        ("leftImg8bit", ["a_leftImg8bit.png", "b_leftImg8bit.JPG"]),
        ("gtFine", ["a_gtFine_labelIds.png", "b_gtFine_labelIds.PNG", "a_gtFine_color.png"]),
    ):
        folder = tmp_path / kind / "val/city"
        folder.mkdir(parents=True)
        (tmp_path / kind / "val/._city").mkdir()
        (tmp_path / kind / "val/._city" / names[0]).touch()
        for name in names:
            Image.new("L", (4, 3), 7).save(folder / name)
            (folder / f"._{name}").touch()
    pairs = list_samples(find_dataset(tmp_path), tmp_path, "val")
    assert [pair.label.name for pair in pairs] == ["a_gtFine_labelIds.png", "b_gtFine_labelIds.PNG"]
    assert not caplog.records


def test_ignore_label_0_means_that_classes_are_stored_as_1_to_n(tmp_path):
    write_pair(tmp_path, "a", values=4)
    pair = Pair(tmp_path / "images/a.png", tmp_path / "labels/a.png")
    spec = find_dataset(tmp_path, "list", num_classes=3, ignore_label=0)
    assert spec.ignore_label == 255
    stored = read_label(pair.label)
    _, train_ids = read_sample(pair, spec.labels, spec.ignore_label)
    np.testing.assert_array_equal(train_ids, np.where(stored == 0, 255, stored.astype(int) - 1))
    scored = train_ids != 255
    np.testing.assert_array_equal(spec.labels.decode(train_ids[scored]), stored[scored])


@pytest.mark.parametrize(
    ("num_classes", "ignore_label", "message"),
    [
        (3, 2, "--ignore-label 2 is one of the 3 classes"),
        (3, 256, "--ignore-label 256: label files hold 0 to 255"),
        (3, -1, "--ignore-label -1: label files hold 0 to 255"),
        (256, 255, "--num-classes 256: label files of 8 bits hold 1 to 255 classes"),
        (0, 255, "--num-classes 0: label files"),
        (None, 255, "--dataset list needs --num-classes"),
    ],
)
def test_classes_that_do_not_fit_label_files(list_data, num_classes, ignore_label, message):
    with pytest.raises(DataError, match=message):
        find_dataset(list_data, "list", num_classes, ignore_label)


def test_ignore_label_0_of_known_data_sets(demo_data, tmp_path):
    assert find_dataset(demo_data, ignore_label=0).ignore_label == 255  # 0 is unlabelled there
    (tmp_path / "trainannot").mkdir()
    with pytest.raises(DataError, match="--ignore-label 0 is one of the 11 classes of camvid"):
        find_dataset(tmp_path, ignore_label=0)


def test_folders_that_are_no_data_set(tmp_path, demo_data):
    with pytest.raises(DataError, match="no such data folder"):
        find_dataset(tmp_path / "none")
    with pytest.raises(DataError, match="the data folder is empty"):
        find_dataset(tmp_path)
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match=r"not the layout of one known data set .*--dataset list"):
        find_dataset(tmp_path)
    with pytest.raises(DataError, match="cityscapes has 19 classes"):
        find_dataset(demo_data, num_classes=20)
    with pytest.raises(DataError, match=r"--split test2: cityscapes has train, val, trainval, test"):
        list_samples(find_dataset(demo_data), demo_data, "test2")


def test_a_layout_with_holes(tmp_path, demo_data):
    image = next(demo_data.glob("leftImg8bit/train/*/*.png"))
    copy = tmp_path / image.relative_to(demo_data)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(image.read_bytes())
    spec = find_dataset(tmp_path)
    with pytest.raises(DataError, match=r"_gtFine_labelIds\.png: file is missing"):
        list_samples(spec, tmp_path, "train")
    with pytest.raises(DataError, match=r"leftImg8bit/val: no \*/\*_leftImg8bit\.png"):
        list_samples(spec, tmp_path, "val")


def test_a_module_of_the_users_may_add_a_data_set(tmp_path, monkeypatch):
    write_pair(tmp_path, "a")
    pair = Pair(tmp_path / "images/a.png", tmp_path / "labels/a.png")
    own = replace(
        DATASETS["camvid"],
        name="own",
        splits=("all",),
        matches=lambda root: (root / "images").is_dir(),
        list_samples=lambda root, split: [pair],
    )
    with pytest.raises(DataError, match="--dataset own: known are cityscapes, camvid, "):
        find_dataset(tmp_path, "own")
    monkeypatch.setitem(DATASETS, "own", own)
    assert find_dataset(tmp_path, ignore_label=50) == replace(own, ignore_label=50)
    assert list_samples(find_dataset(tmp_path, "own"), tmp_path, "all") == [pair]
    empty = replace(own, list_samples=lambda root, split: [], layout="photos/*.png")
    with pytest.raises(DataError, match=r"no samples of split all of own; expected photos/\*\.png"):
        list_samples(empty, tmp_path, "all")
    for change, message in (
        ({"prefix": "a/b"}, "the prefix, which cannot be 'a/b'"),
        ({"labels": replace(own.labels, names=("sky",) * 11)}, "a name of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(own, **change)
