"""ADE20K and LIP: layouts, tables, and what mirroring does to left and right."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import (
    DATASETS,
    DataError,
    Pair,
    TrainDataset,
    TrainTransform,
    check_supervision,
    find_dataset,
    list_samples,
)
from dataset.reading import read_label, read_sample

ADE20K, LIP = DATASETS["ade20k"].labels, DATASETS["lip"].labels


def write(path, values=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.zeros((6, 8, 3))
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


@pytest.fixture
def ade20k():
    folder = os.environ.get("CCNET_ADE20K")
    if not folder:
        pytest.skip("CCNET_ADE20K does not name the folder that holds ADEChallengeData2016")
    return Path(folder)


def write_ade20k(folder, values=((0, 1, 150),)):
    for split, number in (("training", 2), ("validation", 1)):
        for index in range(number):
            name = f"ADE_{split[:5]}_{index:08d}"
            write(folder / "images" / split / f"{name}.jpg", np.zeros((*np.shape(values), 3)))
            write(folder / "annotations" / split / f"{name}.png", values)


@pytest.mark.parametrize("parent", [".", "ADEChallengeData2016"])
def test_ade20k_layout(tmp_path, parent):
    write_ade20k(tmp_path / parent)
    spec = find_dataset(tmp_path)
    assert (spec.name, spec.prefix, spec.labels.num_classes, spec.ignore_label) == (
        "ade20k",
        "ADE20K",
        150,
        255,
    )
    pairs = {split: list_samples(spec, tmp_path, split) for split in spec.splits}
    assert {split: len(found) for split, found in pairs.items()} == {"train": 2, "val": 1, "trainval": 3}
    assert pairs["trainval"] == pairs["train"] + pairs["val"]
    _, label = read_sample(pairs["val"][0], spec.labels, 255)
    assert label.tolist() == [[255, 0, 149]]
    assert spec.labels.decode(label[:, 1:]).tolist() == [[1, 150]]
    assert find_dataset(tmp_path, ignore_label=0).ignore_label == 255  # as the benchmark numbers them


def test_ade20k_label_above_150(tmp_path):
    write_ade20k(tmp_path, [[1, 2, 151]])
    spec = find_dataset(tmp_path)
    pairs = list_samples(spec, tmp_path, "train")
    message = r"ADE_train_00000000\.png: holds label value 151, which is none of the 150 classes"
    with pytest.raises(DataError, match=message):
        read_sample(pairs[0], spec.labels, 255)
    with pytest.raises(DataError, match=message + ".*expected are 1 .wall., 2 .building."):
        check_supervision(pairs, spec.labels)


def test_ade20k_names():
    assert len(set(ADE20K.names)) == len(ADE20K.palette) == 150
    assert [ADE20K.names[index] for index in (0, 2, 12, 149)] == ["wall", "sky", "person", "flag"]
    assert {"pool table", "swimming pool", "traffic light", "kitchen island"} < set(ADE20K.names)
    assert ADE20K.palette[0] == (120, 120, 120)


def test_real_ade20k(ade20k):
    spec = find_dataset(ade20k)
    pairs = list_samples(spec, ade20k, "val")
    for pair in pairs[:3]:
        image, label = read_sample(pair, spec.labels, 255)
        stored = read_label(pair.label)
        assert image.shape[:2] == stored.shape
        assert (label == (stored.astype(int) - 1) % 256).all()
    table = ade20k / "classes150.csv"
    if table.is_file():
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert spec.labels.ids == tuple(int(row["id"]) for row in rows)
        assert spec.labels.palette == tuple((int(r["red"]), int(r["green"]), int(r["blue"])) for r in rows)
        for name, row in zip(ADE20K.names, rows, strict=True):
            # Blanks and the bounds of synonyms are the same sign there. Two classes begin with screen.
            synonyms = row["name"] + ";"
            assert synonyms.startswith(name.replace(" ", ";") + ";") or name == "projection screen"


def write_lip(root, images, labels, lists):
    for split, names in (("train", ["10_1", "11_2", "12_3"]), ("val", ["13_4"])):
        for name in names:
            write(root / images / f"{split}_images" / f"{name}.jpg")
            write(root / labels / f"{split}_segmentations" / f"{name}.png", np.full((6, 8), 19))
        if lists is not None:
            (root / lists / f"{split}_id.txt").write_text("\n".join(sorted(names, reverse=True)[:2]) + "\n")


DEEP = "TrainVal_images/TrainVal_images"
DEEP_LABELS = "TrainVal_parsing_annotations/TrainVal_parsing_annotations"


@pytest.mark.parametrize(
    ("images", "labels", "lists"),
    [
        (".", ".", "."),
        (".", ".", None),
        ("TrainVal_images", "TrainVal_parsing_annotations", "."),
        ("TrainVal_images", "TrainVal_parsing_annotations", "TrainVal_images"),
        (DEEP, DEEP_LABELS, "TrainVal_images/TrainVal_images"),
        (DEEP, "TrainVal_parsing_annotations", None),
    ],
)
def test_lip_layouts(tmp_path, images, labels, lists):
    write_lip(tmp_path, images, labels, lists)
    spec = find_dataset(tmp_path)
    assert (spec.name, spec.labels.num_classes) == ("lip", 20)
    train = list_samples(spec, tmp_path, "train")
    expected = ["10_1", "11_2", "12_3"] if lists is None else ["12_3", "11_2"]
    assert [pair.image.stem for pair in train] == [pair.label.stem for pair in train] == expected
    assert list_samples(spec, tmp_path, "trainval") == train + list_samples(spec, tmp_path, "val")


@pytest.mark.parametrize("name", ["99_9", "99_9.jpg"])
def test_lip_list_that_names_a_missing_file(tmp_path, name):
    write_lip(tmp_path, ".", ".", ".")
    (tmp_path / "train_id.txt").write_text(f"10_1.jpg\n\n{name}\n")
    with pytest.raises(DataError, match=rf"train_id\.txt, line 3: no image .*train_images/{name}"):
        list_samples(find_dataset(tmp_path), tmp_path, "train")
    (tmp_path / "train_id.txt").write_text("10_1.jpg\n11_2\n")
    (tmp_path / "train_segmentations/11_2.png").unlink()
    with pytest.raises(DataError, match=r"train_segmentations/11_2\.png: file is missing"):
        list_samples(find_dataset(tmp_path), tmp_path, "train")


def test_lip_label_above_19(tmp_path):
    write(tmp_path / "x.jpg")
    write(tmp_path / "x.png", np.full((6, 8), 20))
    with pytest.raises(DataError, match="holds label value 20, which is none of the 20 classes"):
        read_sample(Pair(tmp_path / "x.jpg", tmp_path / "x.png"), LIP, 255)


def test_lip_mirroring_swaps_left_and_right(tmp_path):
    write(tmp_path / "x.jpg", np.zeros((2, 20, 3)))
    write(tmp_path / "x.png", np.tile(np.arange(20), (2, 1)))
    pair = Pair(tmp_path / "x.jpg", tmp_path / "x.png")
    transform = TrainTransform((2, 20), scale=False, mirror_pairs=LIP.mirror_pairs)
    dataset = TrainDataset([pair], LIP, transform, seed=0)
    seen = {tuple(dataset[position].labels[0].tolist()) for position in range(20)}
    kept = tuple(range(20))
    names = list(LIP.names)
    swapped = [
        name.replace("left", "?").replace("right", "left").replace("?", "right") for name in reversed(names)
    ]
    assert seen == {kept, tuple(names.index(name) for name in swapped)}
